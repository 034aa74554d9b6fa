"""Wishes: what the content of a request asks for, told exactly enough to be carried out.

Reads: the content that a person approved, letter by letter.
Never: guesses what was meant. What is not exact is refused, and a person can answer with a change
that is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from darwin_exp.genome import Genome
from darwin_exp.hitl.asked import Refused, RequestType
from darwin_exp.hitl.paths import PathRefused, all_allowed

MOST_DATASET_MB = 2_048
# The most that may be asked for: a week, and more memory than any machine has.
RESOURCES = {"budget_seconds": 604_800, "max_steps": 10_000_000, "memory_mb": 4_194_304}
_WHOLE = frozenset({"max_steps", "memory_mb"})

# How each kind is told; people and language models read it.
FORMS: Mapping[RequestType, str] = {
    RequestType.DATASET: '{"source": ..., "path": ..., "licence": ..., "most_mb": ...}',
    RequestType.SCRIPT: '{"path": "name.py", "text": "..."}',
    RequestType.FILE_STRUCTURE: (
        '{"moves": {"old.py": "new.py"}, "files": {"a.py": "whole text"}, "removes": ["b.py"]}'
    ),
    RequestType.LIBRARY: '{"requirement": "name==1.2.3"}',
    RequestType.RESOURCES: '{"key": "budget_seconds", "value": 24}',
    RequestType.BUDGET: '{"key": "llm.max_usd", "value": 10}',
}


@dataclass(frozen=True)
class DatasetWish:
    """An additional training text, told exactly enough to be fetched (G4).

    It is training text and nothing else: val, gate and test cannot be named, let alone replaced.

    Attributes:
        source: a way of getting text that the configuration allows, such as textdir.
        path: which one: a folder, a file, or a name of the source's.
        licence: under which the text may be used, in words; it is kept with the data.
        most_mb: how large the text may be.
    """

    source: str
    path: str
    licence: str
    most_mb: int

    @classmethod
    def read(cls, content: str, sources: Collection[str]) -> DatasetWish:
        """Read the content of an approved request.

        Args:
            sources: what `hitl.dataset_sources` allows.

        Raises:
            Refused: it is not exact, its source is not allowed, or it is too large.
        """
        told = _object(RequestType.DATASET, content, {"source", "path", "licence", "most_mb"})
        words = {name: _text(told, name) for name in ("source", "path", "licence")}
        most = told["most_mb"]
        if type(most) is not int or not 0 < most <= MOST_DATASET_MB:
            raise Refused(f'"most_mb" is a whole number up to {MOST_DATASET_MB:,}')
        if words["source"] not in sources:
            allowed = ", ".join(sorted(sources)) or "none"
            raise Refused(f"the source {words['source']!r} is not allowed; allowed: {allowed}")
        return cls(**words, most_mb=most)


@dataclass(frozen=True)
class TreeWish:
    """Files of a genome that shall come, go or be called otherwise.

    Attributes:
        files: whole texts by path.
        moves: new paths by old ones.
        removes: paths.
        is_script: whether it may only add a file.
    """

    files: Mapping[str, str]
    moves: Mapping[str, str]
    removes: tuple[str, ...]
    is_script: bool = False

    @classmethod
    def read(cls, kind: RequestType, content: str) -> TreeWish:
        """Read the content of a request for a script or for another structure of files.

        Raises:
            Refused: it is not exact.
        """
        if kind is RequestType.SCRIPT:
            told = _object(kind, content, {"path", "text"})
            return cls({_text(told, "path"): _text(told, "text")}, {}, (), is_script=True)
        told = _object(kind, content, set(), may={"moves", "files", "removes"})
        files, moves = (told.get(name, {}) for name in ("files", "moves"))
        removes = told.get("removes", [])
        for name, value in (("files", files), ("moves", moves)):
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise Refused(f'"{name}" is an object whose values are texts')
        if not isinstance(removes, list) or not all(isinstance(path, str) for path in removes):
            raise Refused('"removes" is a list of paths')
        if not files and not moves and not removes:
            raise Refused("it would change nothing")
        return cls(files, moves, tuple(removes))

    def changes(self, genome: Genome) -> tuple[dict[str, str], list[str]]:
        """Return what becomes of a genome: whole texts by path, and the paths that go.

        Raises:
            Refused: a path is not there, or may not be written (G3).
        """
        tree = genome.as_dict
        if self.is_script and (there := [path for path in self.files if path in tree]):
            raise Refused(f"{there[0]!r} is there already; a script is a new file")
        gone = [*self.moves, *self.removes]
        missing = [path for path in gone if path not in tree]
        if missing:
            raise Refused(f"the agent's code has no file {missing[0]!r}")
        written = {new: tree[old] for old, new in self.moves.items()} | dict(self.files)
        if len(set(gone)) < len(gone) or len(written) < len(self.moves) + len(self.files):
            raise Refused("it names a path twice")
        left = tree.keys() - set(gone)
        overwritten = [path for path in self.moves.values() if path in left]
        if overwritten:
            raise Refused(f"{overwritten[0]!r} is there already, and a move would overwrite it")
        try:
            all_allowed(written, left)
            genome.with_files(written, [path for path in gone if path not in written])
        except (PathRefused, ValueError) as error:
            raise Refused(str(error)) from error
        return written, [path for path in gone if path not in written]


@dataclass(frozen=True)
class Setting:
    """One number that shall be another: a resource of every training."""

    key: str
    value: float | int

    @classmethod
    def read(cls, content: str) -> Setting:
        """Read the content of a request for resources.

        Raises:
            Refused: it is not exact, or no number above zero.
        """
        key, value = key_and_value(RequestType.RESOURCES, content)
        if key not in RESOURCES:
            raise Refused(f"{key} is none of {', '.join(RESOURCES)}")
        whole = type(value) is int
        if not (whole or type(value) is float) or (key in _WHOLE and not whole):
            raise Refused(f"{key} takes a {'whole ' if key in _WHOLE else ''}number, not {value!r}")
        if not 0 < value <= RESOURCES[key]:  # neither infinite nor no number, too
            raise Refused(f"{key} must be above zero and at most {RESOURCES[key]:,}")
        return cls(key, value)


def key_and_value(kind: RequestType, content: str) -> tuple[str, Any]:
    """Read the content of a request for resources or for a budget.

    Raises:
        Refused: it is not exact.
    """
    told = _object(kind, content, {"key", "value"})
    return _text(told, "key"), told["value"]


def requirement_of(content: str) -> str:
    """Read the content of a request for a library; what it may be, the image's maker decides.

    Raises:
        Refused: it is not exact.
    """
    return _text(_object(RequestType.LIBRARY, content, {"requirement"}), "requirement")


def _object(
    kind: RequestType, content: str, must: set[str], may: Collection[str] = ()
) -> dict[str, Any]:
    exactly = f"a {kind.value.replace('_', ' ')} is told exactly as {FORMS[kind]}"
    try:
        told = json.loads(content, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise Refused(exactly) from error
    if not isinstance(told, dict) or not must <= told.keys() <= must | set(may):
        raise Refused(f"{exactly}, with nothing more or less")
    return told


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        raise ValueError("a key stands twice")
    return told


def _text(told: Mapping[str, Any], name: str) -> str:
    value = told[name]
    if not isinstance(value, str) or not value.strip():
        raise Refused(f'"{name}" is some text')
    return value
