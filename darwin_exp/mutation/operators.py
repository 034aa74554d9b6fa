"""The mutator of built-in edits: draws them, merges two lineages, drops what failed.

Reads: the parent, the mate and the lessons of an `EditRequest`.
Writes: nothing; a `Proposal` is all that comes of it.
Never: calls a model, runs genome code, or draws a random number outside `rng`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from darwin_exp.individual import Edit, Genome, JobResult, Proposal, Reason, Status
from darwin_exp.mutation.builtin import BuiltInEdit
from darwin_exp.mutation.edits_model import MODEL_EDITS
from darwin_exp.mutation.edits_settings import SETTINGS_EDITS
from darwin_exp.mutation.edits_training import TRAINING_EDITS
from darwin_exp.protocols import EditFailed, EditRequest, Lesson

EDITS: dict[str, BuiltInEdit] = {
    edit.name: edit for edit in (*SETTINGS_EDITS, *MODEL_EDITS, *TRAINING_EDITS)
}

EXPLORATION = 0.15  # share of all draws that is spread evenly, whatever was learnt
BOLDNESS = 2.0  # how steeply weights follow what was learnt
LARGEST_Z = 6.0  # one lucky or unlucky outcome counts no more than this
FAILURE_Z = -2.0  # what a candidate that could not be scored counts as

# Says nothing about the edit: our own fault, code seen before, or a fault of the evaluator.
_NO_EVIDENCE = frozenset({Status.INFRA_LOST, Status.DUPLICATE, Status.QUARANTINED})


def edit_weights(names: Iterable[str], lessons: Sequence[Lesson]) -> dict[str, float]:
    """Return how likely each edit is to be drawn, given what was learnt; the weights sum to 1.

    The rule, whole: with no lessons (at first, and always with memory=off) all edits are equal.
    Every lesson whose new edits contain an edit is evidence on it, worth 1/k where it holds k new
    edits, because nobody knows which of them did it. What it says is its z-score (effect over the
    noise floor), bounded to [-6, 6]; a candidate that could not be scored says -2; one that was
    lost by our own fault, a duplicate, or an unmeasured effect says nothing. With n the sum of an
    edit's evidence, its score is

        sum(evidence x z) / (1 + n)  +  1 / sqrt(1 + n)

    The first term is a mean drawn towards 0, so that one lucky draw does not settle the matter;
    the second keeps what was tried little worth trying (an upper confidence bound). Weights are
    proportional to exp(2 x score), mixed with 15 % of even draws: no edit's share ever falls below
    0.15 / the number of edits.

    Source: the optimism in the face of uncertainty of Auer, Cesa-Bianchi and Fischer 2002,
    "Finite-time Analysis of the Multiarmed Bandit Problem"; the mixture with even draws is that of
    EXP3 (Auer et al. 2002).
    """
    names = sorted(set(names))
    evidence: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for lesson in lessons:
        z_score = _what_it_says(lesson)
        tried = {edit.operator for edit in lesson.edits}
        for name in tried & evidence.keys():
            if z_score is not None:
                evidence[name].append((1 / len(lesson.edits), z_score))
    force = {name: math.exp(BOLDNESS * _score(seen)) for name, seen in evidence.items()}
    total = math.fsum(force.values())
    return {
        name: EXPLORATION / len(names) + (1 - EXPLORATION) * force[name] / total for name in names
    }


def _score(seen: Sequence[tuple[float, float]]) -> float:
    """Return an edit's score from (evidence, z) pairs; see `edit_weights`."""
    n = math.fsum(weight for weight, _ in seen)
    return math.fsum(weight * z for weight, z in seen) / (1 + n) + 1 / math.sqrt(1 + n)


def _what_it_says(lesson: Lesson) -> float | None:
    if lesson.status in _NO_EVIDENCE:
        return None
    if lesson.status is not Status.OK:
        return FAILURE_Z
    if lesson.z_score is None or math.isnan(lesson.z_score):
        return None
    return max(-LARGEST_Z, min(LARGEST_Z, lesson.z_score))


