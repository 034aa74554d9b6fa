"""Preparing data sets: splits, tokens, hashes, refusals, damage and rivals."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from darwin_exp.individual import DataSpec
from data import DataError, DatasetRequest, prepare, read_meta, verify
from data.__main__ import main
from data.preparation import split_text
from data.prepared_folder import SPLITS, file_of

REPOSITORY = Path(__file__).parents[2]
NO_DEDUP = (0.9, 0.1, 0.0, 0.0)


def prose(seed: int, n_paragraphs: int = 120) -> str:
    """Return text without repeats: paragraphs of random words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(2000)]
    paragraphs = [" ".join(rng.choices(words, k=30)).capitalize() for _ in range(n_paragraphs)]
    return ".\n\n".join(paragraphs) + ".\n"


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., DatasetRequest]:
    """Return a maker of requests for a given text."""

    def make(text: str, **changes: Any) -> DatasetRequest:
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode())
        return replace(DatasetRequest("textdir", path=path, root=tmp_path), **changes)

    return make


def quiet(_line: str) -> None:
    """Take an announcement and say nothing."""


def decoded(folder: Path, split: str) -> str:
    """Decode a split from nothing but the files of the prepared folder."""
    meta = read_meta(folder)
    tokens = np.fromfile(folder / file_of(split), dtype="<u2")
    if meta.vocabulary is not None:
        return "".join(meta.vocabulary[token] for token in tokens)
    assert meta.tokenizer == "bytes"
    return bytes(tokens.tolist()).decode()


# --- splits and tokens ------------------------------------------------------------------------

shares = st.lists(st.integers(1, 100), min_size=4, max_size=4).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(min_size=500, max_size=700) | st.text("aé€😀\n ", min_size=500),
    tokenizer=st.sampled_from(["char", "bytes"]),
    splits=shares,
)
def test_splits_are_contiguous_and_lossless_and_their_bytes_add_up(
    text: str, tokenizer: str, splits: tuple[float, float, float, float]
) -> None:
    assume(text.strip() and not text.startswith("\ufeff") and min(splits) * len(text) >= 1)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "text.txt")
        path.write_bytes(text.encode())
        spec = prepare(
            DatasetRequest(
                "textdir", tokenizer, path, splits, False, context_length=0, root=Path(name)
            ),
            quiet,
        )
        meta = read_meta(spec.folder)
        assert "".join(decoded(spec.folder, split) for split in SPLITS) == text
        assert sum(meta.splits[split].bytes for split in SPLITS) == len(text.encode())
        lengths = np.load(spec.folder / "token_byte_lengths.npy")
        assert lengths.dtype == np.uint16
        assert lengths.shape == (meta.vocab_size,) == (spec.vocab_size,)
        for split in SPLITS:
            tokens = np.fromfile(spec.folder / file_of(split), dtype="<u2")
            assert len(tokens) == meta.splits[split].tokens
            assert int(lengths[tokens].sum(dtype=np.int64)) == meta.splits[split].bytes


@given(text=st.text(max_size=200), share=st.sampled_from([0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95]))
def test_the_first_split_is_the_first_share_of_characters_exactly(text: str, share: float) -> None:
    train, val, gate, test = split_text(text, (share, 1 - share, 0.0, 0.0))
    n = len(text)
    assert (train, val) == (text[: int(n * share)], text[int(n * share) :])
    assert gate == test == ""


@given(text=st.text(max_size=200), splits=shares)
def test_a_split_is_off_its_share_by_less_than_one_character(
    text: str, splits: tuple[float, ...]
) -> None:
    pieces = split_text(text, splits)
    assert "".join(pieces) == text
    for piece, share in zip(pieces, splits, strict=True):
        assert abs(len(piece) - share * len(text)) < 1.001


def test_a_share_of_zero_makes_an_empty_split(request_for: Callable[..., DatasetRequest]) -> None:
    spec = prepare(request_for(prose(1), splits=NO_DEDUP, dedup_blocks=False), quiet)
    meta = read_meta(spec.folder)
    assert meta.splits["gate"].tokens == meta.splits["test"].tokens == 0
    assert (spec.folder / "held_out" / "gate.bin").read_bytes() == b""
    verify(spec)


