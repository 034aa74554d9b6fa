"""The checkpoint reader accepts what safetensors writes and nothing that lies about itself."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darwin_exp.evaluation.checkpoint import (
    CheckpointRefused,
    check_finite,
    read_arguments,
    read_checkpoint,
)
from darwin_exp.individual import Reason

MAX_BYTES = 1 << 20
LAW = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80
)


def write(path: Path, header: Any, data: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path, max_bytes: int = MAX_BYTES) -> CheckpointRefused:
    with pytest.raises(CheckpointRefused) as refused:
        check_finite(read_checkpoint(path, max_bytes))
    return refused.value


@LAW
@given(
    shapes=st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,8}(\.[a-z0-9]{1,6}){0,3}", fullmatch=True),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=4),
            st.sampled_from(["f4", "f2", "f8", "i8", "i4", "u1", "?"]),
        ),
        max_size=8,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_whatever_safetensors_writes_is_read_alike(
    tmp_path: Path, shapes: Mapping[str, tuple[list[int], str]], metadata: dict[str, str]
) -> None:
    from safetensors.numpy import save_file

    tensors = {name: np.zeros(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata or None)
    found = read_checkpoint(path, MAX_BYTES)
    check_finite(found)
    assert {name: t.shape for name, t in found.tensors.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert found.n_bytes == path.stat().st_size
    assert found.n_parameters == sum(t.size for t in tensors.values() if t.dtype.kind == "f")


@LAW
@given(data=st.data())
def test_b22_a_garbled_checkpoint_is_refused_or_still_true(
    tmp_path: Path, data: st.DataObject
) -> None:
    """No garbling raises anything but a refusal; what is accepted safetensors reads the same."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.ones((3, 4), "f4"), "b": np.arange(5), "c": np.ones(2, "f2")}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[],:"0123456789-')))
    raw = raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))]
    raw += data.draw(st.just(b"") | st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        found = read_checkpoint(path, MAX_BYTES)
        check_finite(found)
    except CheckpointRefused:
        return
    try:
        theirs = load_file(path)
    except SafetensorError:
        return  # it may be stricter still, on alignment for one
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in theirs.items()}


@LAW
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
        ),
        max_leaves=12,
    )
)
def test_b22_any_json_in_the_place_of_a_header_is_refused_in_words(
    tmp_path: Path, header: Any
) -> None:
    path = write(tmp_path / "model.safetensors", header, b"some data")
    assert refusal(path).reason in (Reason.ARTEFACT, Reason.NO_CHECKPOINT)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry("F32", [2], 0, 4)}, b"0000", "claims shape"),
        ({"a": entry("F32", [10**12], 0, 4 * 10**12)}, b"0000", "claims more than"),
        ({"a": entry("F32", [1 << 47] * 16, 0, 4)}, b"0000", "claims shape"),
        ({"a": entry("F32", [-1], 0, 4)}, b"0000", "no proper shape"),
        ({"a": entry("F32", [True], 0, 4)}, b"0000", "no proper shape"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"0000", "no proper shape"),
        ({"a": entry("F32", [1], 4, 0)}, b"0000", "claims shape"),
        ({"a": entry("F8_E5M2", [4], 0, 4)}, b"0000", "number type"),
        ({"a": {**entry("F32", [1], 0, 4), "more": 1}}, b"0000", "must have"),
        ({"../a": entry("F32", [1], 0, 4), "a b": entry("F32", [1], 4, 8)}, b"0" * 8, "plain"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, b"0" * 6, "overlaps"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, b"0" * 12, "gap"),
        ({"a": entry("F32", [1], 0, 4)}, b"0000 and more", "follow the last tensor"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        ([], b"", "no JSON object"),
        (b'{"a": NaN}', b"", "NaN is no JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[" * 100_000, b"", ""),
        (b"\xff\xfe", b"", ""),
        (b'{"a": ' + b"9" * 5_000 + b"}", b"", ""),
    ],
)
def test_b22_a_header_that_lies_is_refused(
    tmp_path: Path, header: Any, data: bytes, words: str
) -> None:
    found = refusal(write(tmp_path / "model.safetensors", header, data))
    assert found.reason is Reason.ARTEFACT
    assert words in str(found)


def test_b22_a_header_of_a_claimed_exabyte_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert refusal(path).reason is Reason.ARTEFACT


@pytest.mark.parametrize("n_kept", [0, 7, 8, 40, -1])
def test_c9_a_truncated_checkpoint_is_no_checkpoint(tmp_path: Path, n_kept: int) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry("F32", [4], 0, 16)}, b"\0" * 16)
    path.write_bytes(path.read_bytes()[:n_kept])
    assert refusal(path).reason is Reason.NO_CHECKPOINT


def test_c9_a_missing_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.safetensors").reason is Reason.NO_CHECKPOINT


def test_b21_a_pickle_is_not_read_as_weights(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    assert refusal(path).reason is Reason.ARTEFACT


def test_c1_links_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    target = write(tmp_path / "real", {}, b"")
    link, pipe, folder = (tmp_path / name for name in ("link", "pipe", "folder"))
    link.symlink_to(target)
    os.mkfifo(pipe)
    folder.mkdir()
    assert {refusal(path).reason for path in (link, pipe, folder)} == {Reason.ARTEFACT}


def test_c3_a_huge_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {}, b"")
    os.truncate(path, 1 << 40)
    assert "are allowed" in str(refusal(path))


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_b16_weights_that_are_not_finite_are_found_in_every_number_type(
    tmp_path: Path, kind: str, value: str
) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    dtype = getattr(torch, kind)
    weights = torch.full((300_001,), torch.finfo(dtype).max, dtype=dtype)
    save_file({"head": torch.ones(3), "last": weights}, path)
    check_finite(read_checkpoint(path, 1 << 30))
    weights[-1] = float(value)
    save_file({"head": torch.ones(3), "last": weights}, path)
    found = refusal(path, 1 << 30)
    assert found.reason is Reason.NONFINITE
    assert "last" in str(found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.NO_CHECKPOINT),
        ('{"width": 12', Reason.NO_CHECKPOINT),
        ("[1]", Reason.ARTEFACT),
        ('{"a": 1, "a": 2}', Reason.ARTEFACT),
        ('{"a": "' + "x" * (1 << 20) + '"}', Reason.ARTEFACT),
        ('{"a": ' + "[" * 100_000, Reason.ARTEFACT),
    ],
)
def test_arguments_that_are_no_object_are_refused(
    tmp_path: Path, text: str, reason: Reason
) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(CheckpointRefused) as refused:
        read_arguments(path)
    assert refused.value.reason is reason


def test_arguments_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"width": 3, "kinds": ["a"], "rate": 0.5}))
    assert read_arguments(path) == {"width": 3, "kinds": ["a"], "rate": 0.5}