@dataclass(frozen=True)
class _Draft:
    """A genome under way from a parent to a proposal, with what was done to it so far."""

    genome: Genome
    new: tuple[Edit, ...] = ()
    told: tuple[str, ...] = ()
    hopes: tuple[str, ...] = ()

    def then(self, edit: BuiltInEdit, line: Edit) -> _Draft:
        """Return the draft after one more edit; raises EditFailed where it does not fit."""
        return _Draft(
            edit.apply(self.genome, line.parameters),
            (*self.new, line),
            (*self.told, edit.describe(self.genome, line.parameters)),
            (*self.hopes, f"{edit.title}: {edit.hope}"),
        )


class Operators:
    """Edits training code with this project's own library of edits.

    Args:
        edits_per_child: fewest and most new edits drawn for a child.
        max_drafts: how often the evolution may ask again after it turned a draft down.
        only: draw from these alone, each the name of an edit or what edits are about; all if empty.
        without: never draw these, named in the same way.
    """

    trusted: ClassVar[bool] = True

    def __init__(
        self,
        edits_per_child: tuple[int, int] = (1, 2),
        max_drafts: int = 8,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        fewest, most = edits_per_child
        if not 1 <= fewest <= most:
            raise ValueError(f"mutator.edits_per_child: needs 1 <= {fewest} <= {most}")
        self.edits_per_child = (fewest, most)
        self.max_drafts = max_drafts
        wanted = _named("only", only) if only else set(EDITS)
        self.names = tuple(name for name in EDITS if name in wanted - _named("without", without))
        if not self.names:
            raise ValueError("mutator.only and mutator.without leave no edit to draw")

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        """Draw edits for the parent, or merge the mate's into it where there is a mate.

        A merge draws no random numbers, so one that was objected to gets a drawn edit on top.

        Raises:
            EditFailed: no edit of the library fits this parent.
        """
        if request.mate is None:
            return _proposal(request, self._draw(request, _Draft(request.parent.genome), rng))
        merged, notes = _merge(request.parent.edits, request.mate.edits, request.parent.genome)
        if not merged.new:
            note = f"nothing to merge from {request.mate.individual_id}"
            return _proposal(request, self._draw(request, merged, rng), [note, *notes])
        if request.objections:
            merged = self._draw(request, merged, rng, most=1)
        return _proposal(request, merged, [f"merged from {request.mate.individual_id}", *notes])

    def repair(
        self,
        request: EditRequest,
        failed: Proposal,
        failure: JobResult,
        rng: Random,
    ) -> Proposal:
        """Drop the last new edit and make the others again from the parent.

        A merge that is left with nothing gets drawn edits instead.

        Raises:
            EditFailed: there was only one new edit, so that nothing would be left.
        """
        *kept, dropped = failed.new_edits or (None,)
        if dropped is None:
            raise EditFailed(Reason.NOTHING_TO_EDIT, "the failed proposal held no new edit")
        note = f"dropped {_title(dropped)} after it failed"
        draft, left_out = _reapply(_Draft(request.parent.genome), kept)
        if not draft.new:
            if request.mate is None:
                raise EditFailed(Reason.NOTHING_TO_EDIT, f"nothing is left: {note}")
            draft = self._draw(request, draft, rng, avoid=failed.new_edits)
        return _proposal(request, draft, [note, *left_out])

    def _draw(
        self,
        request: EditRequest,
        draft: _Draft,
        rng: Random,
        most: int | None = None,
        avoid: Sequence[Edit] = (),
    ) -> _Draft:
        fewest = self.edits_per_child[0]
        wanted = rng.randint(fewest, self.edits_per_child[1])
        wanted = len(draft.new) + (wanted if most is None else min(wanted, most))
        done = {edit.operator for edit in (*request.parent.edits, *draft.new)}
        touched = {EDITS[e.operator].about for e in (*draft.new, *avoid) if e.operator in EDITS}
        weights = edit_weights(self.names, request.lessons)
        pool = [name for name in self.names if EDITS[name].repeatable or name not in done]
        while len(draft.new) < wanted:
            pool = [name for name in pool if EDITS[name].about not in touched]
            if not pool:
                break
            (name,) = rng.choices(pool, [weights[name] for name in pool])
            edit = EDITS[name]
            try:
                longer = draft.then(edit, edit.recorded(edit.draw(draft.genome, rng)))
            except EditFailed:
                pool.remove(name)
                continue
            draft = longer
            touched.add(edit.about)
        if not draft.new:
            raise EditFailed(
                Reason.NOTHING_TO_EDIT, "none of the built-in edits fits this parent's code"
            )
        return draft


def reapply(genome: Genome, edits: Iterable[Edit]) -> tuple[Genome, list[Edit]]:
    """Make recorded built-in edits again, in order; return the genome and those that did not fit.

    An edit that is not built in never fits.
    """
    left_out = []
    for line in edits:
        try:
            genome = _built_in(line).apply(genome, line.parameters)
        except EditFailed:
            left_out.append(line)
    return genome, left_out


def _named(key: str, names: Iterable[str]) -> set[str]:
    """Return the edits that are called by these names, or that are about these things.

    Raises:
        ValueError: a name is neither.
    """
    found: set[str] = set()
    for name in names:
        meant = {edit.name for edit in EDITS.values() if name in (edit.name, edit.about)}
        if not meant:
            topics = sorted({edit.about for edit in EDITS.values()})
            raise ValueError(
                f"mutator.{key}: {name!r} is neither an edit ({', '.join(EDITS)}) nor what one is "
                f"about ({', '.join(topics)})"
            )
        found |= meant
    return found


def _built_in(line: Edit) -> BuiltInEdit:
    edit = EDITS.get(line.operator)
    if edit is None:
        raise EditFailed(Reason.DOES_NOT_APPLY, f"{line.operator} is not built in")
    return edit


def _merge(
    ours: Sequence[Edit], theirs: Sequence[Edit], genome: Genome
) -> tuple[_Draft, list[str]]:
    """Make the mate's edits again, in order, on the parent's genome where the parent lacks them.

    Edits that both lineages hold are common ground. Where both went on to change the same thing
    in different ways, the parent's way is kept.
    """
    shared = Counter(map(_key, ours)) & Counter(map(_key, theirs))
    own_way = {
        EDITS[edit.operator].about for edit in _beyond(ours, shared) if edit.operator in EDITS
    }
    wanted, notes = [], []
    for edit in _beyond(theirs, shared):
        if edit.operator in EDITS and EDITS[edit.operator].about in own_way:
            notes.append(f"kept its own {EDITS[edit.operator].about}")
        else:
            wanted.append(edit)
    draft, left_out = _reapply(_Draft(genome), wanted)
    return draft, [*dict.fromkeys(notes), *left_out]


def _beyond(edits: Sequence[Edit], shared: Counter[str]) -> list[Edit]:
    remaining = shared.copy()
    beyond = []
    for edit in edits:
        if remaining[_key(edit)] > 0:
            remaining[_key(edit)] -= 1
        else:
            beyond.append(edit)
    return beyond


def _reapply(draft: _Draft, edits: Iterable[Edit]) -> tuple[_Draft, list[str]]:
    """Make recorded edits again; return the draft and a note for each that no longer fits."""
    notes = []
    for line in edits:
        try:
            draft = draft.then(_built_in(line), line)
        except EditFailed:
            notes.append(f"left out {_title(line)}")
    return draft, notes


def _proposal(request: EditRequest, draft: _Draft, notes: Sequence[str] = ()) -> Proposal:
    if draft.genome.fingerprint == request.parent.genome.fingerprint:
        raise EditFailed(Reason.NO_OP, "the edits drawn cancel each other out")
    return Proposal(
        genome=draft.genome,
        edits=(*request.parent.edits, *draft.new),
        n_new=len(draft.new),
        summary="; ".join((*draft.told, *notes)),
        expected_effect="; ".join(draft.hopes),
    )


def _key(edit: Edit) -> str:
    return json.dumps(
        [edit.operator, edit.file, dict(edit.parameters)], sort_keys=True, default=str
    )


def _title(line: Edit) -> str:
    edit = EDITS.get(line.operator)
    return edit.title if edit is not None else line.operator