def test_a_character_vocabulary_is_sorted_and_of_the_whole_text(
    request_for: Callable[..., DatasetRequest],
) -> None:
    text = prose(2) + "\n\nZ only the last split has a ß and a 😀 " + "x" * 100
    spec = prepare(request_for(text), quiet)
    assert read_meta(spec.folder).vocabulary == sorted(set(text))


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(
    request_for: Callable[..., DatasetRequest],
) -> None:
    text = prose(3).replace("\n", "\r\n")
    spec = prepare(request_for("\ufeff" + text, tokenizer="bytes", dedup_blocks=False), quiet)
    assert "".join(decoded(spec.folder, split) for split in SPLITS) == text


def test_the_held_out_splits_are_closed_to_other_users(
    request_for: Callable[..., DatasetRequest],
) -> None:
    spec = prepare(request_for(prose(4)), quiet)
    assert (spec.folder / "held_out").stat().st_mode & 0o777 == 0o700
    assert spec.folder.stat().st_mode & 0o777 == 0o755


def test_meta_holds_the_agreed_keys(request_for: Callable[..., DatasetRequest]) -> None:
    spec = prepare(request_for(prose(5)), quiet)
    meta = json.loads((spec.folder / "meta.json").read_text())
    agreed = {"name", "tokenizer", "vocabulary", "vocab_size", "token_bytes", "splits"}
    assert agreed | {"content_hash", "source"} <= meta.keys()
    assert {"tokens", "bytes", "sha256"} <= meta["splits"]["train"].keys()
    assert (spec.content_hash, spec.token_bytes) == (meta["content_hash"], 2)


# --- what changes a set and what does not -----------------------------------------------------


def test_a_second_request_finds_the_set_and_says_nothing(
    request_for: Callable[..., DatasetRequest],
) -> None:
    request, said = request_for(prose(6)), list[str]()
    first = prepare(request, said.append)
    assert said
    said.clear()
    assert prepare(replace(request, context_length=7), said.append) == first
    assert said == []


def test_another_text_tokenizer_or_split_is_another_set(
    request_for: Callable[..., DatasetRequest],
) -> None:
    base = prepare(request_for(prose(7)), quiet)
    others = [
        prepare(request_for(prose(8)), quiet),
        prepare(request_for(prose(7), tokenizer="bytes"), quiet),
        prepare(request_for(prose(7), splits=(0.8, 0.1, 0.05, 0.05)), quiet),
    ]
    assert len({spec.content_hash for spec in [base, *others]}) == 4
    assert len({spec.folder for spec in [base, *others]}) == 4


# --- text that stands in two splits -----------------------------------------------------------


def reflowed(text: str) -> str:
    """Break the lines of a text elsewhere, change case and punctuation; the words stay."""
    words = text.lower().replace(".", ";").split()
    return "\n".join(" ".join(words[at : at + 7]) for at in range(0, len(words), 7))


def test_a_held_out_split_that_copies_train_is_refused(
    request_for: Callable[..., DatasetRequest],
) -> None:
    text = prose(9)
    copied = text + reflowed(text)
    request = request_for(copied, splits=(0.5, 0.5, 0.0, 0.0))
    with pytest.raises(DataError, match=r"^dataset\.max_overlap: 9\d\.\d% .* of val stand in"):
        prepare(request, quiet)
    assert not list((request.root / "prepared").glob("textdir-*"))
    # The same text passes where the user says so, and the overlap is on record.
    for allowed in (replace(request, max_overlap=1.0), replace(request, dedup_blocks=False)):
        overlap = read_meta(prepare(allowed, quiet).folder).splits["val"].overlap_with_train
        assert overlap is not None
        assert overlap > 0.9
    # A set that lies there since then is still refused to whoever did not say so.
    with pytest.raises(DataError, match="max_overlap"):
        prepare(request, quiet)


def test_honest_text_passes_and_has_no_overlap(request_for: Callable[..., DatasetRequest]) -> None:
    meta = read_meta(prepare(request_for(prose(10)), quiet).folder)
    assert [meta.splits[split].overlap_with_train for split in SPLITS] == [None, 0.0, 0.0, 0.0]


def test_a_block_that_stands_in_two_splits_leaves_the_later_one(
    request_for: Callable[..., DatasetRequest],
) -> None:
    song = "A song that is sung in every act,\nlong enough to be known by heart, and remembered."
    parts = [prose(seed, 40) for seed in (11, 12, 13, 14)]
    text = "\n\n".join(f"Exeunt\n\n{song}\n\n{part[:6000]}" for part in parts)
    request = request_for(text, splits=(0.25, 0.25, 0.25, 0.25))
    folder = prepare(request, quiet).folder
    meta = read_meta(folder)
    texts = {split: decoded(folder, split) for split in SPLITS}
    assert [song in texts[split] for split in SPLITS] == [True, False, False, False]
    assert [meta.splits[split].removed_blocks for split in SPLITS] == [0, 1, 1, 1]
    assert all("Exeunt" in texts[split] for split in SPLITS)
    kept = sum(meta.splits[split].bytes + meta.splits[split].removed_bytes for split in SPLITS)
    assert kept == len(text.encode())
    whole = prepare(replace(request, dedup_blocks=False), quiet).folder
    assert "".join(decoded(whole, split) for split in SPLITS) == text


