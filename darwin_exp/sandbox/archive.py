"""One file out of a container: the engine sends it as an archive that holds nothing else.

Reads: what the engine sends, as it comes.
Writes: one file.
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

# What the mode of a file can say besides "plain": folder, link, device, pipe, socket, character
# device, irregular. Source: the documentation of Go's io/fs.FileMode, which the engine sends.
_NOT_PLAIN = 1 << 31 | 1 << 27 | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19


class Surprise(Exception):
    """What was sent is not what was announced."""


def announced_size(announcement: str, max_bytes: int) -> int:
    """Return the size of a file from what the engine says of it before it sends it.

    Args:
        announcement: the header in which it says so.

    Raises:
        ValueError: it is no plain file, or too long; holes count as if they were written.
        Surprise: it does not say.
    """
    try:
        status = json.loads(base64.b64decode(announcement))
        mode, size = int(status["mode"]), int(status["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise Surprise from error
    if mode & _NOT_PLAIN:
        raise ValueError("is not a plain file")
    if size > max_bytes:
        raise ValueError(f"has {size} bytes where {max_bytes} may be taken")
    return size


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
    body = io.BufferedReader(_Body(chunks), CHUNK_BYTES)
    with tarfile.open(fileobj=body, mode="r|", bufsize=CHUNK_BYTES) as archive:
        member = archive.next()
        if member is None or (member.name, member.size) != (name, size):
            raise Surprise
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        source = archive.extractfile(member) if plain else None
        if source is None:
            raise Surprise
        with target.open("wb") as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
            if sink.tell() != size:
                raise Surprise
        if archive.next() is not None:
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
