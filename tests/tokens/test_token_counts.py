"""Token counts: what they add up to, where a text is cut, and what happens without a vocabulary."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.tokens import TokenCounter
from data import DatasetRequest

ROOT = Path(__file__).resolve().parents[2]
DATA = DatasetRequest("shakespeare").root
CODE = (ROOT / "trainer_base" / "train.py").read_text()
WORDS = st.text("ab =\n\t'#é😀\r", max_size=200) | st.text(max_size=100)


@cache
def with_vocabulary() -> TokenCounter | str:
    """Return a counter with GPT-2's vocabulary, or why it cannot be had."""
    said: list[str] = []
    counter = TokenCounter.load(DATA, said.append)
    estimated = [line for line in said if line.startswith("tokens:")]
    return estimated[0] if estimated else counter


@pytest.fixture(params=["gpt2", "estimate"])
def counter(request: pytest.FixtureRequest) -> TokenCounter:
    if request.param == "estimate":
        return TokenCounter.estimating()
    return gpt2_or_skip()


def gpt2_or_skip() -> TokenCounter:
    found = with_vocabulary()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_plain_words_have_the_published_number_of_tokens() -> None:
    assert gpt2_or_skip().count("Hello world") == 2


def test_an_empty_text_has_no_tokens(counter: TokenCounter) -> None:
    assert counter.count("") == 0


@given(WORDS, WORDS)
def test_counts_of_texts_on_lines_of_their_own_add_up(one: str, other: str) -> None:
    counters = [TokenCounter.estimating()]
    if isinstance(found := with_vocabulary(), TokenCounter):
        counters.append(found)
    for counter in counters:
        assert counter.count(f"{one}\n{other}") == counter.count(f"{one}\n") + counter.count(other)


@given(WORDS, st.integers(-3, 120))
def test_a_cut_is_the_longest_run_of_whole_lines_that_fits(text: str, n_tokens: int) -> None:
    counter = TokenCounter.estimating()
    kept = counter.cut(text, n_tokens)
    assert text.startswith(kept)
    assert kept in ("", text) or kept.endswith("\n")
    assert counter.count(kept) <= max(0, n_tokens)
    rest = text[len(kept) :]
    if rest:
        next_line = rest.partition("\n")[0] + ("\n" if "\n" in rest else "")
        assert counter.count(kept + next_line) > n_tokens


def test_the_estimate_of_code_is_on_the_safe_side_of_what_todays_models_take() -> None:
    # Three bytes a token is less than any of them gets into one.
    assert TokenCounter.estimating().count(CODE) > len(CODE.encode()) / 3


def test_gpt2_takes_more_tokens_for_code_than_today_s_three_and_a_half_bytes_each() -> None:
    assert gpt2_or_skip().count(CODE) > len(CODE.encode()) / 3.5


def test_half_a_character_and_a_line_without_end_are_counted(counter: TokenCounter) -> None:
    assert counter.count("\ud800") >= 1
    assert counter.count("x" * 200_000) > 0


def test_without_a_vocabulary_tokens_are_estimated_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    said: list[str] = []
    counter = TokenCounter.load(tmp_path, said.append)
    assert counter.count(CODE) == TokenCounter.estimating().count(CODE)
    assert len(said) == 1
    assert said[0].startswith("tokens: estimated from bytes")
    assert "\n" not in said[0]


def test_a_folder_that_cannot_be_made_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    (tmp_path / "cache").write_text("a file where the folder should be")
    said: list[str] = []
    assert TokenCounter.load(tmp_path, said.append).count("abcd") == 2
    assert "estimated" in said[-1]


def test_importing_the_module_brings_no_heavy_library_along() -> None:
    program = (
        "import sys, darwin_exp.tokens\n"
        "print([name for name in ('tiktoken', 'numpy', 'torch') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
