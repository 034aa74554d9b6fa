"""Drafts: rewrites of a genome that have passed the gates, each made once and then remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from darwin_exp import randomness
from darwin_exp.gates import objection
from darwin_exp.individual import Edit, Genome, Individual, JobResult, Proposal, Reason
from darwin_exp.journal import Journal
from darwin_exp.protocols import EditFailed, EditRequest, Mutator


@dataclass(frozen=True)
class Birth:
    """Who is to be made from whom: everything that fixes an individual before its first edit.

    Attributes:
        ordinal: how many individuals were requested before this one.
    """

    generation: int
    slot: int
    ordinal: int
    parent: Individual
    editor: Individual
    mate: Individual | None = None

    @property
    def individual_id(self) -> str:
        return name_of(self.generation, self.slot)


def name_of(generation: int, slot: int) -> str:
    """Return an individual's id; the base is g00-i00."""
    return f"g{generation:02d}-i{slot:02d}"


class Drafts:
    """Asks the mutator, applies the gates and records what came of it.

    Args:
        seed: the run's; every draft has random numbers of its own.
        reject_duplicates: whether code that was seen before is turned down.
    """

    def __init__(
        self, mutator: Mutator, journal: Journal, seed: int, reject_duplicates: bool
    ) -> None:
        self._mutator = mutator
        self._journal = journal
        self._seed = seed
        self._reject_duplicates = reject_duplicates
        self._mutex = threading.Lock()
        self._seen: dict[str, str] = {  # code fingerprint -> who had it first
            event.payload["fingerprint"]: event.payload["individual_id"]
            for event in journal.of_kind("proposal")
            if "fingerprint" in event.payload
        }

    def has_seen(self, genome: Genome, individual_id: str) -> str:
        """Return who had this code first, which is the asker where nobody had."""
        with self._mutex:
            # Claimed at once: a sibling on another slot may draft the same code meanwhile.
            return self._seen.setdefault(genome.fingerprint, individual_id)

    def propose(self, birth: Birth, request: EditRequest) -> Proposal:
        """Return a first draft that passes the gates; one turned down is followed by another.

        Raises:
            EditFailed: none passed.
        """

        def draft_all() -> Proposal:
            objections: list[str] = []
            last = (Reason.NOTHING_TO_EDIT, "the mutator made no draft")
            for draft in range(self._mutator.max_drafts):
                rng = randomness.stream(self._seed, "edit", birth.generation, birth.slot, draft)
                asked = replace(request, objections=tuple(objections))
                proposal = self._mutator.propose(asked, rng)
                turned_down = self._objection(birth, proposal)
                if turned_down is None:
                    return proposal
                last = turned_down
                objections.append(last[1])
            raise EditFailed(*last)

        return self._once(birth, 0, draft_all)

    def mend(
        self,
        birth: Birth,
        request: EditRequest,
        failed: Proposal,
        failure: JobResult,
        attempt: int,
    ) -> Proposal:
        """Return a mended version of a draft that failed in training or scoring.

        Raises:
            EditFailed: the mutator knows no cure, or its cure does not pass the gates.
        """

        def cure() -> Proposal:
            rng = randomness.stream(self._seed, "repair", birth.generation, birth.slot, attempt)
            proposal = self._mutator.repair(request, failed, failure, rng)
            turned_down = self._objection(birth, proposal)
            if turned_down is not None:
                raise EditFailed(*turned_down)
            return proposal

        return self._once(birth, attempt, cure)

    def _objection(self, birth: Birth, proposal: Proposal) -> tuple[Reason, str] | None:
        found = objection(proposal.genome, birth.parent.genome)
        if not self._reject_duplicates:
            return None if found and found[0] is Reason.NO_OP else found
        if found is not None:
            return found
        first = self.has_seen(proposal.genome, birth.individual_id)
        if first != birth.individual_id:
            return Reason.SEEN_BEFORE, f"the same code as {first}"
        return None

    def _once(self, birth: Birth, attempt: int, draft: Callable[[], Proposal]) -> Proposal:
        """Return the proposal that the journal holds for this attempt, or make and record one."""
        parent = birth.parent

        def compute() -> tuple[dict[str, Any], dict[str, Any]]:
            try:
                return _payload(draft(), parent.genome), {}
            except EditFailed as failure:
                return {"reason": failure.reason.value, "message": str(failure)}, {}

        event = self._journal.once(
            "proposal",
            f"{birth.individual_id}/{attempt}",
            compute,
            given={
                "individual_id": birth.individual_id,
                "parent_id": parent.individual_id,
                "parent_genome": parent.genome.id,
                "editor_id": birth.editor.individual_id,
                "mate_id": birth.mate.individual_id if birth.mate else None,
            },
        )
        if "reason" in event.payload:
            raise EditFailed(Reason(event.payload["reason"]), event.payload["message"])
        return _proposal_from(event.payload, parent.genome)


def _payload(proposal: Proposal, parent: Genome) -> dict[str, Any]:
    """Return a proposal as JSON: its genome as what changed against the parent's."""
    before, after = parent.as_dict, proposal.genome.as_dict
    return {
        "genome_id": proposal.genome.id,
        "fingerprint": proposal.genome.fingerprint,
        "changed": {path: text for path, text in after.items() if before.get(path) != text},
        "removed": sorted(before.keys() - after.keys()),
        "edits": [asdict(edit) for edit in proposal.edits],
        "n_new": proposal.n_new,
        "summary": proposal.summary,
        "expected_effect": proposal.expected_effect,
    }


def _proposal_from(payload: Mapping[str, Any], parent: Genome) -> Proposal:
    return Proposal(
        genome=parent.with_files(payload["changed"], payload["removed"]),
        edits=tuple(Edit(**edit) for edit in payload["edits"]),
        n_new=payload["n_new"],
        summary=payload["summary"],
        expected_effect=payload["expected_effect"],
    )
