"""Which lessons are worth an editor's attention, and in what order.

Reads: the lessons of an edit request, and the code at hand.
Writes: nothing.
Never: counts the same attempt twice, or takes what says nothing about an edit (a duplicate, our own
failures, an answer that nobody could read) for experience.

Lessons are first merged by what was tried: built-in edits by their names, whatever their numbers;
rewrites by what they say of themselves. The relevance of what was tried is then the sum of

    1      if it changed a file at hand
    0..2   twice the share of its words that stand in lines which the parent changed of the base
    0..1   the share of its words that stand anywhere in the parent's code
    0..2   half of |z|, its mean effect in units of the noise; 1 if it failed, so that nobody
           does it again
    1      if the editor, the parent or an ancestor of either had a part in it

and of two that are equal the more recent one comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from darwin_exp.individual import Genome, Individual, Status
from darwin_exp.mutation.operators import EDITS
from darwin_exp.protocols import EditRequest, Lesson

SAYS_NOTHING = frozenset({Status.DUPLICATE, Status.INFRA_LOST})
_COMMON = frozenset({"and", "are", "but", "for", "from", "not", "that", "the", "this", "with"})
_MOST_READ = 2_000  # characters of what a lesson says of itself


@dataclass(frozen=True)
class Tried:
    """Something that was tried, once or several times.

    Attributes:
        lesson: the latest of it.
        n: how often.
        failure: the latest that failed; None where none did.
        n_failed: how often it failed.
        effect: mean change of fitness where it was measured.
        z_score: the same in units of the noise, where that was known.
        is_own: whether the editor itself had a part in it.
        relevance: see above.
    """

    lesson: Lesson
    n: int
    failure: Lesson | None
    n_failed: int
    effect: float | None
    z_score: float | None
    is_own: bool
    relevance: float


def most_relevant(request: EditRequest, files: Iterable[str] = ()) -> list[Tried]:
    """Return what was tried, the most relevant first; the same request gives the same order.

    Args:
        files: those at hand; without any, those in which the parent differs from the base, and all
            where it does not.
    """
    groups: dict[tuple[str, ...], list[Lesson]] = {}
    for lesson in request.lessons:
        if lesson.status not in SAYS_NOTHING and lesson.edits:
            groups.setdefault(_what(lesson), []).append(lesson)
    hand = _Hand.of(request, files)
    tried = [_merged(sorted(group, key=_age), request.editor, hand) for group in groups.values()]
    # Three stable passes: by name, then the recent ones first, then by relevance.
    tried.sort(key=lambda one: one.lesson.individual_id)
    tried.sort(key=lambda one: one.lesson.generation, reverse=True)
    tried.sort(key=lambda one: one.relevance, reverse=True)
    return tried


@dataclass(frozen=True)
class _Hand:
    """What an editor has before it.

    Attributes:
        files: paths that are to be changed.
        changed: words of the lines in which parent and base differ.
        code: words of the parent's code.
        line: ids of editor and parent and of their ancestors, as far as lessons tell.
    """

    files: frozenset[str]
    changed: frozenset[str]
    code: frozenset[str]
    line: frozenset[str]

    @classmethod
    def of(cls, request: EditRequest, files: Iterable[str]) -> _Hand:
        parent = request.parent.genome
        base = request.base.genome if request.base is not None else parent
        changed = {path for path, text in parent.files if base.as_dict.get(path) != text}
        return cls(
            files=frozenset(files) or frozenset(changed) or frozenset(parent.as_dict),
            changed=_words_of_changes(parent, base),
            code=_words_of_code(parent),
            line=_line((request.parent, request.editor), request.lessons),
        )


def _merged(group: list[Lesson], editor: Individual, hand: _Hand) -> Tried:
    """Return lessons on the same thing, oldest first, as one."""
    latest = group[-1]
    failures = [lesson for lesson in group if lesson.status is not Status.OK]
    effects = [lesson.effect for lesson in group if lesson.effect is not None]
    scores = [lesson.z_score for lesson in group if lesson.z_score is not None]
    z_score = fmean(scores) if scores else None
    words = _words(_told(latest))
    share = 1.0 / max(1, len(words))
    who = {name for one in group for name in (one.individual_id, one.editor_id, one.parent_id)}
    touched = {file.strip() for edit in latest.edits for file in edit.file.split(",")}
    relevance = (
        float(bool(touched & hand.files))
        + 2 * share * len(words & hand.changed)
        + share * len(words & hand.code)
        + max(min(abs(z_score or 0.0), 4.0) / 2, float(bool(failures)))
        + float(bool(who & hand.line))
    )
    return Tried(
        lesson=latest,
        n=len(group),
        failure=failures[-1] if failures else None,
        n_failed=len(failures),
        effect=fmean(effects) if effects else None,
        z_score=z_score,
        is_own=any(editor.individual_id in (one.individual_id, one.editor_id) for one in group),
        relevance=relevance,
    )


def _what(lesson: Lesson) -> tuple[str, ...]:
    """Return what a lesson is about; equal where the same was tried."""
    names = tuple(sorted(edit.operator for edit in lesson.edits))
    if names and all(name in EDITS for name in names):
        return ("built in", *names)
    return ("told", " ".join(lesson.summary[:_MOST_READ].casefold().split()))


def _age(lesson: Lesson) -> tuple[int, str]:
    return lesson.generation, lesson.individual_id


def _told(lesson: Lesson) -> str:
    # A model's name says nothing about its edit; that of a built-in edit does.
    names = (edit.operator if edit.operator in EDITS else "" for edit in lesson.edits)
    reasons = " ".join((*names, *(edit.why for edit in lesson.edits)))
    return f"{lesson.summary[:_MOST_READ]} {reasons[:_MOST_READ]}"


def _line(agents: Iterable[Individual], lessons: Iterable[Lesson]) -> frozenset[str]:
    parents: Mapping[str, str] = {lesson.individual_id: lesson.parent_id for lesson in lessons}
    line: set[str] = set()
    waiting = [name for agent in agents for name in (agent.individual_id, *agent.parent_ids)]
    while waiting:
        name = waiting.pop()
        if name not in line:
            line.add(name)
            waiting += [parents[name]] if name in parents else []
    return frozenset(line)


@lru_cache(maxsize=64)
def _words_of_changes(genome: Genome, base: Genome) -> frozenset[str]:
    lines = genome.patch_from(base).split("\n")
    changes = [line for line in lines if line.startswith(("+", "-"))]
    return _words("\n".join(line for line in changes if line[:3] not in ("+++", "---")))


@lru_cache(maxsize=64)
def _words_of_code(genome: Genome) -> frozenset[str]:
    return frozenset(word for _, text in genome.files for word in _words(text))


def _words(text: str) -> frozenset[str]:
    """Return the words of prose or code: `learning_rate` and "Learning rate" are the same two."""
    return frozenset(re.findall(r"[a-z]{3,}", text.lower())) - _COMMON
