"""The archive: every individual that ever was, and how each is written down.

Writes: the journal's "individual" and "generation" events, the memory, runs/RUN_ID/individuals/.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from darwin_exp.fitness import Fitness
from darwin_exp.individual import Genome, Individual, JobResult, Status
from darwin_exp.journal import Journal
from darwin_exp.protocols import Lesson, Memory
from darwin_exp.statistics import NoiseFloor, z_score
from darwin_exp.trials import CHECKPOINT


class Archive:
    """Individuals by name, in the order in which they were finished.

    Attributes:
        base: the first individual; everything is compared with it.
        best_by_generation: highest fitness among the living at the end of each generation.
        noise_sd: standard deviation of the base's repeated fitness, as it stood when the last
            generation was closed; None until it is known.
        environment: in which individuals are measured; what was measured in earlier ones is
            compared with nobody any more.
    """

    def __init__(
        self,
        journal: Journal,
        memory: Memory,
        fitness: Fitness,
        run_folder: Path,
        keep_all_checkpoints: bool,
    ) -> None:
        self._journal = journal
        self._memory = memory
        self._fitness = fitness
        self._folder = run_folder / "individuals"
        self._keep_all = keep_all_checkpoints
        self._mutex = threading.Lock()
        self._individuals: dict[str, Individual] = {}
        self._expected: dict[str, str] = {}
        self._base_fitness: list[float] = []
        self.base: Individual | None = None
        self.best_by_generation: list[float] = []
        self.noise_sd: float | None = None
        self.environment = 0
        self._n_closed_before = 0  # generations, when the environment was opened

    @property
    def comparable_bests(self) -> list[float]:
        """Those of `best_by_generation` that were measured in this environment."""
        return self.best_by_generation[self._n_closed_before :]

    def everyone(self) -> dict[str, Individual]:
        """Return all individuals so far, by name."""
        with self._mutex:
            return dict(self._individuals)

    def judged(
        self, individual: Individual, result: JobResult, attempts: int, is_new_base: bool = False
    ) -> Individual:
        """Return an individual with what its last trial found.

        Args:
            is_new_base: whether others will be compared with it, and it with nobody.
        """
        base = None if is_new_base else self.base
        outcome, scored = result.outcome, result.evaluation
        is_ok = scored is not None and scored.status is Status.OK
        metrics = scored.metrics if scored is not None and is_ok else {}
        rates = scored.rates if scored is not None and is_ok else {}
        return replace(
            individual,
            status=outcome.status,
            reason=outcome.reason,
            message=outcome.message,
            metrics=metrics,
            rates=rates,
            fitness=(
                self._fitness(metrics, rates, base, is_base=individual is base) if is_ok else None
            ),
            attempts=attempts,
            contended=result.contended,
        )

    def found(self, base: Individual) -> None:
        """Take in the base, with which everybody after it is compared."""
        self.base = base
        with self._mutex:
            self._individuals[base.individual_id] = base
        self.repeat_of_base(base)

    def repeat_of_base(self, again: Individual) -> None:
        """Take in one more training of the base, for the noise floor."""
        if again.fitness is not None:
            with self._mutex:
                self._base_fitness.append(again.fitness)

    # --- another environment ---------------------------------------------------------------------

    def enter(self, environment: int) -> None:
        """Compare nobody any more with what was measured before a new environment."""
        with self._mutex:
            self._individuals = {
                name: replace(one, fitness=None, metrics={}, rates={})
                for name, one in self._individuals.items()
            }
            self._base_fitness = []
        self.environment = environment
        self._n_closed_before = len(self.best_by_generation)
        self.noise_sd = None

    def record_again(self, individual: Individual, result: JobResult) -> None:
        """Write down what an individual came to in this environment, once.

        It keeps the status that it was made with; one that fails here lives no longer.
        """
        name = individual.individual_id
        self._journal.once(
            "remeasured",
            f"e{self.environment}/{name}",
            lambda: (
                {
                    "reason": individual.reason.value,
                    "message": individual.message,
                    "metrics": dict(individual.metrics),
                    "fitness": individual.fitness,
                },
                {
                    "rates": dict(individual.rates),
                    "contended": individual.contended,
                    **_times(result),
                },
            ),
            given={
                "individual_id": name,
                "environment": self.environment,
                "genome_id": individual.genome.id,
                "status": individual.status.value,
            },
        )
        with self._mutex:
            before = self._individuals[name]
            self._individuals[name] = replace(
                before,
                metrics=individual.metrics,
                rates=individual.rates,
                fitness=individual.fitness,
            )

    # --- one individual --------------------------------------------------------------------------

    def leave_code(self, name: str, genome: Genome, parent: Genome) -> None:
        """Write an individual's code and its patch against the parent, unless it is finished."""
        if self._journal.find("individual", name) is None:
            folder = self._folder / name
            shutil.rmtree(folder / "code", ignore_errors=True)  # of an earlier attempt
            genome.write_to(folder / "code")
            (folder / "change.patch").write_text(genome.patch_from(parent), encoding="utf-8")

    def record(
        self,
        individual: Individual,
        result: JobResult | None,
        expected_effect: str = "",
        lessons: Sequence[Lesson] = (),
    ) -> bool:
        """Write an individual's end into the journal, once; return whether it is news.

        Args:
            result: its last trial; None if it was never trained.
            lessons: what its editor was told.
        """
        name = individual.individual_id
        is_news = self._journal.find("individual", name) is None
        if is_news:
            self._leave_notes(individual, result, lessons)
        self._journal.once(
            "individual",
            name,
            lambda: (
                {
                    **_payload(individual),
                    "expected_effect": expected_effect,
                    **self._where,
                },
                {
                    "rates": dict(individual.rates),
                    "contended": individual.contended,
                    **(_times(result) if result else {}),
                },
            ),
            given={
                "individual_id": name,
                "genome_id": individual.genome.id,
                "status": individual.status.value,
            },
        )
        with self._mutex:
            self._individuals[name] = individual
            self._expected[name] = expected_effect
        return is_news

    def _leave_notes(
        self, individual: Individual, result: JobResult | None, lessons: Sequence[Lesson]
    ) -> None:
        folder = self._folder / individual.individual_id
        folder.mkdir(parents=True, exist_ok=True)
        recalled = [{**asdict(lesson), "status": lesson.status.value} for lesson in lessons]
        (folder / "memory.json").write_text(json.dumps(recalled, indent=1), encoding="utf-8")
        if not individual.is_ok:
            tail = result.training.log_tail if result else ""
            text = f"{individual.status.value}: {individual.reason.value}\n{individual.message}\n"
            (folder / "error.txt").write_text(f"{text}\n{tail}", encoding="utf-8")

    # --- one generation --------------------------------------------------------------------------

    def close_generation(
        self,
        generation: int,
        survivors: Sequence[Individual],
        offspring: Sequence[Individual],
        seconds: float,
    ) -> list[Individual]:
        """Return the living, after writing down who they are and what was learned.

        Args:
            seconds: since this process began.
        """
        population = [*survivors, *(child for child in offspring if child.is_ok)]
        noise = NoiseFloor.from_repeats(sorted(self._base_fitness))
        for child in offspring:
            self._memory.learn(self._lesson(child, noise))
        self._memory.close_generation()
        self.noise_sd = noise.sd_log_perplexity
        best = max(population, key=fitness_or_least)
        self.best_by_generation.append(fitness_or_least(best))
        self._journal.once(
            "generation",
            str(generation),
            lambda: (
                {
                    "generation": generation,
                    **self._where,
                    "population": [agent.individual_id for agent in population],
                    "survivors": [agent.individual_id for agent in survivors],
                    "best": {**_means([best], "metrics"), "fitness": best.fitness},
                    "mean": _means(population, "metrics"),
                    "noise_sd": noise.sd_log_perplexity,
                },
                {
                    "best": _means([best], "rates"),
                    "mean": _means(population, "rates"),
                    "seconds": seconds,
                },
            ),
            given={"best_id": best.individual_id},
        )
        self._drop_checkpoints(population)
        return population

    def _lesson(self, child: Individual, noise: NoiseFloor) -> Lesson:
        parent = self._individuals[child.parent_ids[0]]
        effect = None
        if child.fitness is not None and parent.fitness is not None:
            effect = child.fitness - parent.fitness
        return Lesson(
            individual_id=child.individual_id,
            generation=child.generation,
            parent_id=parent.individual_id,
            editor_id=child.editor_id or parent.individual_id,
            edits=child.edits[len(child.edits) - child.n_new_edits :],
            summary=child.summary,
            status=child.status,
            expected_effect=self._expected[child.individual_id],
            effect=effect,
            z_score=z_score(effect, noise),
            error="" if child.is_ok else f"{child.reason.value}: {child.message}",
        )

    @property
    def _where(self) -> dict[str, int]:
        """What events tell of the environment; nothing in the one that the run began in."""
        return {"environment": self.environment} if self.environment else {}

    def _drop_checkpoints(self, living: Sequence[Individual]) -> None:
        if self._keep_all or self.base is None:
            return
        kept = {agent.individual_id for agent in living} | {self.base.individual_id}
        # The best so far may not have survived (selection by chance), and is still to be claimed.
        kept.add(max(self._individuals.values(), key=fitness_or_least).individual_id)
        for name in self._individuals.keys() - kept:
            (self._folder / name / CHECKPOINT).unlink(missing_ok=True)