def test_blocks_are_compared_without_regard_to_white_space(
    request_for: Callable[..., DatasetRequest],
) -> None:
    text = prose(15)
    copy = text.replace(" ", "  ").replace("\n\n", "\n \t\n\n")
    share = (len(text) + 1) / (len(text) + 2 + len(copy))
    request = request_for(f"{text}\n\n{copy}", splits=(share, 1 - share, 0.0, 0.0))
    with pytest.raises(DataError, match=r"val has \d tokens after removing 120 repeated blocks"):
        prepare(request, quiet)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "shakspere"}, "dataset.name: 'shakspere' is unknown; use shakespeare"),
        ({"tokenizer": "words"}, "dataset.tokenizer: 'words' is unknown; use char, bytes, gpt2"),
        ({"splits": (0.9, 0.2, 0.0, 0.0)}, "dataset.splits: the shares sum to 1.1; make it 1"),
        ({"splits": (1.1, -0.1, 0.0, 0.0)}, "dataset.splits: give four shares of at least 0"),
        ({"splits": (float("nan"), 0.5, 0.5, 0.0)}, "dataset.splits: give four shares"),
        ({"splits": (0.5, 0.5)}, "dataset.splits: give four shares of at least 0"),
        ({"splits": (1.0, 0.0, 0.0, 0.0)}, "dataset.splits: train and val must be above 0"),
        ({"max_overlap": 5.0}, "dataset.max_overlap: 5.0 must lie between 0 and 1"),
        ({"path": None}, "dataset.path: name the .txt file"),
        ({"context_length": 100_000}, "dataset.splits: train has "),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(
    request_for: Callable[..., DatasetRequest], changes: dict[str, Any], said: str
) -> None:
    request = request_for(prose(16), **changes)
    with pytest.raises(DataError) as refused:
        prepare(request, quiet)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)
    assert not list(request.root.glob("prepared/textdir-*"))


def test_a_held_out_split_shorter_than_a_context_is_named(
    request_for: Callable[..., DatasetRequest],
) -> None:
    request = request_for("word " * 20 + "end", splits=NO_DEDUP, dedup_blocks=False)
    with pytest.raises(DataError, match="val has 11 tokens, too few for a context_length of 64"):
        prepare(request, quiet)
    prepare(replace(request, context_length=10), quiet)


def test_too_many_characters_are_refused_and_bytes_are_the_cure(
    request_for: Callable[..., DatasetRequest],
) -> None:
    text = "".join(chr(point) for point in range(0x4E00, 0x4E00 + 5000))
    with pytest.raises(DataError, match=r"5000 different characters.*set dataset\.tokenizer=bytes"):
        prepare(request_for(text), quiet)
    assert prepare(request_for(text, tokenizer="bytes"), quiet).vocab_size == 256


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file"])
def test_a_root_that_cannot_be_written_names_the_key(
    request_for: Callable[..., DatasetRequest], tmp_path: Path, place: str
) -> None:
    (tmp_path / "a file").write_text("not a folder")
    root = tmp_path / place
    with pytest.raises(DataError, match=r"set paths\.data to a folder") as refused:
        prepare(request_for(prose(17), root=root), quiet)
    assert str(root) in str(refused.value)


def test_a_disk_without_room_leaves_nothing_half_written(
    request_for: Callable[..., DatasetRequest],
) -> None:
    request = request_for(prose(18))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from data import DatasetRequest, DataError, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "path, root = map(Path, sys.argv[1:])\n"
        "try: prepare(DatasetRequest('textdir', path=path, root=root))\n"
        "except DataError as error: print('REFUSED', error)\n"
    )
    result = in_python(script, str(request.path), str(request.root)).communicate()[0]
    assert "REFUSED" in result
    assert "set paths.data to a folder" in result
    assert [path.name for path in (request.root / "prepared").iterdir()] == [".lock"]


def in_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


# --- damage -----------------------------------------------------------------------------------

