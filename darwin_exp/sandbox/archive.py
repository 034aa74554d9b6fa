"""Files out of a container: the engine sends one of them, or a whole folder, as an archive.

A candidate chooses what lies in a folder of its own. So the archive of one is read only as long as
it looks like an honest candidate's: a few plain files. What else is in it is not waited for.

Reads: what the engine sends, as it comes.
Writes: the files that were asked for.
Never: follows or makes anything but a plain file of the size and name that were announced.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 18
MAX_STRAYS, MAX_STRAY_BYTES = 64, 4 << 20  # what nobody asked for, and is read past for the rest

# What the mode of a file can say besides "plain": folder, link, device, pipe, socket, character
# device, irregular. Source: the documentation of Go's io/fs.FileMode, which the engine sends.
_FOLDER = 1 << 31
_NOT_PLAIN = _FOLDER | 1 << 27 | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19
_PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Surprise(Exception):
    """What was sent is not what was announced."""


class Untidy(Exception):
    """A folder holds too much, or something else than plain files, to be taken at one go."""


def announced_size(announcement: str, max_bytes: int) -> int:
    """Return the size of a file from what the engine says of it before it sends it.

    Args:
        announcement: the header in which it says so.

    Raises:
        ValueError: it is no plain file, or too long; holes count as if they were written.
        Surprise: it does not say.
    """
    mode, size = _announced(announcement)
    if mode & _NOT_PLAIN:
        raise ValueError("is not a plain file")
    if size > max_bytes:
        raise ValueError(f"has {size} bytes where {max_bytes} may be taken")
    return size


def is_folder(announcement: str) -> bool:
    """Say whether the engine means to send a folder, and no link to one.

    Raises:
        Surprise: it does not say.
    """
    return _announced(announcement)[0] & _NOT_PLAIN == _FOLDER


def _announced(announcement: str) -> tuple[int, int]:
    try:
        status = json.loads(base64.b64decode(announcement))
        return int(status["mode"]), int(status["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise Surprise from error


def unpack(chunks: Iterator[bytes], name: str, size: int, target: Path) -> None:
    """Write the only file of an archive; where that fails, nothing is left of it.

    Raises:
        Surprise: the archive holds something else.
        OSError: the target cannot be written.
    """
    try:
        _unpack(chunks, name, size, target)
    except tarfile.TarError as error:
        target.unlink(missing_ok=True)
        raise Surprise from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _unpack(chunks: Iterator[bytes], name: str, size: int, target: Path) -> None:
    with _opened(chunks) as archive:
        member = archive.next()
        if member is None or (member.name, member.size) != (name, size):
            raise Surprise
        if member.type not in _PLAIN_TYPES:
            raise Surprise
        _write(archive, member, target)
        if archive.next() is not None:
            raise Surprise


def unpack_folder(
    chunks: Iterator[bytes],
    folder: str,
    wanted: frozenset[str],
    max_bytes: int,
    destination: Path,
) -> dict[str, int]:
    """Write the wanted files of an archive of a folder, as far as they are there; return sizes.

    It is read up to the last of them, or to its end. Where that fails, nothing is left of any.

    Args:
        folder: the last part of its path, with which the names of all members begin.
        wanted: names of files right in the folder.
        max_bytes: of all wanted files together; holes count as if they were written.

    Raises:
        Untidy: so far it held more than a few small files that nobody asked for, or something
            that is no plain file, or wanted files that are too long together; or it broke off.
        OSError: a target cannot be written.
    """
    taken: dict[str, int] = {}
    try:
        with _opened(chunks) as archive:
            strays, stray_bytes, left = 0, 0, max_bytes
            while len(taken) < len(wanted) and (member := archive.next()) is not None:
                place, _, name = member.name.rpartition("/")
                if member.name == folder and member.isdir():
                    strays += 1
                elif member.type not in _PLAIN_TYPES or place != folder or name in taken:
                    raise Untidy
                elif name not in wanted:
                    strays, stray_bytes = strays + 1, stray_bytes + member.size
                elif member.size > left:
                    raise Untidy
                else:
                    left -= member.size
                    taken[name] = member.size
                    _write(archive, member, destination / name)
                # Here is still time: a stray is read only when the next member is asked for.
                if strays > MAX_STRAYS or stray_bytes > MAX_STRAY_BYTES:
                    raise Untidy
    except BaseException as error:
        for name in taken:
            (destination / name).unlink(missing_ok=True)
        if isinstance(error, tarfile.TarError | Surprise):
            raise Untidy from error
        raise
    return taken


def _opened(chunks: Iterator[bytes]) -> tarfile.TarFile:
    body = io.BufferedReader(_Body(chunks), CHUNK_BYTES)
    return tarfile.open(fileobj=body, mode="r|", bufsize=CHUNK_BYTES)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise Surprise
    with target.open("wb") as sink:
        shutil.copyfileobj(source, sink, CHUNK_BYTES)
        if sink.tell() != member.size:
            raise Surprise


class _Body(io.RawIOBase):
    """Chunks of bytes as a file to be read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n
