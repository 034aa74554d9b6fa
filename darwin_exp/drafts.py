"""Drafts: rewrites of a genome that have passed the gates, each made once and then remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from random import Random
from typing import Any, Protocol

from darwin_exp import randomness
from darwin_exp.births import Birth
from darwin_exp.gates import objection
from darwin_exp.individual import (
    Edit,
    Genome,
    JobResult,
    ModelSpec,
    Proposal,
    Reason,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import EditFailed, EditRequest, Mutator
from darwin_exp.reviews import Reviews


class Smoke(Protocol):
    """Runs a draft's first few steps."""

    def __call__(self, birth: Birth, genome: Genome, draft: str) -> str | None:
        """Return why the draft cannot be trained, or None where nothing speaks against it.

        Args:
            draft: which of the individual's drafts it is; the same in a resumed run.
        """
        ...


class Drafts:
    """Asks the mutator, applies the gates and records what came of it.

    Args:
        seed: the run's; every draft has random numbers of its own.
        reject_duplicates: whether code that was seen before is turned down.
        reviews: has people look at what passes the gates, before any of it runs.
        libraries: names that code may import beside what the contract allows, as they are now.
        smoke: the last gate, and the only one that costs a slot's time; None leaves it out.
    """

    def __init__(
        self,
        mutator: Mutator,
        journal: Journal,
        seed: int,
        reject_duplicates: bool,
        reviews: Reviews,
        libraries: Callable[[], Collection[str]] = tuple,
        smoke: Smoke | None = None,
    ) -> None:
        self._mutator = mutator
        self._journal = journal
        self._seed = seed
        self._reject_duplicates = reject_duplicates
        self._reviews = reviews
        self._libraries = libraries
        self._smoke = smoke
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

        What people have commissioned passes them as well, or is not made.

        Raises:
            EditFailed: none passed.
        """
        if birth.commission is not None:
            approved = birth.commission.proposal
            return self._once(birth, 0, lambda: self._passed(birth, approved, "0-0"))
        return self._once(
            birth, 0, lambda: self._draft_until_one_passes(birth, request, self._mutator.propose)
        )

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
            EditFailed: the mutator knows no cure, or its cures do not pass the gates.
        """

        def cure(asked: EditRequest, rng: Random) -> Proposal:
            return self._mutator.repair(asked, failed, failure, rng)

        asked = replace(request, attempt=attempt)
        return self._once(
            birth,
            attempt,
            lambda: self._draft_until_one_passes(birth, asked, cure, failed.genome),
        )

    def _draft_until_one_passes(
        self,
        birth: Birth,
        request: EditRequest,
        draft_one: Callable[[EditRequest, Random], Proposal],
        failed: Genome | None = None,
    ) -> Proposal:
        """Return a draft that passes the gates; each is told why those before were turned down.

        Args:
            failed: the code that a repair is made of.

        Raises:
            EditFailed: none passed, or another would be no better.
        """
        objections: list[str] = []
        last = EditFailed(Reason.NOTHING_TO_EDIT, "the mutator made no draft")
        for draft in range(self._mutator.max_drafts):
            asked = replace(request, objections=tuple(objections))
            try:
                proposal = draft_one(asked, self._stream(birth, request.attempt, draft))
                return self._passed(birth, proposal, f"{request.attempt}-{draft}", failed)
            except EditFailed as failure:
                if not failure.again:
                    raise
                last = failure
            objections.append(str(last))
        raise last

    def _stream(self, birth: Birth, attempt: int, draft: int) -> Random:
        if attempt == 0:
            return randomness.stream(self._seed, "edit", birth.generation, birth.slot, draft)
        return randomness.stream(self._seed, "repair", birth.generation, birth.slot, attempt, draft)

    def _passed(
        self, birth: Birth, proposal: Proposal, draft: str, failed: Genome | None = None
    ) -> Proposal:
        """Return a draft that passes the gates, as it was approved where people looked at it.

        Args:
            draft: which of the individual's drafts it is; the same in a resumed run.
            failed: the code that a repair is made of.

        Raises:
            EditFailed: a gate turned it down, or a person did; another draft of one that a person
                did not approve is not asked for.
        """
        name = birth.individual_id
        self._pass_gate(birth, proposal, draft, failed)
        review = self._reviews.of_rewrite(
            f"{name}/{draft}",
            name,
            birth.parent,
            proposal.genome,
            birth.generation,
            proposal.summary,
        )
        if review.refusal:
            self._forget(proposal.genome, name)
            raise EditFailed(Reason.NOT_APPROVED, review.refusal, attempted=proposal)
        if review.changed_by:
            self._forget(proposal.genome, name)
            proposal = replace(
                proposal,
                genome=review.genome,
                summary=f"{proposal.summary} (changed by {review.changed_by})",
            )
            self._pass_gate(birth, proposal, f"{draft}/changed", failed)
        if self._smoke is not None and (why := self._smoke(birth, proposal.genome, draft)):
            self._forget(proposal.genome, name)
            raise EditFailed(Reason.SMOKE, why, again=True, attempted=proposal)
        return proposal

    def _pass_gate(
        self, birth: Birth, proposal: Proposal, draft: str, failed: Genome | None
    ) -> None:
        """Raise what turns a draft down, as it was found the first time.

        It depends on which of two siblings had the same code first, and what it says may be told
        to a model: so it is written down before anybody hears of it.
        """

        def examine() -> tuple[dict[str, Any], dict[str, Any]]:
            found = self._objection(birth, proposal, failed)
            return {} if found is None else {"reason": found[0].value, "message": found[1]}, {}

        genome, name = proposal.genome, birth.individual_id
        told = self._journal.once(
            "gate",
            f"{name}/{draft}",
            examine,
            given={"individual_id": name, "fingerprint": genome.fingerprint},
        ).payload
        if "reason" in told:
            raise EditFailed(
                Reason(told["reason"]), told["message"], again=True, attempted=proposal
            )
        if self._reject_duplicates:
            self.has_seen(genome, name)

    def _forget(self, genome: Genome, name: str) -> None:
        """Let others have code that was never trained: a resumed run would not know of it."""
        with self._mutex:
            if self._seen.get(genome.fingerprint) == name:
                del self._seen[genome.fingerprint]

    def _objection(
        self, birth: Birth, proposal: Proposal, failed: Genome | None
    ) -> tuple[Reason, str] | None:
        found = objection(proposal.genome, birth.parent.genome, frozenset(self._libraries()))
        if found is not None and found[0] is Reason.NO_OP and failed is not None:
            found = (
                Reason.NO_OP,
                "that is the parent's code again: mend the rewrite, or try another",
            )
        if found is not None and not (found[0] is Reason.NO_OP and not self._reject_duplicates):
            return found
        if failed is not None and proposal.genome.fingerprint == failed.fingerprint:
            return Reason.NO_OP, "a repair that changes nothing but comments, layout or a seed"
        if self._reject_duplicates:
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
                message = str(failure).partition("\n")[0]  # without a traceback
                told: dict[str, Any] = {"reason": failure.reason.value, "message": message}
                if failure.attempted is not None:
                    told["attempted"] = _payload(failure.attempted, parent.genome)
                return told, {}

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
            attempted = event.payload.get("attempted")
            raise EditFailed(
                Reason(event.payload["reason"]),
                event.payload["message"],
                attempted=attempted and _proposal_from(attempted, parent.genome),
            )
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
        "model": None if proposal.model is None else asdict(proposal.model),
        "requests": [dict(request) for request in proposal.requests],
    }


def _proposal_from(payload: Mapping[str, Any], parent: Genome) -> Proposal:
    return Proposal(
        genome=parent.with_files(payload["changed"], payload["removed"]),
        edits=tuple(Edit(**edit) for edit in payload["edits"]),
        n_new=payload["n_new"],
        summary=payload["summary"],
        expected_effect=payload["expected_effect"],
        model=ModelSpec(**payload["model"]) if payload.get("model") else None,
        requests=tuple(payload.get("requests", ())),
    )
