"""Memory: what one generation tells the next.

Reads: lessons, and the memory files of earlier runs (the library).
Writes: memory/<run_id>/<agent>.json, for people and for later runs. They are a projection: the
same lessons give the same bytes, in whatever order they arrive.
Never: reads back the files of its own run, shows anyone a lesson of a generation that is not
complete, or lets a failure to write reach the run (it is kept in `problems`).

An agent knows the outcomes it had a part in: as the child, as the editor, or as the parent whose
code was edited. Beyond that it knows what its ancestors know, by reference to its parent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from darwin_exp.individual import Edit, Individual, Status
from darwin_exp.protocols import Lesson

VERSION = 1
SCOPES = ("lineage", "population", "library")
ELSEWHERE = "library/"  # before the names of another run's agents


class NoMemory:
    """Remembers nothing: the control that tells what memory contributes."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def learn(self, lesson: Lesson) -> None:
        """Forget a lesson at once."""

    def recall(
        self,
        parent: Individual,
        editor: Individual,
    ) -> tuple[Lesson, ...]:
        """Return nothing."""
        return ()

    def close_generation(self) -> None:
        """Do nothing."""


class JsonMemory:
    """Remembers lessons and writes what each agent knows as a JSON file.

    Lessons are shown in the order of (generation, individual_id), never of arrival, and only once
    `close_generation` was called after them. So what an editor is told does not depend on which
    of its siblings happened to finish first. Safe to call from several threads.

    Attributes:
        problems: what could not be written, one sentence each.
    """

    def __init__(
        self, folder: Path, scope: str, capacity: int, library: tuple[Lesson, ...] = ()
    ) -> None:
        """Start an empty memory; files from before are overwritten as lessons are replayed.

        Args:
            folder: memory/<run_id>; made when the first file is written.
            scope: "lineage" offers what editor and parent know, by themselves or from ancestors;
                "population" everything that this run learnt; "library" earlier runs as well.
            capacity: lessons offered at a time; the oldest are left out first.
            library: a snapshot of earlier runs' lessons, used where scope is "library".

        Raises:
            ValueError: scope is unknown, or capacity is below 1.
        """
        if scope not in SCOPES:
            raise ValueError(f"memory.scope must be one of {', '.join(SCOPES)}, not {scope!r}")
        if capacity < 1:
            raise ValueError(
                f"memory.capacity must be at least 1, not {capacity}; memory=off switches it off"
            )
        self.problems: list[str] = []
        self._folder = folder
        self._scope = scope
        self._capacity = capacity
        # Agents of all runs have the same names, and nobody here had a part in those.
        self._library = tuple(map(_of_another_run, library)) if scope == "library" else ()
        self._visible: dict[str, Lesson] = {}
        self._learnt: dict[str, Lesson] = {}  # all of it, the generation under way included
        self._entries: dict[str, dict[str, Lesson]] = {}  # by agent, then by individual
        self._lock = Lock()

    def learn(self, lesson: Lesson) -> None:
        """Take in an outcome and rewrite the files of the agents who had a part in it.

        A lesson on an individual that is known already replaces the earlier one.
        """
        with self._lock:
            self._learnt[lesson.individual_id] = lesson
            for agent in sorted(_who_knows(lesson)):
                self._entries.setdefault(agent, {})[lesson.individual_id] = lesson
                self._write(agent)

    def recall(self, parent: Individual, editor: Individual) -> tuple[Lesson, ...]:
        """Return what the editor may use when it edits this parent, oldest first."""
        with self._lock:
            lessons = list(self._visible.values())
            if self._scope == "lineage":
                line = self._lineage(parent.individual_id) | self._lineage(editor.individual_id)
                lessons = [lesson for lesson in lessons if line & _who_knows(lesson)]
        return (*self._library, *sorted(lessons, key=_age))[-self._capacity :]

    def close_generation(self) -> None:
        """Make all that was learnt so far visible to `recall`; call it between generations."""
        with self._lock:
            self._visible = dict(self._learnt)

    def _lineage(self, individual_id: str) -> set[str]:
        """Return the individual and its ancestors, as far as lessons tell them."""
        line: set[str] = set()
        while individual_id not in line:
            line.add(individual_id)
            if (birth := self._visible.get(individual_id)) is None:
                break
            individual_id = birth.parent_id
        return line

    def _write(self, agent: str) -> None:
        birth = self._learnt.get(agent)
        entries = sorted(self._entries[agent].values(), key=_age)
        draft = self._folder / f".{agent}.json.draft"
        try:
            content = {
                "version": VERSION,
                "agent": agent,
                "inherits": None if birth is None else birth.parent_id,
                "entries": [_to_entry(lesson) for lesson in entries],
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(_to_bytes(content))
            os.replace(draft, self._folder / f"{agent}.json")
        except (OSError, TypeError, ValueError) as error:
            with suppress(OSError, ValueError):
                draft.unlink(missing_ok=True)
            problem = f"memory of {agent} was not written to {self._folder}: {error}"
            if problem not in self.problems:
                self.problems.append(problem)


def load_library(root: Path, exclude: str, problems: list[str] | None = None) -> tuple[Lesson, ...]:
    """Read what earlier runs learnt, ordered by run, generation and individual.

    Args:
        root: the folder that holds one folder of memory files per run; it may be missing.
        exclude: the run whose own files are left out.
        problems: takes a sentence for each file that was skipped because it is damaged.
    """
    lessons: dict[tuple[str, int, str], Lesson] = {}
    for path in sorted(root.glob("*/*.json")):
        run_id = path.parent.name
        if run_id == exclude or path.name.startswith("."):
            continue
        try:
            found = _from_file(path)
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            if problems is not None:
                problems.append(f"memory file {path} was skipped: {error}")
            continue
        # Child, editor and parent hold the same entry; it is one lesson.
        lessons.update(((run_id, *_age(lesson)), lesson) for lesson in found)
    return tuple(lessons[key] for key in sorted(lessons))


def as_snapshot(lessons: tuple[Lesson, ...]) -> dict[str, Any]:
    """Return a library as JSON for the journal, with its hash."""
    return {
        "content_hash": content_hash(lessons),
        "lessons": [_to_entry(lesson) for lesson in lessons],
    }


def from_snapshot(snapshot: Mapping[str, Any]) -> tuple[Lesson, ...]:
    """Return the library that the journal holds."""
    return tuple(_from_entry(entry) for entry in snapshot["lessons"])


def content_hash(lessons: Iterable[Lesson]) -> str:
    """Return the SHA-256 of lessons in their order, 64 hexadecimal digits."""
    return hashlib.sha256(_to_bytes([_to_entry(lesson) for lesson in lessons])).hexdigest()


def _of_another_run(lesson: Lesson) -> Lesson:
    """Return a lesson with names of agents that no agent of this run has."""
    return replace(
        lesson,
        individual_id=f"{ELSEWHERE}{lesson.individual_id}",
        parent_id=f"{ELSEWHERE}{lesson.parent_id}",
        editor_id=f"{ELSEWHERE}{lesson.editor_id}",
    )


def _who_knows(lesson: Lesson) -> set[str]:
    return {lesson.individual_id, lesson.editor_id, lesson.parent_id}


def _age(lesson: Lesson) -> tuple[int, str]:
    return lesson.generation, lesson.individual_id


def _to_bytes(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
    # A lone surrogate (output of a candidate that was not UTF-8) becomes its JSON escape.
    return (text + "\n").encode("utf-8", "backslashreplace")


def _to_entry(lesson: Lesson) -> dict[str, Any]:
    return {
        "individual_id": lesson.individual_id,
        "generation": lesson.generation,
        "parent_id": lesson.parent_id,
        "editor_id": lesson.editor_id,
        "status": lesson.status.value,
        "summary": lesson.summary,
        "edits": [
            {
                "operator": edit.operator,
                "file": edit.file,
                "why": edit.why,
                "parameters": _plain(edit.parameters),
            }
            for edit in lesson.edits
        ],
        "expected_effect": lesson.expected_effect,
        "effect": _finite(lesson.effect),
        "z_score": _finite(lesson.z_score),
        "error": lesson.error,
    }


def _plain(parameters: Mapping[str, Any]) -> Any:
    """Return parameters as JSON knows them, in one order, so that a replay gives the same bytes."""
    text = json.dumps(dict(parameters), sort_keys=True, default=str)
    return json.loads(text, parse_constant=lambda _: None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _from_file(path: Path) -> list[Lesson]:
    """Read one memory file.

    Raises:
        ValueError: it is not what `memory/memory.schema.json` describes.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if _take(content, "version", int) != VERSION:
        raise ValueError(f"it has version {content['version']}, and {VERSION} is understood")
    return [_from_entry(entry) for entry in _take(content, "entries", list)]


def _from_entry(entry: Any) -> Lesson:
    return Lesson(
        individual_id=_take(entry, "individual_id", str),
        generation=_take(entry, "generation", int),
        parent_id=_take(entry, "parent_id", str),
        editor_id=_take(entry, "editor_id", str),
        edits=tuple(
            Edit(
                operator=_take(edit, "operator", str),
                file=_take(edit, "file", str),
                why=_take(edit, "why", str),
                parameters=_take(edit, "parameters", dict),
            )
            for edit in _take(entry, "edits", list)
        ),
        summary=_take(entry, "summary", str),
        status=Status(_take(entry, "status", str)),
        expected_effect=_take(entry, "expected_effect", str),
        effect=_number(entry, "effect"),
        z_score=_number(entry, "z_score"),
        error=_take(entry, "error", str),
    )


def _take(content: Any, name: str, *kinds: type) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f"{name!r} is missing")
    value = content[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{name!r} is {type(value).__name__}, not {_names(kinds)}")
    return value


def _names(kinds: Sequence[type]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)


def _number(entry: Any, name: str) -> float | None:
    value = _take(entry, name, int, float, type(None))
    return None if value is None else _finite(float(value))
