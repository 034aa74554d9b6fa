"""Steering: how people's wishes, approvals and vetoes reach an evolution.

Reads: what people have said until a point of the run, and what was approved.
Writes: the journal's "environment" events; what is asked, through `people`.
Never: chooses among individuals by itself: where nobody has said anything, nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from darwin_exp.archive import Archive, fitness_or_least
from darwin_exp.asking import Question, nearly_spent, outside_the_tree, quarantined, stuck
from darwin_exp.births import Birth, Commission, commissioned
from darwin_exp.effects import Carried, Effects
from darwin_exp.individual import Individual, JobResult, Proposal, Reason
from darwin_exp.journal import Journal
from darwin_exp.measuring import BaseFailed, Measuring
from darwin_exp.people import People
from darwin_exp.protocols import EditFailed, EditRequest, Stopped
from darwin_exp.trials import Broken, Trials


@dataclass
class Steering:
    """Brings what people say into the loop.

    Attributes:
        n_offspring: rewrites of a generation.
        n_base_repeats: trainings of the base that measure the noise of an environment.
        stuck_generations: without a gain, before people are asked for help; None never asks.
    """

    people: People
    effects: Effects
    journal: Journal
    trials: Trials
    archive: Archive
    measuring: Measuring
    n_offspring: int
    n_base_repeats: int
    stuck_generations: int | None
    _pinned: frozenset[str] = field(default=frozenset(), init=False)
    _commissions: tuple[Commission, ...] = field(default=(), init=False)

    # --- a generation ----------------------------------------------------------------------------

    def open_generation(
        self,
        generation: int,
        population: Sequence[Individual],
        has_begun: bool,
    ) -> list[Individual]:
        """Let what people have said take effect, and return those who live on.

        Args:
            has_begun: whether something of the generation was done before this process.

        Raises:
            Stopped: a person wants the run to stop before this generation.
        """
        board = self.people.take(f"g{generation:02d}")
        if self.people.is_told_to_stop(board) and not has_begun:
            raise Stopped(f"a person wanted it after generation {generation - 1}")
        everyone, base = self.archive.everyone(), self.archive.base
        assert base is not None
        outcast = self.effects.outcast(board, everyone)
        living = [one for one in population if one.individual_id not in outcast] or [base]
        carried = self.effects.carry_out(generation, board, living, everyone, self.n_offspring)
        if carried.conditions != self.trials.conditions:
            living = self._change_conditions(generation, carried, living)
        self._commissions, self._pinned = carried.commissions, frozenset(board.pins)
        if not has_begun:
            self._ask_for_help(generation)
        return living

    def with_pinned(
        self, survivors: Sequence[Individual], population: Sequence[Individual]
    ) -> list[Individual]:
        """Return the survivors with those whom people have pinned first; no more than before."""
        pinned = [one for one in population if one.individual_id in self._pinned]
        others = [one for one in survivors if one not in pinned]
        return [*pinned, *others][: len(survivors)]

    def with_commissions(self, births: Sequence[Birth]) -> list[Birth]:
        """Return a generation's births, the last of them made of what people have approved."""
        return commissioned(births, self._commissions)

    def eligible(self, last: int) -> Mapping[str, Individual]:
        """Return whom the run may select at its closing, after the last generation.

        Raises:
            Stopped: a person wants the run to stop first.
        """
        board = self.people.take(f"closing-g{last:02d}")
        if self.people.is_told_to_stop(board):
            raise Stopped(f"a person wanted it after generation {last}")
        everyone = self.archive.everyone()
        outcast = self.effects.outcast(board, everyone)
        return {name: one for name, one in everyone.items() if name not in outcast}

    # --- another environment ---------------------------------------------------------------------

    def _change_conditions(
        self, generation: int, carried: Carried, living: Sequence[Individual]
    ) -> list[Individual]:
        """Measure the base and all living again under new conditions; return who lives there.

        Where not even the base trains, everything stays as it was.
        """
        trials, archive = self.trials, self.archive
        before = trials.environment, trials.conditions
        kinds = ("environment", "environment_abandoned")
        tried = [event for kind in kinds for event in self.journal.of_kind(kind)]
        index = 1 + sum(event.payload["generation"] < generation for event in tried)
        run = self.journal.find("run", "run")
        own = run.payload["environment"] if run else {}
        given = {
            "index": index,
            "generation": generation,
            "environment_id": carried.conditions.environment_id(own),
        }
        told = {"changed": carried.conditions.changed}
        old = archive.base
        assert old is not None
        found: list[JobResult] = []
        if self.journal.find(kinds[1], str(index)) is None:
            if self.people.are_here:  # where a recorded run is replayed nothing is trained
                self.effects.verify(carried.conditions)
            trials.enter(index, carried.conditions)
            try:
                self.measuring.try_out(old.genome, f"e{index}")
                found = self.measuring.train_base(old.genome, self.n_base_repeats)
                base = archive.judged(old, found[0], attempts=1, is_new_base=True)
                if base.fitness is None:
                    raise BaseFailed("the base has no fitness there")
            except (BaseFailed, Broken) as failure:
                if trials.stopping.is_set():
                    raise
                found = []
                why = str(failure).partition("\n")[0]
                trials.enter(*before)
                self.measuring.try_out(old.genome, f"before-e{index}")  # or it is all of us
                abandoned = {**told, "message": why}
                self.journal.once(kinds[1], str(index), lambda: (abandoned, {}), given=given)
        if not found:
            event = self.journal.find(kinds[1], str(index))
            why = event.payload["message"] if event else ""
            if not self.effects.withdraw_those_of(generation, f"nothing trains there: {why}"):
                raise Broken(f"what was revoked cannot be done without: {why}; start a new run")
            return list(living)
        because = {"because": list(carried.because)}
        self.journal.once(kinds[0], str(index), lambda: (told, because), given=given)
        archive.enter(index)
        archive.record_again(base, found[0])
        self.measuring.compare_with(base, found[1:])
        others = [one for one in living if one is not old]
        measured = self.measuring.at_once(
            [lambda one=one: self.measuring.again(one) for one in others]  # type: ignore[misc]
        )
        still = {one.individual_id: one for one in measured if one.fitness is not None}
        if old in living or not still:
            still[base.individual_id] = base
        return [still[one.individual_id] for one in living if one.individual_id in still] or [base]

    # --- one individual --------------------------------------------------------------------------

    def heard(self, request: EditRequest, birth: Birth, attempt: int) -> EditRequest:
        """Return a request with what people have said to whoever makes (0) or mends a rewrite."""
        board = self.people.take(f"{birth.individual_id}/{attempt}")
        editor, parent = birth.editor.individual_id, birth.parent.individual_id
        return replace(
            request,
            guidance=board.told_to({editor, parent}),
            came_of_requests=(
                *board.came_of({editor}),
                *self.effects.came_of({editor}, birth.generation),
            ),
        )

    def pass_on_requests(self, birth: Birth, proposal: Proposal | None) -> None:
        """Ask people what the editor of a rewrite asks them."""
        told = () if proposal is None else proposal.requests
        editor = birth.editor.individual_id
        self.people.ask(self.people.requests_of(told, editor, birth.generation))

    def tell_of_failure(self, birth: Birth, failure: EditFailed) -> None:
        """Pass on what a rewrite asked that was turned down, and that it left its tree."""
        self.pass_on_requests(birth, failure.attempted)
        if failure.reason is Reason.FORBIDDEN_PATH:
            self._ask(birth.generation, outside_the_tree(birth.individual_id, failure))

    def tell_of_quarantine(self, individual: Individual) -> None:
        """Let people know of an individual that was set apart."""
        self._ask(individual.generation, quarantined(individual))

    def _ask_for_help(self, generation: int) -> None:
        """Ask people where a cap or the search itself comes to its end."""
        everyone = self.archive.everyone().values()
        best = max(everyone, key=fitness_or_least).individual_id
        asked = nearly_spent(self.journal.events(), self.people.caps, self.people.hours)
        asked += stuck(self.archive.comparable_bests, self.stuck_generations, best)
        self._ask(generation, asked)

    def _ask(self, generation: int, asked: Sequence[Question]) -> None:
        people = self.people
        people.ask(people.request(one.kind, one.reason, one.content, generation) for one in asked)
