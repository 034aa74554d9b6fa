"""Where approved files may go: inside the genome's tree, under names that mislead nobody.

Reads: the names of a tree and, where it lies on disk, its links.
Never: writes a file, or mends a name: whatever is odd is refused (G3).

New names hold ASCII letters, digits, "_", "-" and "." only. That leaves no room for a name that
looks like another one, for separators of other systems, or for control characters; and none for
case or compatibility forms either, which are compared with what is there.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from darwin_exp.genome import Genome

MOST_LETTERS = 200
MOST_DEPTH = 8
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)


class PathRefused(ValueError):
    """A path is not allowed; the message says which and why."""


def allowed(path: str, tree: Collection[str], root: Path | None = None) -> str:
    """Return the path if a file may be written there.

    Args:
        path: relative to the genome's tree, as it was asked for.
        tree: the paths of the files that are there. One of them may be named exactly as it is.
        root: the folder that holds the tree, where it lies on disk: no part of the path may then
            be a symbolic link.

    Raises:
        PathRefused: it is absolute, leaves the tree, is no plain name, is the twin of another one,
            goes through a file or a link, or is nothing that a genome holds.
    """
    if path not in tree:
        _refuse_odd_names(path)
        _refuse_twins(path, tree)
        _refuse_what_no_genome_holds(path)
    if root is not None:
        _refuse_links(path, root)
    return path


def all_allowed(
    paths: Iterable[str], tree: Collection[str], root: Path | None = None
) -> tuple[str, ...]:
    """Return the paths if files may be written at all of them; they may not be twins either.

    Raises:
        PathRefused: one of them is not allowed beside the tree and those before it.
    """
    there = list(tree)
    found = []
    for path in paths:
        found.append(allowed(path, there, root))
        there.append(path)
    return tuple(found)


def _refuse_odd_names(path: str) -> None:
    if not path or len(path) > MOST_LETTERS:
        raise PathRefused(f"{path[:40]!r}: a path has 1 to {MOST_LETTERS} letters")
    if not unicodedata.is_normalized("NFC", path):
        raise PathRefused(f"{path!r}: it is not in Unicode's composed form")
    if path.startswith("/") or "\\" in path or ":" in path:
        raise PathRefused(f"{path!r}: a path is relative to the genome, with / between its parts")
    parts = path.split("/")
    if len(parts) > MOST_DEPTH:
        raise PathRefused(f"{path!r}: it is nested more than {MOST_DEPTH} folders deep")
    for part in parts:
        if part in ("", ".", ".."):
            raise PathRefused(f"{path!r}: a path has no empty parts, and none of . and ..")
        if not _PART.fullmatch(part) or part.endswith("."):
            raise PathRefused(
                f"{path!r}: {part!r} is no plain name of ASCII letters, digits, '_', '-' and '.'"
            )


def _refuse_twins(path: str, tree: Collection[str]) -> None:
    """Refuse what some file systems, or some readers, would take for something that is there."""
    known: dict[str, str] = {}
    for name in tree:
        for above in _with_folders(name):
            known.setdefault(_folded(above), above)
    files = set(tree)
    for above in _with_folders(path):
        twin = known.get(_folded(above))
        if twin is not None and twin != above:
            raise PathRefused(f"{path!r}: {above!r} reads like {twin!r}, which is there")
        if twin is not None and above == path:
            raise PathRefused(f"{path!r}: a folder of that name is there")
        if above != path and above in files:
            raise PathRefused(f"{path!r}: {above!r} is a file, and no folder")


def _with_folders(path: str) -> list[str]:
    """Return the folders that a path goes through, outermost first, and the path itself."""
    parts = path.split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _refuse_what_no_genome_holds(path: str) -> None:
    try:
        Genome.of({path: ""})
    except ValueError as error:
        raise PathRefused(f"{path!r}: it is no training code that a genome can hold") from error


def _refuse_links(path: str, root: Path) -> None:
    """Refuse a path that leads somewhere else than its name says, wherever that is."""
    expected = os.path.join(os.path.realpath(root), *path.split("/"))
    if os.path.realpath(expected) != expected:
        raise PathRefused(f"{path!r}: a symbolic link is on the way")