EVERY_FILE = [*(file_of(split) for split in SPLITS), "token_byte_lengths.npy", "meta.json"]


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_flipped_byte_is_named_and_mended(
    request_for: Callable[..., DatasetRequest], name: str
) -> None:
    request = request_for(prose(19))
    spec = prepare(request, quiet)
    path = spec.folder / name
    intact = path.read_bytes()
    at = intact.index(b'"bytes": ') + 9 if name == "meta.json" else len(intact) // 2
    path.write_bytes(intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
    with pytest.raises(DataError, match="is missing or damaged; delete the folder") as refused:
        verify(spec)
    assert str(spec.folder) in str(refused.value)
    if name != "meta.json":
        assert str(path) in str(refused.value)
    said: list[str] = []
    assert prepare(request, said.append) == spec
    assert path.read_bytes() == intact
    assert said[0].endswith("is missing or damaged; building it again")
    verify(spec)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_missing_file_is_named_and_mended(
    request_for: Callable[..., DatasetRequest], name: str
) -> None:
    request = request_for(prose(19))
    spec = prepare(request, quiet)
    (spec.folder / name).unlink()
    with pytest.raises(DataError, match="is missing or damaged") as refused:
        verify(spec)
    assert str(spec.folder / name) in str(refused.value)
    assert prepare(request, quiet) == spec
    verify(spec)


def test_another_set_in_the_place_of_the_one_asked_for_is_told_apart(
    request_for: Callable[..., DatasetRequest],
) -> None:
    first, second = (prepare(request_for(prose(seed)), quiet) for seed in (20, 21))
    shutil.rmtree(first.folder)
    second.folder.rename(first.folder)
    with pytest.raises(DataError, match="holds another data set"):
        verify(first)


def test_what_a_killed_process_left_is_cleared_away(
    request_for: Callable[..., DatasetRequest],
) -> None:
    request = request_for(prose(22))
    leftover = request.root / "prepared" / ".building-of-a-dead-process"
    leftover.mkdir(parents=True)
    prepare(request, quiet)
    assert not leftover.exists()


# --- rivals -----------------------------------------------------------------------------------


def test_two_processes_that_prepare_at_once_both_succeed(
    request_for: Callable[..., DatasetRequest],
) -> None:
    request = request_for(prose(23, n_paragraphs=3000))
    script = (
        "import sys; from pathlib import Path; from data import DatasetRequest, prepare, verify\n"
        "path, root = map(Path, sys.argv[1:])\n"
        "spec = prepare(DatasetRequest('textdir', path=path, root=root), lambda line: None)\n"
        "verify(spec); print(spec.folder.name, spec.content_hash)\n"
    )
    rivals = [in_python(script, str(request.path), str(request.root)) for _ in range(3)]
    answers = [rival.communicate()[0] for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    assert len(set(answers)) == 1
    prepared = list((request.root / "prepared").iterdir())
    assert sorted(path.name for path in prepared) == [".lock", answers[0].split()[0]]


def test_whoever_waited_says_so_and_takes_what_the_other_has_made(
    request_for: Callable[..., DatasetRequest], tmp_path: Path
) -> None:
    request = request_for(prose(24))
    made = prepare(replace(request, root=tmp_path / "elsewhere"), quiet)
    lock = request.root / "prepared" / ".lock"
    lock.parent.mkdir()
    waiting, said, found = threading.Event(), list[str](), list[DataSpec]()

    def announce(line: str) -> None:
        said.append(line)
        waiting.set()

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: found.append(prepare(request, announce)))
        thread.start()
        assert waiting.wait(20)
        shutil.copytree(made.folder, lock.parent / made.folder.name)
    thread.join(20)
    assert [spec.content_hash for spec in found] == [made.content_hash]
    assert len(said) == 1
    assert "waiting for another process" in said[0]


# --- the command line -------------------------------------------------------------------------


def test_the_command_prints_a_table_of_splits(
    request_for: Callable[..., DatasetRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_for(prose(25))
    assert main(["textdir", "--path", str(request.path), "--root", str(request.root)]) == 0
    table = capsys.readouterr().out
    for split in SPLITS:
        assert f"\n{split}" in table
    assert read_meta(prepare(request, quiet).folder).splits["val"].sha256[:12] in table


def test_the_command_ends_with_2_and_one_line_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.txt"
    assert main(["textdir", "--path", str(missing), "--root", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err == (f"dataset.path: {missing} does not exist; name a .txt file or a folder\n")
