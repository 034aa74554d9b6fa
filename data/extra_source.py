"""Reads the text that an approved request names, and no more than it names (G4).

Reads: plain files below the path of a request; the sources of text that data sets are made of.
Writes: nothing but the cache of what it fetched.
Never: follows a link, reads hidden or held-out files or what is no file on a disk, takes a path
that could mean another place elsewhere, or cuts a text that is too long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import sources
from data.download import OFFLINE_VARIABLE
from data.prepared_folder import DataError, DataUnavailable

EXTRA_SOURCES = ("shakespeare", "textdir", "stdlib", "huggingface")
MOST_FILES = 20_000  # and folders, of an approved folder
_WITHOUT_PATH = ("shakespeare", "stdlib")
_NOT_ON_A_DISK = ("/proc", "/sys", "/dev")  # what they hold has no size, and is the machine's own
_HUB_SECONDS = 30.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The datasets library reads paths as patterns, and lets a card lead to files anywhere.
_PATTERNS = re.compile(r"[*?\[$]|::")
_CARD = "README.md"
_HUB_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
# The same do these, where they lie on top.
_NO_HUB_FILES = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Approved:
    """A text as a person has approved it.

    Attributes:
        source: one of `EXTRA_SOURCES`.
        path: textdir: a file or folder, told from the root; huggingface: such a path, or a name of
            the hub such as owner/name; of the others, which have but one text, their own name or
            "-".
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
    _refuse_impossible(approved)
    facts: dict[str, Any] = {}
    place: Path | None = None
    if approved.source in _WITHOUT_PATH:
        if approved.path not in (approved.source, "-"):
            raise DataError(
                f"extra text: {approved.source} is one text, and {approved.path!r} names no part "
                f'of it; write "path": "{approved.source}"'
            )
    elif approved.source == "huggingface" and _HUB_NAME.fullmatch(approved.path):
        revision = _hub_revision(approved)
        facts = {"path": approved.path, "revision": revision}
        place = _fetched(approved.path, revision, cache / "hub")
    else:
        place = _path(approved)
        _files(approved, place)
    try:
        source = _source_of(approved.source, place, cache, announce)
        text = source.read()
    except DataUnavailable:
        raise
    except DataError as error:
        raise DataError(f"extra text: {str(error).removeprefix('dataset.path: ')}") from error
    _check_size(len(text.encode()), approved)
    return text, {**source.facts, **facts, "sha256": source.sha256}


def _refuse_impossible(approved: Approved) -> None:
    if approved.source not in EXTRA_SOURCES:
        known = ", ".join(EXTRA_SOURCES)
        raise DataError(f"extra text: the source {approved.source!r} is unknown; use {known}")
    if approved.most_mb <= 0:
        raise DataError(f"extra text: most_mb is {approved.most_mb}; make it at least 1")


def _source_of(
    name: str, place: Path | None, cache: Path, announce: Callable[[str], None]
) -> sources.Source:
    if name == "shakespeare":
        return sources.shakespeare(cache, announce)
    if name == "stdlib":
        return sources.stdlib()
    if name == "textdir":
        return sources.textdir(place)
    return sources.huggingface(place, {}, cache)


def _check_size(n_bytes: int, approved: Approved) -> None:
    if n_bytes > approved.most_mb << 20:
        raise DataError(
            f"extra text: {approved.path} has {n_bytes / (1 << 20):,.1f} MB, more than the "
            f"{approved.most_mb} MB that were approved; nothing of it is taken"
        )


# --- files ------------------------------------------------------------------------------------


def _path(approved: Approved) -> Path:
    """Return the place that was approved, after checking that it can be no other one."""
    said = approved.path
    path = Path(said)
    try:
        real = _real(path)
        there = path.is_file() or path.is_dir()
    except OSError as error:
        raise _unreadable(error) from error
    except ValueError as error:  # a NUL, or what no name of a file can hold
        raise DataError(f"extra text: {said!r} is no path ({error}); write another") from error
    if not said.isprintable():
        raise DataError(f"extra text: {said!r} holds what cannot be seen; write the path without")
    if path.root != "/":  # "//" is the root as well, and would stand in no forbidden folder
        raise DataError(
            f"extra text: {said} means another place to everybody who reads it; say it from the "
            "root, such as /home/me/texts"
        )
    if real != path:
        raise DataError(
            f"extra text: {path} leads over a link or over ..; name the place itself, {real}, so "
            "that what is approved is what is read"
        )
    if any(part.startswith(".") for part in path.parts):
        raise DataError(
            f"extra text: {path} is hidden, and what is hidden is never read as training text; "
            "put the text elsewhere"
        )
    if approved.source == "huggingface" and _PATTERNS.search(said):
        raise DataError(
            f"extra text: {path} could be read as a pattern; name it without *, ?, [, $ and ::"
        )
    if not there:
        raise DataError(f"extra text: {path} is no file or folder that exists")
    return path


