"""The evolution: moves individuals through the parts, and alone writes down what became of them.

Reads: the plan, the parts, and the journal of what was done before.
Writes: the journal (and, through it, every projection), the memory, the folders of individuals.
Never: trains, scores, edits or selects by itself, or asks who a part is.

Resuming is this same loop: each step is looked up in the journal before it is done.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

from darwin_exp import randomness
from darwin_exp.closing import Closing
from darwin_exp.fitness import Fitness
from darwin_exp.gates import objection
from darwin_exp.individual import (
    Edit,
    Genome,
    Individual,
    JobResult,
    Proposal,
    Purpose,
    Reason,
    Status,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import (
    EditFailed,
    EditRequest,
    Event,
    Lesson,
    Memory,
    Mutator,
    Selector,
)
from darwin_exp.statistics import NoiseFloor, z_score
from darwin_exp.trials import Trial, Trials


class BaseFailed(Exception):
    """The base genome could not be trained and scored, so nothing can be compared with it."""


class Stopped(Exception):
    """A cap ended the run before its last generation; it can be resumed."""


class Watch(Protocol):
    """What evolution tells a person who is looking on."""

    def generation_started(self, generation: int, n_generations: int) -> None: ...

    def individual_finished(self, individual: Individual, base: Individual | None) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def note(self, message: str) -> None: ...


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
    n_base_repeats: int
    n_claim_seeds: int
    has_test: bool

    @property
    def n_requested(self) -> int:
        """How many mutated individuals the whole run asks for."""
        offspring = self.population_size - self.n_survivors
        return self.population_size - 1 + self.n_generations * offspring


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


@dataclass(frozen=True)
class Birth:
    """Who is to be made from whom: everything that fixes an individual before its first edit."""

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


def evolve(base_genome: Genome, plan: Plan, parts: Parts) -> None:
    """Run an evolution from its beginning, or from wherever the journal says it got to.

    Raises:
        BaseFailed: the base genome does not train.
        Stopped: a cap was reached.
        Interrupted: somebody stopped the trials.
    """
    run = _Run(plan, parts)
    population = run.fill(run.live_base(base_genome))
    for generation in range(1, plan.n_generations + 1):
        if run.is_stagnant():
            break
        rng = run.random("selection", generation)
        survivors = parts.selector.survivors(population, plan.n_survivors, rng)
        parents = parts.selector.parents(survivors, plan.population_size - plan.n_survivors, rng)
        offspring = run.live(run.births(generation, parents, survivors, rng))
        population = run.close_generation(generation, survivors, offspring)
    run.closing().close(run.archive, run.base, run.last_generation)


class _Run:
    """The bookkeeping of one evolution; `evolve` tells the story."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan, self.parts = plan, parts
        self.archive: dict[str, Individual] = {}
        self.base: Individual
        self._began = time.monotonic()
        self._seen = {  # code fingerprint -> who had it first
            event.payload["fingerprint"]: event.payload["individual_id"]
            for event in parts.journal.of_kind("proposal")
            if "fingerprint" in event.payload
        }
        self._mutex = threading.Lock()
        self._requested = 0
        self._base_fitness: list[float] = []
        self._expected: dict[str, str] = {}
        self._best_by_generation: list[float | None] = []

    def random(self, *place: str | int) -> Random:
        return randomness.stream(self.plan.seed, *place)

    # --- the base, and those who fill the first population ---------------------------------------

    def live_base(self, genome: Genome) -> Individual:
        """Train and score the base: everything else is compared with it."""
        name = name_of(0, 0)
        self.parts.watch.generation_started(0, self.plan.n_generations)
        self._leave_code(name, genome, genome)
        result = self.parts.trials.run(
            Trial(f"{name}/0", name, Purpose.BASE_REPEAT, genome, "val", f"individuals/{name}")
        )
        if result.outcome.status is not Status.OK:
            tail = "\n".join(result.training.log_tail.splitlines()[-12:])
            raise BaseFailed(
                f"the base genome does not train and score: {result.outcome.status.value} "
                f"({result.outcome.message or result.outcome.reason.value})\n{tail}".rstrip()
            )
        self.base = self._individual(
            Individual(name, 0, 0, genome, summary="the base"), result, attempts=1
        )
        self._seen.setdefault(genome.fingerprint, name)
        self._record(self.base, result)
        if self.base.fitness is not None:
            self._base_fitness.append(self.base.fitness)
        return self.base

    def fill(self, base: Individual) -> list[Individual]:
        """Return the first population: the base, and rewrites of it."""
        births = [
            Birth(0, slot, self._next_ordinal(), base, base)
            for slot in range(1, self.plan.population_size)
        ]
        return self.close_generation(0, [base], self.live(births))

    # --- a generation ----------------------------------------------------------------------------

    def births(
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
            births.append(Birth(generation, slot, self._next_ordinal(), parent, editor, mate))
        return births

    def live(self, births: Sequence[Birth]) -> list[Individual]:
        """Lead all of them through their lives, as slots come free, with a base run among them."""
        lives: list[Callable[[], Individual | None]] = [
            lambda birth=birth: self.live_one(birth)  # type: ignore[misc]
            for birth in births
        ]
        # In the middle, so that the base meets the same load as those it is compared with.
        repeat = births[0].generation + 1 if births else 0
        if repeat < self.plan.n_base_repeats:
            lives.insert(len(lives) // 2, lambda: self._repeat_base(repeat))
        return [individual for individual in self.at_once(lives) if individual is not None]

    def live_one(self, birth: Birth) -> Individual:
        """Lead one individual through its life: edit, train and score; mend, train again."""
        self._stop_at_the_cap()
        parts, name = self.parts, birth.individual_id
        individual = Individual(
            name,
            birth.generation,
            birth.slot,
            birth.parent.genome,
            parent_ids=tuple(who.individual_id for who in (birth.parent, birth.mate) if who),
            editor_id=birth.editor.individual_id,
        )
        request = EditRequest(
            birth.parent,
            birth.editor,
            birth.mate,
            parts.memory.recall(birth.parent, birth.editor),
            ordinal=birth.ordinal,
        )
        try:
            proposal = self._propose(birth, request)
        except EditFailed as failure:
            return self._bury(individual, failure)
        result = self._train(individual, proposal, birth.parent.genome, attempt=0)
        attempt = 0
        while attempt < self.plan.max_repairs and _is_curable(result):
            try:
                mended = self._mend(birth, request, proposal, result, attempt + 1)
            except EditFailed:
                break
            attempt, proposal = attempt + 1, mended
            result = self._train(individual, proposal, birth.parent.genome, attempt)
        individual = replace(
            individual,
            genome=proposal.genome,
            edits=proposal.edits,
            n_new_edits=proposal.n_new,
            summary=proposal.summary,
            repaired=attempt > 0 and result.outcome.status is Status.OK,
        )
        individual = self._individual(individual, result, attempts=attempt + 1)
        self._record(individual, result, proposal.expected_effect, request.lessons)
        return individual

    def close_generation(
        self, generation: int, survivors: Sequence[Individual], offspring: Sequence[Individual]
    ) -> list[Individual]:
        """Return the living, after writing down who they are and what was learned."""
        population = [*survivors, *(child for child in offspring if child.is_ok)]
        noise = NoiseFloor.from_repeats(sorted(self._base_fitness))
        for child in offspring:
            self.parts.memory.learn(self._lesson(child, noise))
        self.parts.memory.close_generation()
        best = max(population, key=_fitness)
        self._best_by_generation.append(best.fitness)
        self.parts.journal.once(
            "generation",
            str(generation),
            lambda: (
                {
                    "generation": generation,
                    "population": [agent.individual_id for agent in population],
                    "survivors": [agent.individual_id for agent in survivors],
                    "best_id": best.individual_id,
                    "best": _averages([best], "metrics"),
                    "mean": _averages(population, "metrics"),
                    "noise_sd": noise.sd_log_perplexity,
                },
                {
                    "best": _averages([best], "rates"),
                    "mean": _averages(population, "rates"),
                    "seconds": time.monotonic() - self._began,
                },
            ),
            given={"best_id": best.individual_id} if self._fitness_is_repeatable() else None,
        )
        self._drop_checkpoints(population)
        return population

    @property
    def last_generation(self) -> int:
        return len(self._best_by_generation) - 1

    def closing(self) -> Closing:
        """Return what closes the run: the claim, and the rates behind it."""
        plan, parts = self.plan, self.parts
        return Closing(parts.trials, parts.journal, self.at_once, plan.n_claim_seeds, plan.has_test)

    def is_stagnant(self) -> bool:
        """Tell whether the best has stood still for as many generations as the plan bears."""
        patience = self.plan.stagnation_generations
        values = [value for value in self._best_by_generation if value is not None]
        if patience is None or len(values) <= patience:
            return False
        return max(values[-patience:]) <= max(values[:-patience])

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

    # --- edits -----------------------------------------------------------------------------------

    def _propose(self, birth: Birth, request: EditRequest) -> Proposal:
        """Return the recorded or a new draft that passes the gates.

        Raises:
            EditFailed: no draft passed.
        """

        def draft_all() -> Proposal:
            objections: list[str] = []
            found = (Reason.NOTHING_TO_EDIT, "the mutator made no draft")
            for draft in range(self.parts.mutator.max_drafts):
                rng = self.random("edit", birth.generation, birth.slot, draft)
                asked = replace(request, objections=tuple(objections))
                proposal = self.parts.mutator.propose(asked, rng)
                turned_down = self._objection(birth, proposal)
                if turned_down is None:
                    return proposal
                found = turned_down
                objections.append(found[1])
            raise EditFailed(*found)

        return self._draft_once(birth, 0, draft_all)

    def _mend(
        self,
        birth: Birth,
        request: EditRequest,
        failed: Proposal,
        failure: JobResult,
        attempt: int,
    ) -> Proposal:
        def mend() -> Proposal:
            rng = self.random("repair", birth.generation, birth.slot, attempt)
            proposal = self.parts.mutator.repair(request, failed, failure, rng)
            found = self._objection(birth, proposal)
            if found is not None:
                raise EditFailed(*found)
            return proposal

        return self._draft_once(birth, attempt, mend)

    def _draft_once(self, birth: Birth, attempt: int, draft: Callable[[], Proposal]) -> Proposal:
        """Return the proposal that the journal holds for this attempt, or make and record one."""
        parent = birth.parent

        def compute() -> tuple[dict[str, Any], dict[str, Any]]:
            try:
                proposal = draft()
            except EditFailed as failure:
                return {"reason": failure.reason.value, "message": str(failure)}, {}
            return _proposal_payload(proposal, parent.genome), {}

        event = self.parts.journal.once(
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
        return _proposal_from(event, parent.genome)

    def _objection(self, birth: Birth, proposal: Proposal) -> tuple[Reason, str] | None:
        if not self.plan.reject_duplicates:
            found = objection(proposal.genome, birth.parent.genome)
            return None if found and found[0] is Reason.NO_OP else found
        found = objection(proposal.genome, birth.parent.genome)
        if found is not None:
            return found
        with self._mutex:
            # Claimed at once: a sibling on another slot may draft the same code meanwhile.
            first = self._seen.setdefault(proposal.genome.fingerprint, birth.individual_id)
        if first != birth.individual_id:
            return Reason.SEEN_BEFORE, f"the same code as {first}"
        return None

    # --- training, and what it leaves -------------------------------------------------------------

    def _train(
        self, individual: Individual, proposal: Proposal, parent: Genome, attempt: int
    ) -> JobResult:
        name = individual.individual_id
        self._leave_code(name, proposal.genome, parent)
        return self.parts.trials.run(
            Trial(
                f"{name}/{attempt}",
                name,
                Purpose.SEARCH,
                proposal.genome,
                "val",
                f"individuals/{name}",
            )
        )

    def _repeat_base(self, repeat: int) -> None:
        name = self.base.individual_id
        result = self.parts.trials.run(
            Trial(
                f"{name}/repeat-{repeat}",
                name,
                Purpose.BASE_REPEAT,
                self.base.genome,
                "val",
                f"individuals/{name}/repeat-{repeat}",
            )
        )
        again = self._individual(self.base, result, attempts=1)
        if again.fitness is not None:
            self._base_fitness.append(again.fitness)

    def _individual(self, individual: Individual, result: JobResult, attempts: int) -> Individual:
        outcome, scored = result.outcome, result.evaluation
        metrics = scored.metrics if scored is not None and scored.status is Status.OK else {}
        rates = scored.rates if scored is not None and scored.status is Status.OK else {}
        base = getattr(self, "base", None)
        is_ok = outcome.status is Status.OK
        return replace(
            individual,
            status=outcome.status,
            reason=outcome.reason,
            message=outcome.message,
            metrics=metrics,
            rates=rates,
            fitness=self.parts.fitness(metrics, rates, base) if is_ok else None,
            attempts=attempts,
            contended=result.contended,
        )

    def _bury(self, individual: Individual, failure: EditFailed) -> Individual:
        """Record an individual that was never trained."""
        duplicate = failure.reason in (Reason.SEEN_BEFORE, Reason.NO_OP)
        individual = replace(
            individual,
            status=Status.DUPLICATE if duplicate else Status.INVALID,
            reason=failure.reason,
            message=str(failure),
            summary="no edit was found" if duplicate else "the edit was refused",
        )
        self._record(individual, None)
        return individual

    def _record(
        self,
        individual: Individual,
        result: JobResult | None,
        expected_effect: str = "",
        lessons: Sequence[Lesson] = (),
    ) -> None:
        """Write an individual's end into the journal, once, and show it."""
        fresh = self.parts.journal.find("individual", individual.individual_id) is None
        if fresh:
            self._leave_notes(individual, result, lessons)
        self._expected[individual.individual_id] = expected_effect
        self.parts.journal.once(
            "individual",
            individual.individual_id,
            lambda: (
                {
                    "generation": individual.generation,
                    "slot": individual.slot,
                    "parent_ids": list(individual.parent_ids),
                    "editor_id": individual.editor_id,
                    "edits": [asdict(edit) for edit in individual.edits],
                    "n_new_edits": individual.n_new_edits,
                    "summary": individual.summary,
                    "expected_effect": expected_effect,
                    "reason": individual.reason.value,
                    "message": individual.message,
                    "metrics": dict(individual.metrics),
                    "attempts": individual.attempts,
                    "repaired": individual.repaired,
                    **({"fitness": individual.fitness} if self._fitness_is_repeatable() else {}),
                },
                {
                    "rates": dict(individual.rates),
                    "contended": individual.contended,
                    "fitness": individual.fitness,
                    **(_times(result) if result else {}),
                },
            ),
            given={
                "individual_id": individual.individual_id,
                "genome_id": individual.genome.id,
                "status": individual.status.value,
            },
        )
        with self._mutex:
            self.archive[individual.individual_id] = individual
            done = len(self.archive) - 1
        if fresh:
            self.parts.watch.individual_finished(individual, getattr(self, "base", None))
        self.parts.watch.progress(done, self.plan.n_requested)

    def _fitness_is_repeatable(self) -> bool:
        """Tell whether fitness rests on metrics alone; with a rate in it, it is a measured time."""
        base = self.base
        return self.parts.fitness(base.metrics, {}, None) is not None

    def _lesson(self, child: Individual, noise: NoiseFloor) -> Lesson:
        parent = self.archive[child.parent_ids[0]]
        known = child.fitness is not None and parent.fitness is not None
        effect = child.fitness - parent.fitness if known else None  # type: ignore[operator]
        return Lesson(
            individual_id=child.individual_id,
            generation=child.generation,
            parent_id=parent.individual_id,
            editor_id=child.editor_id or parent.individual_id,
            edits=child.edits[len(child.edits) - child.n_new_edits :],
            summary=child.summary,
            status=child.status,
            expected_effect=self._expected.get(child.individual_id, ""),
            effect=effect,
            z_score=z_score(effect, noise),
            error="" if child.is_ok else f"{child.reason.value}: {child.message}",
        )

    # --- folders ----------------------------------------------------------------------------

    def _folder(self, name: str) -> Path:
        return self.parts.run_folder / "individuals" / name

    def _leave_code(self, name: str, genome: Genome, parent: Genome) -> None:
        folder = self._folder(name)
        if self.parts.journal.find("individual", name) is None:
            genome.write_to(folder / "code")
            (folder / "change.patch").write_text(genome.patch_from(parent), encoding="utf-8")

    def _leave_notes(
        self, individual: Individual, result: JobResult | None, lessons: Sequence[Lesson]
    ) -> None:
        folder = self._folder(individual.individual_id)
        folder.mkdir(parents=True, exist_ok=True)
        recalled = [{**asdict(lesson), "status": lesson.status.value} for lesson in lessons]
        (folder / "memory.json").write_text(json.dumps(recalled, indent=1), encoding="utf-8")
        if not individual.is_ok:
            tail = result.training.log_tail if result else ""
            text = f"{individual.status.value}: {individual.reason.value}\n{individual.message}\n"
            (folder / "error.txt").write_text(f"{text}\n{tail}", encoding="utf-8")

    def _drop_checkpoints(self, living: Sequence[Individual]) -> None:
        if self.plan.keep_all_checkpoints:
            return
        kept = {agent.individual_id for agent in living} | {self.base.individual_id}
        # The best so far may not have survived (selection by chance), and is still to be claimed.
        kept.add(max(self.archive.values(), key=_fitness).individual_id)
        for name in self.archive.keys() - kept:
            (self._folder(name) / "model.safetensors").unlink(missing_ok=True)

    # --- caps -------------------------------------------------------------------------------

    def _next_ordinal(self) -> int:
        self._requested += 1
        return self._requested - 1

    def _stop_at_the_cap(self) -> None:
        hours = self.plan.max_hours
        if hours is not None and time.monotonic() - self._began > hours * 3600:
            raise Stopped(f"max_hours={hours:g} is reached")


def _is_curable(result: JobResult) -> bool:
    return result.outcome.status not in (Status.OK, Status.INFRA_LOST, Status.QUARANTINED)


def _fitness(individual: Individual) -> float:
    return float("-inf") if individual.fitness is None else individual.fitness


def _averages(population: Sequence[Individual], which: str) -> dict[str, float]:
    """Return the mean of each metric (or rate) that somebody in the population has."""
    names = sorted({name for agent in population for name in getattr(agent, which)})
    averages = {}
    for name in names:
        values = [value for agent in population if (value := agent.measured(name)) is not None]
        averages[name] = sum(values) / len(values)
    return averages


def _times(result: JobResult) -> dict[str, float]:
    scored = result.evaluation
    return {
        "startup_seconds": result.training.startup_seconds
        + (scored.startup_seconds if scored else 0.0),
        "training_seconds": result.training.training_seconds,
        "scoring_seconds": scored.scoring_seconds if scored else 0.0,
        "overhead_seconds": result.overhead_seconds,
        "total_seconds": result.total_seconds,
    }


def _proposal_payload(proposal: Proposal, parent: Genome) -> dict[str, Any]:
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


def _proposal_from(event: Event, parent: Genome) -> Proposal:
    payload = event.payload
    return Proposal(
        genome=parent.with_files(payload["changed"], payload["removed"]),
        edits=tuple(Edit(**edit) for edit in payload["edits"]),
        n_new=payload["n_new"],
        summary=payload["summary"],
        expected_effect=payload["expected_effect"],
    )