def fitness_or_least(individual: Individual) -> float:
    """Return a fitness to sort by: unknown comes last."""
    return float("-inf") if individual.fitness is None else individual.fitness


def _payload(individual: Individual) -> dict[str, Any]:
    return {
        "generation": individual.generation,
        "slot": individual.slot,
        "parent_ids": list(individual.parent_ids),
        "editor_id": individual.editor_id,
        "edits": [asdict(edit) for edit in individual.edits],
        "n_new_edits": individual.n_new_edits,
        "summary": individual.summary,
        "reason": individual.reason.value,
        "message": individual.message,
        "metrics": dict(individual.metrics),
        "fitness": individual.fitness,
        "attempts": individual.attempts,
        "repaired": individual.repaired,
        "model": None if individual.model is None else asdict(individual.model),
    }


def _means(population: Sequence[Individual], which: str) -> dict[str, float]:
    """Return the mean of each metric (or rate) over those in the population who have it."""
    found: dict[str, list[float]] = {}
    for agent in population:
        values: Mapping[str, float] = getattr(agent, which)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def _times(result: JobResult) -> dict[str, float]:
    training, scored = result.training, result.evaluation
    return {
        "startup_seconds": training.startup_seconds + (scored.startup_seconds if scored else 0.0),
        "training_seconds": training.training_seconds,
        "scoring_seconds": scored.scoring_seconds if scored else 0.0,
        "overhead_seconds": result.overhead_seconds,
        "total_seconds": result.total_seconds,
    }
