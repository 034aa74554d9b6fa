"""Takes out of a text whatever stands in a run's held-out splits (G4).

Reads: the held-out splits of a prepared folder.
Writes: nothing.
Never: changes the held-out text, or lets any of it through for being short, reflowed or rare.

Every passage goes that shares 13 words in a row with a held-out split: other line ends, capitals,
punctuation, accents, ligatures and invisible characters hide no copy, nor does a blank line in the
middle of it. What stands between two such passages and is too short to be judged goes with them. A
passage is a block, or a line of a block so long that it says little. So does a block that stands in
a held-out split, as between the splits of one set, however few words it has. All this is done over
and over until nothing is found, because what is taken out may join what stood apart.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.overlap import GRAM_WORDS, without_repeated_blocks
from data.prepared_folder import DataError, Meta, file_of
from data.tokenizers import Tokenizer

HELD_OUT = ("val", "gate", "test")
LONG_BLOCK_CHARACTERS = 2_000  # beyond this, its lines are looked at one by one
_PASSAGES_AT_A_TIME = 4_096  # so that a long text is never a list of all its words

_BLANK_LINES = re.compile(r"\n\s*\n")
_WORD = re.compile(r"[^\W_]+")
_PLAIN = re.compile(r"[\t-\r -~]*")

Hashes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Remainder:
    """What is left of a text.

    Attributes:
        removed_passages: blocks, and lines of long blocks, that were taken out.
        removed_share: share of the text's bytes that they were.
    """

    text: str
    removed_passages: int
    removed_share: float


def held_out_texts(folder: Path, meta: Meta, tokenizer: Tokenizer) -> list[str]:
    """Return the text of val, gate and test, as it was before it became tokens.

    Raises:
        DataError: a split cannot be read, or its tokens make no text.
    """
    texts = []
    for split in HELD_OUT:
        path = folder / file_of(split)
        try:
            tokens = np.fromfile(path, dtype=f"<u{meta.token_bytes}")
            texts.append(tokenizer.decode(tokens).decode())
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{path} cannot be read as text; prepare the data again") from error
    return texts


def without_held_out(text: str, held_out: Sequence[str], max_share: float) -> Remainder:
    """Take out of a text what stands in a held-out one.

    Args:
        max_share: of the text's bytes; once more than that is gone, no more is looked for.
    """
    known = _sorted_grams(held_out)
    n_bytes = len(text.encode())
    removed: list[str] = []
    share = 0.0
    while share <= max_share:
        text, shared = _without_shared_grams(text, known)
        kept, repeated = without_repeated_blocks([*held_out, text])
        text = kept[-1]
        if not shared and not repeated[-1]:
            break
        removed += [*shared, *repeated[-1]]
        share = sum(len(passage.encode()) for passage in removed) / n_bytes
    return Remainder(text, len(removed), share)


def passages(text: str) -> list[str]:
    """Cut a text into blocks with the blank lines after them, and long blocks into lines."""
    found: list[str] = []
    start = 0
    for end in (*(blank.end() for blank in _BLANK_LINES.finditer(text)), len(text)):
        block = text[start:end]
        found += [block] if len(block) <= LONG_BLOCK_CHARACTERS else block.splitlines(True)
        start = end
    return [passage for passage in found if passage]


def _without_shared_grams(text: str, sorted_known: Hashes) -> tuple[str, list[str]]:
    parts = passages(text)
    touched = np.zeros(len(parts), dtype=bool)
    n_words = np.zeros(len(parts), dtype=np.int64)
    words: list[str] = []  # from the end of what came before, as many as a gram may reach back
    owners: list[int] = []
    for start in range(0, len(parts), _PASSAGES_AT_A_TIME):
        for place in range(start, min(start + _PASSAGES_AT_A_TIME, len(parts))):
            found = _words(parts[place])
            n_words[place] = len(found)
            words += found
            owners += [place] * len(found)
        owner_of = np.array(owners, dtype=np.int64)
        at = np.flatnonzero(_are_known(_grams(words), sorted_known))
        for offset in range(GRAM_WORDS):
            touched[owner_of[at + offset]] = True
        del words[: 1 - GRAM_WORDS], owners[: 1 - GRAM_WORDS]
    words_before = np.concatenate([[0], np.cumsum(n_words)])
    for one, next_one in pairwise(np.flatnonzero(touched)):
        if words_before[next_one] - words_before[one + 1] < GRAM_WORDS:
            touched[one:next_one] = True
    kept = "".join(part for part, gone in zip(parts, touched, strict=True) if not gone)
    return kept, [parts[place] for place in np.flatnonzero(touched)]


def _sorted_grams(texts: Iterable[str]) -> Hashes:
    hashes = [_grams(_words(text)) for text in texts]
    return np.sort(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.int64)


def _are_known(grams: Hashes, sorted_known: Hashes) -> npt.NDArray[np.bool_]:
    if not len(sorted_known):
        return np.zeros(len(grams), dtype=bool)
    places = np.minimum(np.searchsorted(sorted_known, grams), len(sorted_known) - 1)
    return np.equal(sorted_known[places], grams)


def _grams(words: Sequence[str]) -> Hashes:
    """Hash every window of 13 words; the same in one process only, which is all that it is for."""
    windows: Iterator[tuple[str, ...]] = zip(
        *(islice(words, place, None) for place in range(GRAM_WORDS)), strict=False
    )
    return np.fromiter(map(hash, windows), dtype=np.int64)


def _words(text: str) -> list[str]:
    """Return the words of a text as they sound: letters and digits without case and accents."""
    if not _PLAIN.fullmatch(text):
        text = unicodedata.normalize("NFKD", text).translate(_unseen()).casefold()
    return _WORD.findall(text.lower())


@cache
def _unseen() -> dict[int, None]:
    """Return what can stand between the letters of a word and not be seen: accents, controls."""
    characters = map(chr, range(sys.maxunicode + 1))
    return {
        ord(character): None
        for character in characters
        if unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc") and not character.isspace()
    }
