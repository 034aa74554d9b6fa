"""The prepared folder: its layout, its meta.json, and whether it is still what was written.

Reads: a prepared folder.
Writes: a prepared folder, once, under a temporary name that is then renamed.
Never: changes a folder in place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from darwin_exp.individual import DataSpec

SPLITS = ("train", "val", "gate", "test")
TEMPORARY_PREFIX = ".building-"
HASH_AT_MOST_BYTES = 200_000_000  # beyond this, opening a set compares sizes only

Tokens = npt.NDArray[np.uint16]


class DataError(Exception):
    """A data set cannot be had as asked; one line names the key or file and the cure."""


class DataUnavailable(DataError):
    """A package that a data set needs could not be fetched; it may well succeed later."""


@dataclass(frozen=True)
class SplitMeta:
    """What is known of one split.

    Attributes:
        tokens: number of token ids in its file.
        bytes: UTF-8 bytes of its text, the denominator of bits per byte.
        sha256: hash of its file.
        removed_blocks: text blocks left out because an earlier split holds them too.
        removed_bytes: their UTF-8 bytes.
        overlap_with_train: share of its 13-word grams that also stand in train; None for
            train itself and for a split of fewer than 13 words.
    """

    tokens: int
    bytes: int
    sha256: str
    removed_blocks: int = 0
    removed_bytes: int = 0
    overlap_with_train: float | None = None


@dataclass(frozen=True)
class Meta:
    """The content of meta.json.

    Attributes:
        vocabulary: the characters in order of token id; None for other tokenizers.
        content_hash: hash over tokens, splits and vocabulary.
        source: where the text came from and its hash.
        files: size and hash of every other file in the folder, by relative path.
    """

    name: str
    tokenizer: str
    vocabulary: list[str] | None
    vocab_size: int
    token_bytes: int
    splits: Mapping[str, SplitMeta]
    content_hash: str
    source: Mapping[str, Any]
    dedup_blocks: bool = True
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def spec(self, folder: Path) -> DataSpec:
        """Return what the harness is told of this set."""
        return DataSpec(folder, self.content_hash, self.vocab_size, self.token_bytes)


def file_of(split: str) -> str:
    """Return the path of a split's token file, relative to the prepared folder."""
    return "train.bin" if split == "train" else f"held_out/{split}.bin"


def content_hash(
    tokenizer: str, vocabulary: Sequence[str] | None, splits: Mapping[str, SplitMeta]
) -> str:
    """Hash what a model's score depends on: tokens, how they were split, and what they mean."""
    content = [tokenizer, vocabulary, [(name, splits[name].sha256) for name in SPLITS]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_folder(
    target: Path, meta: Meta, tokens: Mapping[str, Tokens], byte_lengths: Tokens
) -> Meta:
    """Write a prepared folder so that it is either complete or not there; return its final meta.

    Raises:
        OSError: the disk is full or not writable; nothing is left behind.
    """
    building = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    try:
        building.chmod(0o755)
        (building / "held_out").mkdir(mode=0o700)
        for split in SPLITS:
            (building / file_of(split)).write_bytes(tokens[split].astype("<u2").tobytes())
        np.save(building / "token_byte_lengths.npy", byte_lengths)
        names = [file_of(split) for split in SPLITS] + ["token_byte_lengths.npy"]
        files = {name: _facts_of(building / name) for name in names}
        content = json.dumps(asdict(meta) | {"files": files}, indent=1, sort_keys=True)
        (building / "meta.json").write_text(content + "\n", encoding="utf-8")
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return read_meta(target)


def _facts_of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def read_meta(folder: Path) -> Meta:
    """Read the meta.json of a prepared folder.

    Raises:
        DataError: it is missing or is not what `prepare` writes.
    """
    path = folder / "meta.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: SplitMeta(**content["splits"][name]) for name in SPLITS}
        return Meta(**(content | {"splits": splits}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is missing or damaged; {_cure(folder)}") from error


def verify(spec: DataSpec) -> None:
    """Check that a prepared folder still is what its meta.json and the given spec say.

    Raises:
        DataError: a file is missing, of another size or content, or the set is another one.
    """
    meta = read_meta(spec.folder)
    by_content = sum(facts["bytes"] for facts in meta.files.values()) <= HASH_AT_MOST_BYTES
    for name, expected in meta.files.items():
        path = spec.folder / name
        try:
            intact = path.stat().st_size == expected["bytes"]
            if intact and by_content:
                intact = _facts_of(path) == dict(expected)
        except OSError:
            intact = False
        if not intact:
            raise DataError(f"{path} is missing or damaged; {_cure(spec.folder)}")
    if content_hash(meta.tokenizer, meta.vocabulary, meta.splits) != meta.content_hash:
        raise DataError(f"{spec.folder / 'meta.json'} is damaged; {_cure(spec.folder)}")
    if meta.spec(spec.folder) != replace(spec, extra_train=()):
        raise DataError(
            f"{spec.folder} holds another data set ({meta.content_hash[:12]}) than the one asked "
            f"for ({spec.content_hash[:12]}); prepare the data again"
        )


def _cure(folder: Path) -> str:
    return f"delete the folder {folder} and prepare the data again"
