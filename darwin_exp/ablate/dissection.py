"""The dissection: which parts a champion's change consists of, and the champion without each.

Reads: base, champion and the edits between them. Writes: nothing.
Never: runs any of the code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from darwin_exp.ablate.hunks import Hunk, hunks_between, with_hunks
from darwin_exp.gates import objection
from darwin_exp.individual import Edit, Genome, Reason
from darwin_exp.mutation import EDITS, reapply
from darwin_exp.protocols import EditFailed


@dataclass(frozen=True)
class Part:
    """One part of a champion's change.

    Attributes:
        name: unique within the dissection.
        what: a few words, or where it stands in the patch.
        kind: "edit" or "hunk".
        without: the champion without it.
        same: whether the champion trains the same without it.
        flaw: why the champion without it cannot be trained; empty where it can.
        note: what else goes with it, or how it was removed.
    """

    name: str
    what: str
    file: str
    kind: str
    without: Genome
    same: bool = False
    flaw: str = ""
    note: str = ""


@dataclass(frozen=True)
class Dissection:
    """A champion's change, in parts.

    Attributes:
        rebuild: returns the champion without the parts named, and the names of those that went
            with them because they no longer fitted.
    """

    base: Genome
    champion: Genome
    parts: tuple[Part, ...]
    rebuild: Callable[[Collection[str]], tuple[Genome, list[str]]]


def take_apart(base: Genome, champion: Genome, edits: Sequence[Edit]) -> Dissection:
    """Return the parts of a champion's change.

    Where every edit is a built-in one and making them again on the base gives the champion to the
    byte, a part is an edit. Otherwise it is a hunk of the patch.
    """
    rebuild: Callable[[Collection[str]], tuple[Genome, list[str]]]
    if edits and _replay(base, edits)[0] == champion:
        names = _numbered([edit.operator for edit in edits])
        rebuild = partial(_without_edits, base, dict(zip(names, edits, strict=True)))
        described = [
            (name, told, edit.file, "edit")
            for name, told, edit in zip(names, _told(base, edits), edits, strict=True)
        ]
    else:
        hunks = hunks_between(base, champion)
        by_name = {f"{hunk.file} hunk {hunk.number}": hunk for hunk in hunks}
        rebuild = partial(_without_hunks, base, by_name)
        described = [(name, hunk.gist, hunk.file, "hunk") for name, hunk in by_name.items()]
    parts = tuple(_part(champion, rebuild, *one) for one in described)
    return Dissection(base, champion, parts, rebuild)


def _part(
    champion: Genome,
    rebuild: Callable[[Collection[str]], tuple[Genome, list[str]]],
    name: str,
    what: str,
    file: str,
    kind: str,
) -> Part:
    without, taken = rebuild([name])
    found = objection(without, champion)
    same = found is not None and found[0] is Reason.NO_OP
    notes = [f"takes {', '.join(taken)} with it"] if taken else []
    if same:
        notes.append("the champion is the same code without it")
    flaw = "" if found is None or same else found[1]
    return Part(name, what, file, kind, without, same, flaw, "; ".join(notes))


def _without_edits(
    base: Genome, edits: dict[str, Edit], dropped: Collection[str]
) -> tuple[Genome, list[str]]:
    kept = {name: edit for name, edit in edits.items() if name not in dropped}
    genome, misfits = _replay(base, list(kept.values()))
    names = list(kept)
    return genome, [names[k] for k in misfits]


def _without_hunks(
    base: Genome, hunks: dict[str, Hunk], dropped: Collection[str]
) -> tuple[Genome, list[str]]:
    return with_hunks(base, [hunk for name, hunk in hunks.items() if name not in dropped]), []


def _replay(genome: Genome, edits: Sequence[Edit]) -> tuple[Genome, list[int]]:
    """Make edits again, one by one; return the code and the places of those that did not fit."""
    misfits = []
    for k, edit in enumerate(edits):
        changed, left_out = reapply(genome, [edit])
        if left_out:
            misfits.append(k)
        else:
            genome = changed
    return genome, misfits


def _told(base: Genome, edits: Sequence[Edit]) -> list[str]:
    """Say of each edit in a few words what it changed."""
    told, genome = [], base
    for edit in edits:
        try:
            told.append(EDITS[edit.operator].describe(genome, edit.parameters))
        except EditFailed:
            told.append(EDITS[edit.operator].title)
        genome, _ = reapply(genome, [edit])
    return told


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind those that occur more than once."""
    often, seen = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(f"{name} {seen[name]}" if often[name] > 1 else name)
    return numbered
