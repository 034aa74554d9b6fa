"""The evolution: moves individuals through the parts, and has written down what became of them.

Reads: the plan, the parts, and the journal of what was done before.
Writes: the journal (and, through it, every projection), the memory, the folders of individuals.
Never: trains, scores, edits or selects by itself, or asks who a part is.

Resuming is this same loop: each step is looked up in the journal before it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

from darwin_exp import randomness
from darwin_exp.archive import Archive
from darwin_exp.births import Birth, child_of, name_of, stillborn
from darwin_exp.closing import Closing
from darwin_exp.drafts import Drafts
from darwin_exp.effects import Effects
from darwin_exp.fitness import Fitness
from darwin_exp.individual import (
    Genome,
    Individual,
    JobResult,
    Proposal,
    Status,
)
from darwin_exp.journal import Journal
from darwin_exp.measuring import BaseFailed, Measuring
from darwin_exp.people import People
from darwin_exp.protocols import EditFailed, EditRequest, Memory, Mutator, Selector, Stopped
from darwin_exp.reviews import Reviews
from darwin_exp.steering import Steering
from darwin_exp.trials import Trials

MOST_WAITING = 64  # lives that wait for people beside those that hold a slot


class Watch(Protocol):
    """What evolution tells a person who is looking on."""

    def generation_started(self, generation: int, n_generations: int) -> None: ...

    def individual_finished(self, individual: Individual, base: Individual | None) -> None: ...

    def progress(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The numbers of a run; the keys of the same names in the configuration explain them."""

    seed: int
    population_size: int
    n_survivors: int
    n_generations: int
    reject_duplicates: bool
    keep_all_checkpoints: bool
    stagnation_generations: int | None
    stuck_generations: int | None
    pair_with_peers: bool
    crossover_probability: float
    max_repairs: int
    smoke_steps: int
    n_base_repeats: int
    n_claim_seeds: int
    n_equal_steps: int
    n_timings: int
    has_test: bool
    max_steps: int | None

    @property
    def n_offspring(self) -> int:
        return self.population_size - self.n_survivors

    @property
    def n_requested(self) -> int:
        """How many mutated individuals the whole run asks for."""
        return self.population_size - 1 + self.n_generations * self.n_offspring


@dataclass(frozen=True)
class Parts:
    """What config chose for each swap point."""

    mutator: Mutator
    selector: Selector
    fitness: Fitness
    memory: Memory
    trials: Trials
    journal: Journal
    people: People
    reviews: Reviews
    effects: Effects
    watch: Watch
    n_slots: int
    run_folder: Path


def evolve(base_genome: Genome, plan: Plan, parts: Parts) -> None:
    """Run an evolution from its beginning, or from wherever the journal says it got to.

    Raises:
        BaseFailed: the base genome does not train.
        InboxError: what people wrote to the run is damaged.
        Stopped: a cap was reached, or a person wants it.
        Interrupted: somebody stopped the trials.
    """
    parts.people.hear_caps()
    lives = _Lives(plan, parts)
    population = lives.fill(lives.live_base(base_genome))
    for generation in range(1, plan.n_generations + 1):
        if lives.are_stagnant() and not lives.has_begun(generation):
            break
        population = lives.heed_people(generation, population)
        rng = randomness.stream(plan.seed, "selection", generation)
        survivors = parts.selector.survivors(population, plan.n_survivors, rng)
        survivors = lives.steering.with_pinned(survivors, population)
        parents = parts.selector.parents(survivors, plan.n_offspring, rng)
        offspring = lives.live(lives.pair(generation, parents, survivors, rng))
        population = lives.close_generation(generation, survivors, offspring)
    lives.close()


