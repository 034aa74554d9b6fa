"""Births: who is to be made from whom, and what an individual is before it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from darwin_exp.individual import Edit, Individual, Proposal, Reason, Status
from darwin_exp.protocols import EditFailed


@dataclass(frozen=True)
class Commission:
    """A rewrite that people have approved word for word, and that no mutator makes.

    Attributes:
        approval: hash of the content that was approved.
        parent: of whose code it is a rewrite.
        changed: whole texts by path; `removed` are paths.
    """

    approval: str
    parent: Individual
    what: str
    reason: str
    changed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...] = ()

    @property
    def proposal(self) -> Proposal:
        """The parent's code with it."""
        parent = self.parent
        edit = Edit("approved", self.files[0], self.what, {"approval": self.approval})
        return Proposal(
            parent.genome.with_files(dict(self.changed), self.removed),
            (*parent.edits, edit),
            n_new=1,
            summary=f"approved by people: {self.what}",
            expected_effect=self.reason,
            model=parent.model,
        )

    @property
    def files(self) -> list[str]:
        """The paths that it writes or removes."""
        return [path for path, _ in self.changed] + list(self.removed)


@dataclass(frozen=True)
class Birth:
    """Who is to be made from whom: everything that fixes an individual before its first edit.

    Attributes:
        ordinal: how many individuals were requested before this one.
        commission: the rewrite, where people have approved it already.
    """

    generation: int
    slot: int
    ordinal: int
    parent: Individual
    editor: Individual
    mate: Individual | None = None
    commission: Commission | None = None

    @property
    def individual_id(self) -> str:
        return name_of(self.generation, self.slot)


def name_of(generation: int, slot: int) -> str:
    """Return an individual's id; the base is g00-i00."""
    return f"g{generation:02d}-i{slot:02d}"


def commissioned(births: Sequence[Birth], commissions: Sequence[Commission]) -> list[Birth]:
    """Return the births with the last of them given to what people have approved."""
    given = list(births)
    for k, commission in enumerate(commissions, start=1):
        parent = commission.parent
        given[-k] = replace(
            given[-k], parent=parent, editor=parent, mate=None, commission=commission
        )
    return given


def child_of(birth: Birth, proposal: Proposal) -> Individual:
    """Return the individual that a proposal makes, before anything is known of it."""
    return Individual(
        birth.individual_id,
        birth.generation,
        birth.slot,
        proposal.genome,
        parent_ids=tuple(who.individual_id for who in (birth.parent, birth.mate) if who),
        editor_id=birth.editor.individual_id,
        edits=proposal.edits,
        n_new_edits=proposal.n_new,
        summary=proposal.summary,
        model=proposal.model,
    )


def stillborn(birth: Birth, failure: EditFailed) -> Individual:
    """Return an individual that no edit could be made for: it has its parent's code, untrained."""
    parent = birth.parent
    duplicate = failure.reason in (Reason.SEEN_BEFORE, Reason.NO_OP)
    told = "no new edit was found" if duplicate else "the edit was refused"
    tried = Proposal(parent.genome, parent.edits, 0, told)
    if failure.attempted is not None and not duplicate:
        tried = replace(failure.attempted, genome=parent.genome)  # for others to learn from
    return replace(
        child_of(birth, tried),
        status=Status.DUPLICATE if duplicate else Status.INVALID,
        reason=failure.reason,
        message=str(failure),
    )
