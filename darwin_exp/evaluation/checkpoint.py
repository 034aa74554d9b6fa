"""Reads a candidate's checkpoint without trusting a byte of it.

Reads: model.safetensors and model.json in a folder that the harness collected.
Writes: nothing.
Never: unpickles, maps a tensor before its place in the file is proven, or believes a size that
the file merely claims.

The format is safetensors: eight bytes of header length, a JSON header, then raw little-endian
tensors. This reader is narrower than the format: plain names, the number types that training
uses, tensors packed without gap or overlap, and everything bounded before it is parsed.

Source: the safetensors format description (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from darwin_exp.individual import Reason

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 50_000
MAX_ELEMENTS = 4_000_000_000
MAX_DIMENSIONS = 16
MAX_ARGUMENTS_BYTES = 1 << 20
CHUNK_BYTES = 4 << 20  # divisible by every element size below

ELEMENT_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
# A number is infinite or no number at all exactly when every bit of its exponent is set.
EXPONENT_BITS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")


class CheckpointRefused(Exception):
    """A checkpoint is not usable.

    Attributes:
        reason: NO_CHECKPOINT for a file that is missing or unfinished, ARTEFACT for one that
            breaks the format or a limit, NONFINITE for weights that are not all numbers.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it, its place in the file proven.

    Attributes:
        begin: offset of its first byte from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose header holds true.

    Attributes:
        tensors: entries by name, in the order of their bytes.
        n_bytes: size of the whole file.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    n_bytes: int

    @cached_property
    def n_parameters(self) -> int:
        """Elements of all floating-point tensors."""
        return sum(t.n_elements for t in self.tensors.values() if t.dtype in EXPONENT_BITS)


def read_checkpoint(path: Path, max_bytes: int) -> Checkpoint:
    """Read a checkpoint's header and prove that it describes the file exactly.

    Raises:
        CheckpointRefused: NO_CHECKPOINT if the file is missing, empty or shorter than its header
            says; ARTEFACT if it is no plain file, too large, or its header is not acceptable.
    """
    with _open_plain(path, max_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointRefused(Reason.NO_CHECKPOINT, f"{path.name} holds {size} bytes")
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > MAX_HEADER_BYTES:
            raise _lie(path, f"its header claims {header_bytes} bytes")
        if 8 + header_bytes > size:
            raise CheckpointRefused(Reason.NO_CHECKPOINT, f"{path.name} ends within its header")
        raw = file.read(header_bytes)
    try:
        tensors, end = _read_header(raw)
    except (ValueError, RecursionError) as error:
        raise _lie(path, str(error)[:200]) from None
    if end > size:
        missing = f"{path.name} ends {end - size} bytes early"
        raise CheckpointRefused(Reason.NO_CHECKPOINT, missing)
    if end < size:
        raise _lie(path, f"{size - end} bytes follow the last tensor")
    return Checkpoint(path, tensors, size)


def check_finite(checkpoint: Checkpoint) -> None:
    """Read every floating-point tensor once and make sure that all of it is finite.

    Raises:
        CheckpointRefused: NONFINITE with the name of the first tensor that is not.
    """
    with checkpoint.path.open("rb") as file:
        for name, tensor in checkpoint.tensors.items():
            if tensor.dtype not in EXPONENT_BITS:
                continue
            unsigned, exponent = EXPONENT_BITS[tensor.dtype]
            mask = np.dtype(unsigned).type(exponent)
            file.seek(tensor.begin)
            left = tensor.n_bytes
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointRefused(Reason.NO_CHECKPOINT, "the checkpoint shrank")
                bits = np.frombuffer(chunk, dtype=unsigned)
                if ((bits & mask) == mask).any():
                    message = f"the weights hold values that are not finite, in {name}"
                    raise CheckpointRefused(Reason.NONFINITE, message)
                left -= len(chunk)


def read_arguments(path: Path) -> dict[str, Any]:
    """Read model.json, the constructor arguments of the model.

    Raises:
        CheckpointRefused: NO_CHECKPOINT if it is missing, unfinished or not JSON, ARTEFACT if it is
            too large, no plain file or no JSON object.
    """
    with _open_plain(path, MAX_ARGUMENTS_BYTES) as file:
        raw = file.read(MAX_ARGUMENTS_BYTES + 1)
    if not raw.strip():
        raise CheckpointRefused(Reason.NO_CHECKPOINT, f"{path.name} is empty")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        message = f"{path.name} is unfinished or no JSON: {error}"
        raise CheckpointRefused(Reason.NO_CHECKPOINT, message) from None
    except (ValueError, RecursionError) as error:
        raise _lie(path, str(error)[:200]) from None
    if not isinstance(content, dict):
        raise _lie(path, "it holds no JSON object")
    return content


def _open_plain(path: Path, max_bytes: int) -> BinaryIO:
    """Open a plain file of bounded size; a link is not followed, a pipe is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointRefused(Reason.NO_CHECKPOINT, f"there is no {path.name}") from None
    except OSError as error:
        raise _lie(path, f"it cannot be opened ({error.strerror})") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _lie(path, "it is no plain file")
        raise _lie(path, f"it holds {status.st_size} bytes, and {max_bytes} are allowed")
    return os.fdopen(descriptor, "rb")


def _read_header(raw: bytes) -> tuple[dict[str, TensorEntry], int]:
    """Return the entries in file order and where the file must end; ValueError says what is off."""
    header = json.loads(
        raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
    )
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it lists {len(header)} tensors")
    entries = sorted(
        ((name, *_read_entry(name, entry)) for name, entry in header.items()),
        key=lambda item: (item[3], item[4]),
    )
    tensors: dict[str, TensorEntry] = {}
    position = elements = 0
    data = 8 + len(raw)
    for name, dtype, shape, begin, end in entries:
        tensor = TensorEntry(dtype, shape, data + begin)
        if end - begin != tensor.n_bytes:
            raise ValueError(f"{name} claims shape {shape} of {dtype} in {end - begin} bytes")
        if begin != position:
            raise ValueError(f"{name} overlaps its neighbour or leaves a gap before it")
        position = end
        elements += tensor.n_elements
        if elements > MAX_ELEMENTS:
            raise ValueError(f"it claims more than {MAX_ELEMENTS} elements")
        tensors[name] = tensor
    return tensors, data + position


def _read_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if PLAIN_NAME.fullmatch(name) is None:
        raise ValueError(f"{name[:40]!r} is no plain tensor name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"{name} has the number type {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has no proper shape")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no proper offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_sizes(value: Any) -> bool:
    # `type(...) is int` because a JSON true is an int to isinstance.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no map of text to text")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _lie(path: Path, what: str) -> CheckpointRefused:
    return CheckpointRefused(Reason.ARTEFACT, f"{path.name} is not acceptable: {what}")
