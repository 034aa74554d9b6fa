"""Working folders: what candidates are given, what is taken from them, and the removal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import Genome
from darwin_exp.sandbox.workfolder import (
    MAX_STAGED,
    WorkRoot,
    plain_name,
    remove_left_behind,
    remove_tree,
)

GENOME = Genome.of({"train.py": "pass", "model.py": "", "parts/layers.py": "x = 1"})


@pytest.fixture
def root() -> Iterator[WorkRoot]:
    root = WorkRoot()
    yield root
    root.remove()
    assert not root.path.exists()


def test_an_input_is_copied_once_and_never_the_users_own_file(
    root: WorkRoot, tmp_path: Path
) -> None:
    source = tmp_path / "train.bin"
    source.write_bytes(b"tokens")
    folders = [root.new_folder(GENOME, {"train.bin": source}, {}).path for _ in range(3)]
    given_files = [(folder / "in" / "train.bin").stat() for folder in folders]
    assert len({status.st_ino for status in given_files}) == 1
    assert given_files[0].st_ino != source.stat().st_ino
    assert given_files[0].st_mode & 0o222 == 0


def test_b14_an_input_can_be_a_copy_that_nobody_else_reads(root: WorkRoot, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    folders = [root.new_folder(GENOME, {source.name: source}, {}, own_copies=True) for _ in "12"]
    files = [folder.path / "in" / source.name for folder in folders]
    assert len({path.stat().st_ino for path in (source, *files)}) == 3
    assert [path.read_bytes() for path in files] == [b"weights"] * 2
    assert not any(path.stat().st_mode & 0o222 for path in files)


def test_staged_copies_do_not_pile_up_and_those_in_use_stay(root: WorkRoot, tmp_path: Path) -> None:
    source = tmp_path / "text"
    folders = []
    for i in range(MAX_STAGED + 5):
        source.write_text("x" * i)
        folders.append(root.new_folder(GENOME, {"text": source}, {}))
    assert len(list((root.path / "staged").iterdir())) == MAX_STAGED
    assert [len((f.path / "in/text").read_text()) for f in folders] == list(range(MAX_STAGED + 5))
    for folder in folders:
        folder.remove()


def test_a_folder_that_cannot_be_laid_out_leaves_nothing(root: WorkRoot, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        root.new_folder(GENOME, {"text": tmp_path / "absent"}, {})
    assert list(root.path.glob("job-*")) == []


def test_c6_folders_a_thousand_levels_deep_are_removed() -> None:
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a thousand times faster
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        check_that_a_deep_folder_is_removed(Path(folder))


def check_that_a_deep_folder_is_removed(folder: Path) -> None:
    doomed, kept = folder / "doomed", folder / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    doomed.mkdir()
    (doomed / "link").symlink_to(kept)
    (doomed / "closed").mkdir(mode=0)
    before = Path.cwd()
    os.chdir(doomed)
    for _ in range(1050):
        os.mkdir("deep")
        os.chdir("deep")
    Path("file").touch()
    os.chdir(before)
    remove_tree(doomed)
    assert not doomed.exists()
    assert (kept / "file").read_text() == "kept"
    remove_tree(doomed)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_a_user_left_in_a_shared_folder_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "file").write_text("left")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / "pipe")
    for name in ("left", "link", "pipe"):
        os.chown(tmp_path / name, 64_900, 64_900, follow_symlinks=False)
    remove_left_behind(64_900, [tmp_path, tmp_path / "absent"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_c4_the_same_file_under_two_names_is_counted_twice_at_most(
    root: WorkRoot, tmp_path: Path
) -> None:
    work = root.new_folder(GENOME, {}, {})
    (work.path / "out" / "one").write_text("12345")
    os.link(work.path / "out" / "one", work.path / "out" / "two")
    assert work.collect(["one", "two"], tmp_path, 10, owner=None) == {}
    assert list(work.collect(["one", "two"], tmp_path, 9, owner=None)) == ["two"]
    assert list(work.collect(["one"], tmp_path, 9, owner=os.geteuid() + 1)) == ["one"]


@given(st.text())
def test_c5_a_plain_name_stays_in_its_folder(name: str) -> None:
    try:
        accepted = plain_name(name)
    except (ValueError, UnicodeEncodeError):
        return
    assert os.path.normpath(os.path.join("/folder", accepted)) == f"/folder/{name}"
    assert Path("/folder", accepted).parent == Path("/folder")
