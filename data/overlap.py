"""Finds text that stands in two splits: removes repeated blocks, measures what is left.

Reads and writes: nothing; pure functions of text.
Never: touches the first split, or rearranges what it keeps.

A block is what blank lines enclose, compared with all white space folded to single spaces. Only
blocks of at least `MIN_BLOCK_CHARACTERS` count: 'Exeunt' or 'return None' in two splits teaches
nobody anything, and taking it out would tear the text; a repeated song, licence header or
paragraph is long enough to be learnt by heart in one split and recited in another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

MIN_BLOCK_CHARACTERS = 64
GRAM_WORDS = 13

_BLANK_LINES = re.compile(r"(\n\s*\n)")
_WORD = re.compile(r"\w+")


def without_repeated_blocks(texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Leave out of each text the blocks that stand in an earlier one.

    Returns:
        The texts that remain, and the removed blocks of each. A block repeated within one text
        stays: that is how the text is, and no score is fooled by it.
    """
    kept_texts: list[str] = []
    removed_blocks: list[list[str]] = []
    seen_before: set[str] = set()
    for text in texts:
        parts = _BLANK_LINES.split(text)  # block, separator, block, separator, ..., block
        blocks, separators = parts[::2], [*parts[1::2], ""]
        keys = [" ".join(block.split()) for block in blocks]
        kept: list[str] = []
        removed: list[str] = []
        for block, separator, key in zip(blocks, separators, keys, strict=True):
            if key in seen_before:
                removed.append(block + separator)
            else:
                kept.append(block + separator)
        seen_before.update(key for key in keys if len(key) >= MIN_BLOCK_CHARACTERS)
        kept_texts.append("".join(kept))
        removed_blocks.append(removed)
    return kept_texts, removed_blocks


def overlap_with_first(texts: Sequence[str]) -> list[float | None]:
    """Return which share of each later text's 13-word grams also stands in the first.

    Words are runs of letters and digits, without regard to case, so that neither layout nor
    punctuation hides a copy. A text of fewer words than a gram has none to measure: None.
    """
    number_of: defaultdict[str, int] = defaultdict(count().__next__)
    first, *others = (_grams(text, number_of) for text in texts)
    known = np.sort(first)
    return [_share_known(grams, known) for grams in others]


def _share_known(
    grams: npt.NDArray[np.uint64], sorted_known: npt.NDArray[np.uint64]
) -> float | None:
    if not len(grams):
        return None
    if not len(sorted_known):
        return 0.0
    places = np.searchsorted(sorted_known, grams)
    nearest = sorted_known[np.minimum(places, len(sorted_known) - 1)]
    return float((nearest == grams).mean())


def _grams(text: str, number_of: Mapping[str, int]) -> npt.NDArray[np.uint64]:
    """Hash every window of 13 words (n_words - 12,); `number_of` numbers words as it meets them."""
    words = _WORD.findall(text.lower())
    mixed = _mixed(np.fromiter(map(number_of.__getitem__, words), np.uint64, len(words)))
    n_grams = max(0, len(mixed) - GRAM_WORDS + 1)
    hashes = np.zeros(n_grams, dtype=np.uint64)
    for place in range(GRAM_WORDS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + mixed[place : place + n_grams]
    return hashes


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter small numbers over 64 bits, so that sums of them do not collide.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    numbers = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
