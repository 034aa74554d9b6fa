"""The mutator that changes nothing, for controls and A/A runs.

Reads: the parent's genome.
Writes: nothing.
Never: edits; any progress seen with it is noise.
"""

from __future__ import annotations

from random import Random
from typing import ClassVar

from darwin_exp.individual import JobResult, Proposal, Reason
from darwin_exp.protocols import EditFailed, EditRequest


class NoMutation:
    """Hands every child its parent's genome; needs `dedup=replicate`."""

    trusted: ClassVar[bool] = True
    max_drafts: int = 1

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        """Return the parent's genome unchanged."""
        parent = request.parent
        return Proposal(parent.genome, parent.edits, 0, "no edit (control)")

    def repair(
        self,
        request: EditRequest,
        failed: Proposal,
        failure: JobResult,
        rng: Random,
    ) -> Proposal:
        """Mend nothing.

        Raises:
            EditFailed: always.
        """
        raise EditFailed(Reason.NOTHING_TO_EDIT, "mutator=none makes no edit that could be mended")