def _files(approved: Approved, place: Path) -> list[Path]:
    """Return the files that would be read of a place, after looking at all that is there."""
    forbidden = [*map(Path, _NOT_ON_A_DISK), *map(_real, approved.forbidden)]
    _refuse_forbidden(place, forbidden)
    try:
        if place.is_file():
            files = [place]
        else:
            plain = (
                found for found in _below(place) if _is_plain(found, approved.source, forbidden)
            )
            files = [one for one in plain if approved.source != "textdir" or one.suffix == ".txt"]
        n_bytes = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise _unreadable(error) from error
    _check_size(n_bytes, approved)
    return files


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # which, unlike Path.resolve, a loop of links cannot upset


def _below(folder: Path) -> Iterator[Path]:
    n_found = 0

    def refuse(error: OSError) -> None:
        raise error

    for top, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        for name in sorted([*folders, *files]):
            n_found += 1
            if n_found > MOST_FILES:
                raise DataError(
                    f"extra text: {folder} holds more than {MOST_FILES:,} files and folders; "
                    "name a smaller one"
                )
            yield Path(top, name)


def _is_plain(found: Path, source: str, forbidden: Sequence[Path]) -> bool:
    """Say whether this is a file, and refuse what is neither that nor a folder in plain view."""
    if found.is_symlink():
        raise DataError(f"extra text: {found} is a link; put the text itself there")
    _refuse_forbidden(found, forbidden)
    if found.name.startswith("."):
        raise DataError(f"extra text: {found} is hidden; name a folder that holds nothing hidden")
    if source == "huggingface" and found.name == _CARD:
        raise DataError(
            f"extra text: {found} can lead to files elsewhere; name a folder of data files alone"
        )
    if found.is_dir():
        return False
    if not found.is_file():
        raise DataError(f"extra text: {found} is no plain file; name a folder without such")
    return True


def _refuse_forbidden(real: Path, forbidden: Sequence[Path]) -> None:
    for folder in forbidden:
        if real.is_relative_to(folder):
            raise DataError(
                f"extra text: {real} lies in {folder}, of which nothing is ever read as training "
                "text; name another place"
            )


def _unreadable(error: OSError) -> DataError:
    return DataError(
        f"extra text: {error.filename} cannot be read ({error.strerror}); make it readable"
    )


# --- the hub ----------------------------------------------------------------------------------


def _hub_revision(approved: Approved) -> str:
    """Ask the hub how large a set is and which version, so that nothing too large is fetched."""
    name = approved.path
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        raise DataUnavailable(
            f"extra text: {name} is a set of the hub (files are told from the root), and "
            f"{OFFLINE_VARIABLE}=1 forbids the network"
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
        raise _not_to_be_had(name, error) from error
    sizes = [file.size for file in found.siblings or ()]
    if not sizes or None in sizes:
        raise DataError(
            f"extra text: the hub does not say how large {name} is; fetch it by hand, and name "
            "the folder"
        )
    _check_size(sum(size or 0 for size in sizes), approved)
    if not _COMMIT.fullmatch(found.sha or ""):
        raise DataError(
            f"extra text: the hub does not say which version of {name} it has; fetch it by hand, "
            "and name the folder"
        )
    if not any(file.rfilename.endswith(_HUB_FILES) for file in found.siblings or ()):
        known = ", ".join(_HUB_FILES)
        raise DataError(f"extra text: {name} holds no file of {known}; name another set")
    return str(found.sha)


def _fetched(name: str, revision: str, folder: Path) -> Path:
    """Fetch the data files of that very version, without what could lead to other files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    place = folder / f"{name.replace('/', '--')}-{revision}"
    try:
        snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            local_dir=place,
            allow_patterns=[f"*{suffix}" for suffix in _HUB_FILES],
            ignore_patterns=list(_NO_HUB_FILES),
            endpoint=os.environ.get("HF_ENDPOINT"),
            etag_timeout=_HUB_SECONDS,
        )
    except Exception as error:  # as above
        raise _not_to_be_had(name, error) from error
    return place


def _not_to_be_had(name: str, error: Exception) -> DataUnavailable:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return DataUnavailable(f"extra text: {name} is not to be had from the hub: {said[0]}")
