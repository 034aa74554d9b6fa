"""Reviews: rewrites that wait for a person before they run, or before the run claims them.

Reads: a rewrite and what it was made of.
Writes: the journal's "review" events.
Never: lets an approval of one rewrite cover another, or silence stand for a yes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from darwin_exp.hitl.asked import (
    GRANTED,
    Refused,
    Request,
    RequestType,
    Standing,
    State,
    edit_content,
)
from darwin_exp.hitl.flags import why_flagged
from darwin_exp.hitl.patches import applied, split
from darwin_exp.individual import Genome, Individual
from darwin_exp.journal import Journal
from darwin_exp.people import People

ALL, FLAGGED, CHAMPION, NONE = "all", "flagged", "champion", "none"
ORDINARY_LINES = 80  # added and removed together


@dataclass(frozen=True)
class Review:
    """What a person said of a rewrite.

    Attributes:
        genome: the rewrite, as the person approved it.
        refusal: why it may not be trained or promoted; empty where it may.
        changed_by: who changed it, if somebody did.
    """

    genome: Genome
    refusal: str = ""
    changed_by: str = ""


class Reviews:
    """Has rewrites reviewed, each once however often the run is resumed.

    Args:
        mode: "none", "flagged" (what is out of the ordinary), "champion" (whom the run would
            select) or "all" (every rewrite, and the champion).
        known: keys of the reviews that were recorded, here or in the run that is replayed.
    """

    def __init__(
        self,
        people: People,
        journal: Journal,
        mode: str = NONE,
        ordinary_lines: int = ORDINARY_LINES,
        known: Iterable[str] = (),
    ) -> None:
        self._people = people
        self._journal = journal
        self._mode = mode
        self._ordinary_lines = ordinary_lines
        self._known = set(known)

    @property
    def hold_lives(self) -> bool:
        """Tell whether lives may have to wait for a person."""
        return self._people.are_here and self._mode in (ALL, FLAGGED)

    def of_rewrite(
        self,
        key: str,
        individual_id: str,
        parent: Individual,
        genome: Genome,
        generation: int,
        summary: str,
    ) -> Review:
        """Return what people say of a rewrite before it runs, if they are to be asked.

        Args:
            key: of the draft; the same in a resumed run.
            summary: what its editor says that it is.

        Raises:
            InboxError: the inbox is damaged, or its disk is full.
            Interrupted: the run is stopping before anybody has answered.
        """
        why = "every rewrite is reviewed" if self._mode == ALL else ""
        if self._mode == FLAGGED:
            why = why_flagged(genome, parent.genome, self._ordinary_lines)
        if key not in self._known and not (why and self._people.are_here):
            return Review(genome)
        return self._review(key, individual_id, parent, genome, generation, f"{summary} ({why})")

    def let_be_champion(self, selected: Individual, base: Individual, closing: str) -> bool:
        """Tell whether people let an individual be what the run claims.

        Args:
            closing: the closing's key, such as "after-g03".

        Raises:
            InboxError: the inbox is damaged, or its disk is full.
            Interrupted: the run is stopping before anybody has answered.
        """
        key = f"champion/{closing}/{selected.individual_id}"
        if key not in self._known and not (self._mode in (CHAMPION, ALL) and self._people.are_here):
            return True
        generation = int(closing.rpartition("g")[2])
        why = "it would be the run's champion; this is all that it changes in the base's code"
        found = self._review(
            key,
            selected.individual_id,
            base,
            selected.genome,
            generation,
            why,
            # Leave to be trained is no leave to be claimed, though the patch may be the same.
            head=f"to be the champion of the run, {closing}\n",
        )
        return not found.refusal

    def _review(
        self,
        key: str,
        individual_id: str,
        parent: Individual,
        genome: Genome,
        generation: int,
        why: str,
        head: str = "",
    ) -> Review:
        """Return what people say.

        Args:
            head: what else is approved, of a rewrite that was measured already.
        """
        people = self._people
        request = people.request(
            RequestType.EDIT,
            why,
            head
            + edit_content(
                individual_id, parent.individual_id, genome.id, genome.patch_from(parent.genome)
            ),
            generation,
            patch_of=individual_id,
        )

        def look() -> tuple[dict[str, Any], dict[str, Any]]:
            began = time.monotonic()
            standing = people.settled(request)
            times = {
                "waited_seconds": time.monotonic() - began,
                "idle_seconds": people.turns.drain_idle_seconds(),
            }
            found = _verdict(standing, request, parent.genome, genome, bool(head))
            return {**found, "request_id": request.request_id, "why": why}, times

        told = self._journal.once(
            "review", key, look, given={"individual_id": individual_id, "genome_id": genome.id}
        ).payload
        if told["verdict"] == "approved":
            return Review(genome)
        if told["verdict"] == "changed":
            changed = parent.genome.with_files(told["changed"], told["removed"])
            return Review(changed, changed_by=told["by"])
        return Review(genome, refusal=told["note"])


def _verdict(
    standing: Standing, request: Request, parent: Genome, genome: Genome, was_measured: bool
) -> dict[str, Any]:
    """Return what a settled review comes to, as the journal keeps it."""
    answers = [entry for entry in standing.history if entry.kind == "answered"]
    by = (answers or standing.history)[-1].author.name
    told: dict[str, Any] = {"note": standing.note, "by": by, "verdict": "approved"}
    if standing.request.content != request.content:
        return {**told, "verdict": "denied", "by": "", "note": "another request bears its id"}
    if standing.state is State.EXPIRED:
        return {**told, "verdict": "expired", "note": "nobody answered in time, which means no"}
    if standing.state not in GRANTED:
        note = f": {standing.note}" if standing.note else ""
        return {**told, "verdict": "denied", "note": f"{by} did not approve it{note}"}
    if standing.state is not State.CHANGED:
        return told
    assert standing.granted_content is not None
    refused = {**told, "verdict": "denied"}
    if was_measured:
        return {**refused, "note": f"{by} changed it, but what was measured cannot be changed"}
    try:
        changed = applied(parent, split(standing.granted_content)[1])
    except Refused as refusal:
        return {**refused, "note": f"{by} changed it, but {refusal}"}
    if changed == genome:
        return told
    before, after = parent.as_dict, changed.as_dict
    return {
        **told,
        "verdict": "changed",
        "changed": {path: text for path, text in after.items() if before.get(path) != text},
        "removed": sorted(before.keys() - after.keys()),
    }