class _Lives:
    """The lives of one evolution's individuals; `evolve` tells the story."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan, self.parts = plan, parts
        self._began = time.monotonic()
        self.archive = Archive(
            parts.journal, parts.memory, parts.fitness, parts.run_folder, plan.keep_all_checkpoints
        )
        self.measuring = Measuring(
            parts.trials,
            self.archive,
            self.at_once,
            n_bases_at_once=min(parts.n_slots, plan.n_base_repeats),
            smoke_steps=plan.smoke_steps,
            keeps_all=plan.keep_all_checkpoints,
        )
        self.drafts = Drafts(
            parts.mutator,
            parts.journal,
            plan.seed,
            plan.reject_duplicates,
            parts.reviews,
            lambda: parts.trials.conditions.libraries,
            self.measuring.smoke if plan.smoke_steps else None,
        )
        self.steering = Steering(
            parts.people,
            parts.effects,
            parts.journal,
            parts.trials,
            self.archive,
            self.measuring,
            plan.n_offspring,
            plan.n_base_repeats,
            plan.stuck_generations,
        )
        self._n_born = 0

    # --- the base, and those who fill the first population ---------------------------------------

    def live_base(self, genome: Genome) -> Individual:
        """Train and score the base: everything else is compared with it.

        Raises:
            BaseFailed: it does not train and score.
        """
        name = name_of(0, 0)
        self.parts.watch.generation_started(0, self.plan.n_generations)
        self.drafts.has_seen(genome, name)
        self.archive.leave_code(name, genome, genome)
        result, *beside = self.measuring.train_base(genome, self.measuring.n_bases_at_once)
        unborn = Individual(name, 0, 0, genome, summary="the base")
        base = self.archive.judged(unborn, result, attempts=1, is_new_base=True)
        if base.fitness is None:
            raise BaseFailed(
                "the base has no fitness: its MFU could not be measured; use fitness=perplexity"
            )
        self._finish(base, result)
        self.measuring.compare_with(base, beside)
        return base

    def fill(self, base: Individual) -> list[Individual]:
        """Return the first population: the base, and rewrites of it."""
        slots = range(1, self.plan.population_size)
        births = [Birth(0, slot, self._ordinal(), base, base) for slot in slots]
        return self.close_generation(0, [base], self.live(births))

    # --- a generation ----------------------------------------------------------------------------

    def heed_people(self, generation: int, population: Sequence[Individual]) -> list[Individual]:
        """Let what people have said take effect, and return those who live on.

        Raises:
            Stopped: a person wants the run to stop before this generation.
        """
        return self.steering.open_generation(generation, population, self.has_begun(generation))

    def pair(
        self,
        generation: int,
        parents: Sequence[Individual],
        survivors: Sequence[Individual],
        rng: Random,
    ) -> list[Birth]:
        """Give each parent an editor (another living agent where there is one) and maybe a mate."""
        self.parts.watch.generation_started(generation, self.plan.n_generations)
        births = []
        for slot, parent in enumerate(parents):
            others = [agent for agent in survivors if agent is not parent]
            editor = rng.choice(others) if others and self.plan.pair_with_peers else parent
            crossed = bool(others) and rng.random() < self.plan.crossover_probability
            mate = rng.choice(others) if crossed else None
            births.append(Birth(generation, slot, self._ordinal(), parent, editor, mate))
        return self.steering.with_commissions(births)

    def live(self, births: Sequence[Birth]) -> list[Individual]:
        """Lead all of them through their lives, as slots come free, with a base run among them."""
        lives: list[Callable[[], Individual | None]] = [
            lambda birth=birth: self.live_one(birth)  # type: ignore[misc]
            for birth in births
        ]
        # In the middle, so that the base meets the same load as those it is compared with.
        repeat = births[0].generation + self.measuring.n_bases_at_once
        if repeat < self.plan.n_base_repeats:
            lives.insert(len(lives) // 2, lambda: self.measuring.repeat_base(repeat))
        return [individual for individual in self.at_once(lives) if individual is not None]

    def live_one(self, birth: Birth) -> Individual:
        """Lead one individual through its life: edit, train and score; mend, train again."""
        lessons = self.parts.memory.recall(birth.parent, birth.editor)
        request = EditRequest(
            birth.parent,
            birth.editor,
            birth.mate,
            lessons,
            ordinal=birth.ordinal,
            individual_id=birth.individual_id,
            generation=birth.generation,
            base=self.archive.base,
            noise=self.archive.noise_sd,
        )
        try:
            asked = self.steering.heard(request, birth, attempt=0)
            proposal = self.drafts.propose(birth, asked)
        except EditFailed as failure:
            self.steering.tell_of_failure(birth, failure)
            return self._finish(stillborn(birth, failure), None)
        self.steering.pass_on_requests(birth, proposal)
        result = self._train(birth, proposal, attempt=0)
        attempt = 0
        while attempt < self.plan.max_repairs and _is_curable(result):
            asked = self.steering.heard(request, birth, attempt + 1)
            try:
                proposal = self.drafts.mend(birth, asked, proposal, result, attempt + 1)
            except EditFailed as failure:
                self.steering.tell_of_failure(birth, failure)
                break
            self.steering.pass_on_requests(birth, proposal)
            attempt += 1
            result = self._train(birth, proposal, attempt)
        child = self.archive.judged(child_of(birth, proposal), result, attempts=attempt + 1)
        child = replace(child, repaired=attempt > 0 and child.is_ok)
        self.steering.tell_of_quarantine(child)
        return self._finish(child, result, proposal.expected_effect, lessons)

    def close_generation(
        self, generation: int, survivors: Sequence[Individual], offspring: Sequence[Individual]
    ) -> list[Individual]:
        """Return the living: those who survived, and those of their offspring who are OK."""
        seconds = time.monotonic() - self._began
        return self.archive.close_generation(generation, survivors, offspring, seconds)

    def has_begun(self, generation: int) -> bool:
        """Tell whether the journal holds anything of a generation."""
        prefix = name_of(generation, 0).partition("-")[0] + "-"
        begun = (*self.parts.journal.of_kind("gate"), *self.parts.journal.of_kind("proposal"))
        return any(event.key.startswith(prefix) for event in begun)

    def are_stagnant(self) -> bool:
        """Tell whether the best has stood still for as many generations as the plan bears."""
        patience, best = self.plan.stagnation_generations, self.archive.comparable_bests
        if patience is None or len(best) <= patience:
            return False
        return max(best[-patience:]) <= max(best[:-patience])

    def close(self) -> None:
        """Close the run: who is selected, and what may be claimed.

        Raises:
            Stopped: a person wants the run to stop first.
        """
        plan, parts, archive = self.plan, self.parts, self.archive
        assert archive.base is not None
        last = len(archive.best_by_generation) - 1
        eligible = self.steering.eligible(last)
        closing = Closing(
            parts.trials,
            parts.journal,
            self.at_once,
            n_seeds=plan.n_claim_seeds,
            n_equal_steps=plan.n_equal_steps,
            n_timings=plan.n_timings,
            fitness=parts.fitness,
            has_test=plan.has_test,
            max_steps=parts.trials.conditions.max_steps or plan.max_steps,
            may_be_champion=parts.reviews.let_be_champion,
        )
        closing.close(eligible, archive.base, last)

    def at_once(self, tasks: Iterable[Callable[[], Any]]) -> list[Any]:
        """Carry out as many tasks at once as there are slots; results in the tasks' order.

        A task that waits for a person holds no slot, so there may be more threads than slots.

        Once one of them fails no other is begun: an interrupted run has then written nothing that
        the uninterrupted one would have written later.
        """
        people = self.parts.people
        failures: list[BaseException] = []

        def guarded(task: Callable[[], Any]) -> Any:
            if failures:
                return None
            try:
                people.wait_while_paused()
                with people.turns.taken():
                    people.stop_at_the_cap()
                    return None if failures else task()
            except BaseException as failure:
                failures.append(failure)
                people.stop_waiting()
                raise

        n_threads = self.parts.n_slots
        if self.parts.reviews.hold_lives or people.block:
            n_threads += MOST_WAITING
        with ThreadPoolExecutor(n_threads, thread_name_prefix="life") as pool:
            futures = [pool.submit(guarded, task) for task in tasks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException as interruption:
                failures.append(interruption)
                people.stop_waiting()
            if failures and not isinstance(failures[0], Stopped):
                self.parts.trials.stop()  # at a cap, what is under way is finished and recorded
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    # --- one individual --------------------------------------------------------------------------

    def _train(self, birth: Birth, proposal: Proposal, attempt: int) -> JobResult:
        name = birth.individual_id
        self.archive.leave_code(name, proposal.genome, birth.parent.genome)
        return self.measuring.train(name, f"{name}/{attempt}", proposal.genome)

    def _finish(
        self,
        individual: Individual,
        result: JobResult | None,
        expected_effect: str = "",
        lessons: Sequence[Any] = (),
    ) -> Individual:
        """Record how an individual ended, and show it if that is news."""
        if self.archive.record(individual, result, expected_effect, lessons):
            self.parts.watch.individual_finished(individual, self.archive.base)
        # The base is no rewrite, and not one of those that were requested.
        self.parts.watch.progress(len(self.archive.everyone()) - 1, self.plan.n_requested)
        return individual

    def _ordinal(self) -> int:
        self._n_born += 1
        return self._n_born - 1


def _is_curable(result: JobResult) -> bool:
    return result.outcome.status not in (Status.OK, Status.INFRA_LOST, Status.QUARANTINED)
