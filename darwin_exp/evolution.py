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
from darwin_exp.closing import Closing
from darwin_exp.drafts import Birth, Drafts, name_of
from darwin_exp.fitness import Fitness
from darwin_exp.gates import smoke_objection
from darwin_exp.individual import (
    Genome,
    Individual,
    JobResult,
    Proposal,
    Purpose,
    Reason,
    Status,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import EditFailed, EditRequest, Memory, Mutator, Selector, Stopped
from darwin_exp.trials import Trial, Trials

SMOKE_SECONDS = 120.0  # for a few steps, and for compiling before them


class BaseFailed(Exception):
    """The base genome could not be trained and scored, so nothing can be compared with it."""


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
    max_hours: float | None
    stagnation_generations: int | None
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
    watch: Watch
    n_slots: int
    run_folder: Path


def evolve(base_genome: Genome, plan: Plan, parts: Parts) -> None:
    """Run an evolution from its beginning, or from wherever the journal says it got to.

    Raises:
        BaseFailed: the base genome does not train.
        Stopped: a cap was reached.
        Interrupted: somebody stopped the trials.
    """
    lives = _Lives(plan, parts)
    population = lives.fill(lives.live_base(base_genome))
    for generation in range(1, plan.n_generations + 1):
        if lives.are_stagnant() and not lives.has_begun(generation):
            break
        rng = randomness.stream(plan.seed, "selection", generation)
        survivors = parts.selector.survivors(population, plan.n_survivors, rng)
        parents = parts.selector.parents(survivors, plan.n_offspring, rng)
        offspring = lives.live(lives.pair(generation, parents, survivors, rng))
        population = lives.close_generation(generation, survivors, offspring)
    lives.close()


class _Lives:
    """The lives of one evolution's individuals; `evolve` tells the story."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan, self.parts = plan, parts
        self.drafts = Drafts(
            parts.mutator,
            parts.journal,
            plan.seed,
            plan.reject_duplicates,
            self._smoke if plan.smoke_steps else None,
        )
        self.archive = Archive(
            parts.journal, parts.memory, parts.fitness, parts.run_folder, plan.keep_all_checkpoints
        )
        self._began = time.monotonic()
        self._n_born = 0
        self._n_bases_at_once = min(parts.n_slots, plan.n_base_repeats)

    # --- the base, and those who fill the first population ---------------------------------------

    def live_base(self, genome: Genome) -> Individual:
        """Train and score the base: everything else is compared with it."""
        name = name_of(0, 0)
        self.parts.watch.generation_started(0, self.plan.n_generations)
        self.drafts.has_seen(genome, name)
        self.archive.leave_code(name, genome, genome)
        places = ["", *(f"{name}/beside-{k}" for k in range(1, self._n_bases_at_once))]
        # Others of it take the slots beside it, so that it meets the load that all later ones meet.
        result, *beside = self.at_once(
            lambda place=place: self._trial(  # type: ignore[misc]
                name, place or f"{name}/0", Purpose.BASE_REPEAT, genome, place
            )
            for place in places
        )
        if result.outcome.status is not Status.OK:
            tail = "\n".join(result.training.log_tail.splitlines()[-12:])
            raise BaseFailed(
                f"the base genome does not train and score: {result.outcome.status.value} "
                f"({result.outcome.message or result.outcome.reason.value})\n{tail}".rstrip()
            )
        unborn = Individual(name, 0, 0, genome, summary="the base")
        base = self.archive.judged(unborn, result, attempts=1)
        if base.fitness is None:
            raise BaseFailed(
                "the base has no fitness: its MFU could not be measured; use fitness=perplexity"
            )
        self._finish(base, result)
        self.archive.found(base)
        for again in beside:
            self.archive.repeat_of_base(self.archive.judged(base, again, attempts=1))
        return base

    def fill(self, base: Individual) -> list[Individual]:
        """Return the first population: the base, and rewrites of it."""
        slots = range(1, self.plan.population_size)
        births = [Birth(0, slot, self._ordinal(), base, base) for slot in slots]
        return self.close_generation(0, [base], self.live(births))

    def _repeat_base(self, repeat: int) -> None:
        base = self.archive.base
        assert base is not None
        name = f"{base.individual_id}/repeat-{repeat}"
        result = self._trial(base.individual_id, name, Purpose.BASE_REPEAT, base.genome, name)
        self.archive.repeat_of_base(self.archive.judged(base, result, attempts=1))

    # --- a generation ----------------------------------------------------------------------------

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
        return births

    def live(self, births: Sequence[Birth]) -> list[Individual]:
        """Lead all of them through their lives, as slots come free, with a base run among them."""
        lives: list[Callable[[], Individual | None]] = [
            lambda birth=birth: self.live_one(birth)  # type: ignore[misc]
            for birth in births
        ]
        # In the middle, so that the base meets the same load as those it is compared with.
        repeat = births[0].generation + self._n_bases_at_once
        if repeat < self.plan.n_base_repeats:
            lives.insert(len(lives) // 2, lambda: self._repeat_base(repeat))
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
            proposal = self.drafts.propose(birth, request)
        except EditFailed as failure:
            return self._finish(_stillborn(birth, failure), None)
        result = self._train(birth, proposal, attempt=0)
        attempt = 0
        while attempt < self.plan.max_repairs and _is_curable(result):
            try:
                proposal = self.drafts.mend(birth, request, proposal, result, attempt + 1)
            except EditFailed:
                break
            attempt += 1
            result = self._train(birth, proposal, attempt)
        child = self.archive.judged(_child(birth, proposal), result, attempts=attempt + 1)
        child = replace(child, repaired=attempt > 0 and child.is_ok)
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
        patience, best = self.plan.stagnation_generations, self.archive.best_by_generation
        if patience is None or len(best) <= patience:
            return False
        return max(best[-patience:]) <= max(best[:-patience])

    def close(self) -> None:
        """Close the run: who is selected, and what may be claimed."""
        plan, parts, archive = self.plan, self.parts, self.archive
        assert archive.base is not None
        closing = Closing(
            parts.trials,
            parts.journal,
            self.at_once,
            n_seeds=plan.n_claim_seeds,
            n_equal_steps=plan.n_equal_steps,
            n_timings=plan.n_timings,
            fitness=parts.fitness,
            has_test=plan.has_test,
            max_steps=plan.max_steps,
        )
        last = len(archive.best_by_generation) - 1
        closing.close(archive.everyone(), archive.base, last)

    def at_once(self, tasks: Iterable[Callable[[], Any]]) -> list[Any]:
        """Carry out tasks on as many threads as there are slots; results in the tasks' order.

        Once one of them fails no other is begun: an interrupted run has then written nothing that
        the uninterrupted one would have written later.
        """
        failures: list[BaseException] = []

        def guarded(task: Callable[[], Any]) -> Any:
            if failures:
                return None
            try:
                self._stop_at_the_cap()
                return task()
            except BaseException as failure:
                failures.append(failure)
                raise

        with ThreadPoolExecutor(self.parts.n_slots, thread_name_prefix="life") as pool:
            futures = [pool.submit(guarded, task) for task in tasks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException as interruption:
                failures.append(interruption)
            if failures and not isinstance(failures[0], Stopped):
                self.parts.trials.stop()  # at a cap, what is under way is finished and recorded
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    # --- one individual --------------------------------------------------------------------------

    def _train(self, birth: Birth, proposal: Proposal, attempt: int) -> JobResult:
        name = birth.individual_id
        self.archive.leave_code(name, proposal.genome, birth.parent.genome)
        return self._trial(name, f"{name}/{attempt}", Purpose.SEARCH, proposal.genome)

    def _smoke(self, birth: Birth, genome: Genome, draft: str) -> str | None:
        """Train a draft for a few steps; return why it fails them, or None."""
        name = birth.individual_id
        trial = Trial(
            f"{name}/smoke-{draft}",
            name,
            Purpose.SMOKE,
            genome,
            split=None,
            folder=f"individuals/{name}/smoke",
            max_steps=self.plan.smoke_steps,
            most_seconds=SMOKE_SECONDS,
        )
        return smoke_objection(self.parts.trials.run(trial))

    def _trial(
        self, individual_id: str, name: str, purpose: Purpose, genome: Genome, place: str = ""
    ) -> JobResult:
        folder = f"individuals/{place or individual_id}"
        wanted = not place or self.plan.keep_all_checkpoints
        return self.parts.trials.run(
            Trial(name, individual_id, purpose, genome, "val", folder, keeps_model=wanted)
        )

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

    def _stop_at_the_cap(self) -> None:
        hours = self.plan.max_hours
        if hours is not None and time.monotonic() - self._began > hours * 3600:
            raise Stopped(f"max_hours={hours:g} is reached")


def _child(birth: Birth, proposal: Proposal) -> Individual:
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


def _stillborn(birth: Birth, failure: EditFailed) -> Individual:
    """Return an individual that no edit could be made for: it has its parent's code, untrained."""
    parent = birth.parent
    duplicate = failure.reason in (Reason.SEEN_BEFORE, Reason.NO_OP)
    told = "no new edit was found" if duplicate else "the edit was refused"
    tried = Proposal(parent.genome, parent.edits, 0, told)
    if failure.attempted is not None and not duplicate:
        tried = replace(failure.attempted, genome=parent.genome)  # for others to learn from
    return replace(
        _child(birth, tried),
        status=Status.DUPLICATE if duplicate else Status.INVALID,
        reason=failure.reason,
        message=str(failure),
    )


def _is_curable(result: JobResult) -> bool:
    return result.outcome.status not in (Status.OK, Status.INFRA_LOST, Status.QUARANTINED)
