"""The files of a candidate: what it is given, and what is taken from it.

Reads: inputs of the harness; what a stopped candidate left in `out/`.
Writes: below one private temporary folder, and the destinations of `collect`.
Never: follows a link or opens a special file that a candidate made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from darwin_exp.individual import Genome

MAX_STAGED = 4  # input files kept ready to be linked into the next working folder

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class WorkRoot:
    """A private temporary folder that holds the working folders of one sandbox."""

    def __init__(self) -> None:
        # Candidates may pass through to a working folder of theirs, but see no neighbour.
        self.path = Path(tempfile.mkdtemp(prefix="candidates-")).resolve()
        self.path.chmod(0o711)
        self._staging = self.path / "staged"
        self._staging.mkdir(mode=0o700)
        self._staged: OrderedDict[tuple[Any, ...], Path] = OrderedDict()
        self._lock = threading.Lock()
        self._count = 0

    def new_folder(
        self,
        genome: Genome,
        inputs: Mapping[str, Path],
        job: Mapping[str, Any],
        own_copies: bool = False,
    ) -> WorkFolder:
        """Lay out a working folder: job.json, code/ and in/ to read, out/ and tmp/ to write.

        Args:
            own_copies: whether its inputs are copied for it alone. Two programs that read one file
                can tell each other something by which of its pages are in memory.

        Raises:
            OSError: an input cannot be read, or the disk is full.
        """
        with self._lock:
            self._count += 1
            folder = self.path / f"job-{self._count}"
            folder.mkdir(mode=0o755)
            try:
                self._lay_out(folder, genome, inputs, job, own_copies)
            except BaseException:
                remove_tree(folder)
                raise
        return WorkFolder(folder)

    def _lay_out(
        self,
        folder: Path,
        genome: Genome,
        inputs: Mapping[str, Path],
        job: Mapping[str, Any],
        own_copies: bool,
    ) -> None:
        genome.write_to(folder / "code")
        (folder / "job.json").write_text(json.dumps(dict(job)), encoding="utf-8")
        (folder / "in").mkdir()
        for name, source in inputs.items():
            target = folder / "in" / plain_name(name)
            if own_copies:
                shutil.copyfile(source, target)
            else:
                os.link(self._stage(source), target)
        for path in folder.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for name in ("out", "tmp"):
            (folder / name).mkdir(mode=0o700)
        folder.chmod(0o555)

    def _stage(self, source: Path) -> Path:
        """Return a read-only copy of an input, made once and shared by all who need it."""
        status = source.stat()
        key = (source.resolve(), status.st_mtime_ns, status.st_size, status.st_ino)
        if key not in self._staged:
            self._count += 1
            copy = self._staging / str(self._count)
            shutil.copyfile(source, copy)
            copy.chmod(0o444)
            self._staged[key] = copy
        self._staged.move_to_end(key)
        staged = self._staged[key]
        while len(self._staged) > MAX_STAGED:
            self._staged.popitem(last=False)[1].unlink()
        return staged

    def remove(self) -> None:
        """Remove everything, whatever modes a candidate may have left."""
        remove_tree(self.path)


class WorkFolder:
    """The working folder of one launch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Held from the start: by name, a candidate could put another folder in its place.
        self._out = os.open(path / "out", _FOLDER)

    def collect(
        self, names: Iterable[str], destination: Path, max_bytes: int, owner: int | None
    ) -> dict[str, str]:
        """Copy plain files out of `out/`; return why each name that could not be taken was not.

        Args:
            max_bytes: of all files together, holes counted as if they were written.
            owner: the user who must own a file; None for any. A link to another's file is so
                refused.
        """
        refused: dict[str, str] = {}
        destination.mkdir(parents=True, exist_ok=True)
        left = max_bytes
        for name in names:
            try:
                left -= self._copy(plain_name(name), destination / name, left, owner)
            except (OSError, ValueError) as error:
                refused[name] = getattr(error, "strerror", None) or str(error)
        return refused

    def _copy(self, name: str, target: Path, max_bytes: int, owner: int | None) -> int:
        # O_NONBLOCK keeps a named pipe without a writer from holding us for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=self._out)
        with open(descriptor, "rb") as source:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("is not a plain file")
            if owner is not None and status.st_uid != owner:
                raise ValueError("belongs to another user")
            if status.st_size > max_bytes:
                raise ValueError(f"has {status.st_size} bytes where {max_bytes} may be taken")
            left = status.st_size
            with target.open("wb") as sink:
                while left and (chunk := source.read(min(left, 1 << 20))):
                    sink.write(chunk)
                    left -= len(chunk)
        if left:
            target.unlink()
            raise ValueError("changed while it was copied")
        return status.st_size

    def remove(self) -> None:
        """Remove the folder, whatever modes a candidate may have left."""
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        remove_tree(self.path)


def plain_name(name: str) -> str:
    """Return a name that can only mean a file right in a folder.

    Raises:
        ValueError: it can mean something else.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(name.encode()) > 255:
        raise ValueError("is not a plain file name")
    return name


def remove_tree(path: Path) -> None:
    """Remove a folder, if it is there, and all below it; links themselves, not what they point to.

    Works however deep a candidate nested its folders: it steps from one to the next, so that
    neither a path nor a recursion grows with the depth.

    Raises:
        OSError: something in it cannot be removed.
    """
    if not path.is_dir():
        return
    path.chmod(0o700)
    here = os.open(path, _FOLDER)
    names: list[str] = []
    pending = [_remove_files(here)]  # at each level, the folders that are still to be removed
    while pending:
        if pending[-1]:
            names.append(pending[-1].pop())
            os.chmod(names[-1], 0o700, dir_fd=here)
            here = _step(here, names[-1])
            pending.append(_remove_files(here))
        else:
            pending.pop()
            if names:
                here = _step(here, "..")
                os.rmdir(names.pop(), dir_fd=here)
    os.close(here)
    path.rmdir()


def remove_left_behind(uid: int, folders: Iterable[Path]) -> None:
    """Remove what lies right in shared folders and belongs to a user of whom no process is left."""
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in list(entries):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid != uid:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        remove_tree(Path(entry.path))
                    else:
                        os.unlink(entry.path)


def _step(here: int, name: str) -> int:
    there = os.open(name, _FOLDER, dir_fd=here)
    os.close(here)
    return there


def _remove_files(folder: int) -> list[str]:
    """Remove all that is no folder, and return the names of those that are."""
    with os.scandir(folder) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in listed:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in listed if is_folder]
