"""Reads the text that an approved request names, and no more than it names (G4).

Reads: plain files below the path of a request; the sources of text that data sets are made of.
Writes: nothing but the cache of what it fetched.
Never: follows a link out of the folder that was approved, reads held-out files or what is no file
on a disk, or cuts a text that is too long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import sources
from data.download import OFFLINE_VARIABLE
from data.prepared_folder import DataError, DataUnavailable

EXTRA_SOURCES = ("shakespeare", "textdir", "stdlib", "huggingface")
_WITHOUT_PATH = ("shakespeare", "stdlib")
_NOT_ON_A_DISK = ("/proc", "/sys", "/dev")  # what they hold has no size, and is the machine's own
_HUB_SECONDS = 30.0


@dataclass(frozen=True)
class Approved:
    """A text as a person has approved it.

    Attributes:
        source: one of `EXTRA_SOURCES`.
        path: textdir: a file or folder; huggingface: a local path or a name of the hub; of the
            others, which have but one text, their own name or "-".
        most_mb: what the text may be long, in units of 2**20 bytes.
        forbidden: folders of which nothing may be read.
    """

    source: str
    path: str
    most_mb: int
    forbidden: tuple[Path, ...] = ()


def read_approved(
    approved: Approved, cache: Path, announce: Callable[[str], None]
) -> tuple[str, Mapping[str, Any]]:
    """Return the text, cleaned as its source cleans it, and where it came from.

    Raises:
        DataError: the source is unknown, the path leads where it may not, the text is longer than
            was approved, or it cannot be read.
        DataUnavailable: it must be fetched and cannot be.
    """
    if approved.source not in EXTRA_SOURCES:
        known = ", ".join(EXTRA_SOURCES)
        raise DataError(f"extra text: the source {approved.source!r} is unknown; use {known}")
    if approved.most_mb <= 0:
        raise DataError(f"extra text: most_mb is {approved.most_mb}; make it at least 1")
    facts: dict[str, Any] = {}
    if approved.source in _WITHOUT_PATH:
        if approved.path not in (approved.source, "-"):
            raise DataError(
                f"extra text: {approved.source} is one text, and {approved.path!r} names no part "
                f'of it; write "path": "{approved.source}"'
            )
    elif approved.source == "huggingface" and not Path(approved.path).expanduser().exists():
        facts = _hub_facts(approved)
    else:
        _check_files(approved)
    try:
        source = _source_of(approved, cache, announce)
        text = source.read()
    except DataUnavailable:
        raise
    except DataError as error:
        raise DataError(f"extra text: {str(error).removeprefix('dataset.path: ')}") from error
    _check_size(len(text.encode()), approved)
    return text, {**source.facts, **facts, "sha256": source.sha256}


def _source_of(approved: Approved, cache: Path, announce: Callable[[str], None]) -> sources.Source:
    if approved.source == "shakespeare":
        return sources.shakespeare(cache, announce)
    if approved.source == "stdlib":
        return sources.stdlib()
    path = Path(approved.path)
    if approved.source == "textdir":
        return sources.textdir(path)
    return sources.huggingface(path, {}, cache)


def _check_size(n_bytes: int, approved: Approved) -> None:
    if n_bytes > approved.most_mb << 20:
        raise DataError(
            f"extra text: {approved.path} has {n_bytes / (1 << 20):,.1f} MB, more than the "
            f"{approved.most_mb} MB that were approved; nothing of it is taken"
        )


# --- files ------------------------------------------------------------------------------------


def _check_files(approved: Approved) -> None:
    """Refuse a path by what would be read below it, before anything is."""
    path = Path(approved.path).expanduser()
    if path.is_symlink():
        raise DataError(
            f"extra text: {path} is a link; name the place itself, {_real(path)}, so that what "
            "is approved is what is read"
        )
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"extra text: {path} is no file or folder that exists")
    top = _real(path)
    forbidden = [*map(Path, _NOT_ON_A_DISK), *map(_real, approved.forbidden)]
    _refuse_forbidden(top, forbidden)
    n_bytes = 0
    for file in _would_be_read(path, approved.source):
        real = _real(file)
        if not real.is_relative_to(top):
            raise DataError(
                f"extra text: {file} is a link that leads out of {path}; put the text itself there"
            )
        _refuse_forbidden(real, forbidden)
        n_bytes += file.stat().st_size if file.is_file() else 0
    _check_size(n_bytes, approved)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # which, unlike Path.resolve, a loop of links cannot upset


def _would_be_read(path: Path, source: str) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    # Of a folder, the datasets library reads whatever it knows; so any link there is looked at.
    for found in path.rglob("*.txt" if source == "textdir" else "*"):
        hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
        if not hidden and (found.is_file() or found.is_symlink()):
            yield found


def _refuse_forbidden(real: Path, forbidden: Sequence[Path]) -> None:
    for folder in forbidden:
        if real.is_relative_to(folder):
            raise DataError(
                f"extra text: {real} lies in {folder}, of which nothing is ever read as training "
                "text; name another place"
            )


# --- the hub ----------------------------------------------------------------------------------


def _hub_facts(approved: Approved) -> dict[str, Any]:
    """Ask the hub how large a set is and which version, so that nothing too large is fetched."""
    name = approved.path
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        raise DataUnavailable(
            f"extra text: {name} is not on this machine, and {OFFLINE_VARIABLE}=1 forbids the "
            "network"
        )
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DataError(
            "extra text: huggingface needs the datasets library; pip install -e .[datasets]"
        ) from error
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        found = hub.dataset_info(name, files_metadata=True, timeout=_HUB_SECONDS)
    except Exception as error:  # the library raises its own, those of its client, and ValueError
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataUnavailable(
            f"extra text: {name} is neither on this machine nor to be had from the hub: {said[0]}"
        ) from error
    sizes = [file.size for file in found.siblings or ()]
    if not sizes or None in sizes:
        raise DataError(
            f"extra text: the hub does not say how large {name} is; fetch it by hand, and name "
            "the folder"
        )
    _check_size(sum(size or 0 for size in sizes), approved)
    return {"revision": found.sha}
