"""The rounds: trains several variants side by side, one training of each and then the next seed.

Reads: the ablation's journal. Writes: trainings, through `trials`.
Never: lets one variant always go first, or on the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from darwin_exp.ablate.display import Display
from darwin_exp.ablate.verdicts import Sample
from darwin_exp.individual import Genome, JobResult, Purpose, Status
from darwin_exp.journal import Journal
from darwin_exp.protocols import Interrupted
from darwin_exp.trials import BASE_ID, Trial, Trials
from darwin_exp.wording import number

BASE = "base"


@dataclass(frozen=True)
class Arm:
    """A genome that is trained with several seeds beside others."""

    name: str
    genome: Genome


@dataclass(frozen=True)
class Rounds:
    """Trains arms, each as often as there are seeds.

    Attributes:
        champion_id: goes into the names of the trainings, from which their seeds are drawn.
    """

    trials: Trials
    n_slots: int
    journal: Journal
    champion_id: str
    split: str
    n_seeds: int
    display: Display

    def train(self, arms: Sequence[Arm]) -> dict[str, Sample]:
        """Return what came of each arm, by its genome's id.

        One that fails with its first seed is not trained again: what its code does wrong, it does
        every time.

        Raises:
            Interrupted, KeyboardInterrupt: somebody stopped it.
            Broken: nothing can be trained here any more.
        """
        self.display.expect(self.n_seeds * len(arms))
        results: dict[str, list[JobResult]] = {arm.genome.id: [] for arm in arms}
        self._train(arms, range(1), results)
        alive = [arm for arm in arms if not _has_failed(results[arm.genome.id][0])]
        self.display.expect(-(self.n_seeds - 1) * (len(arms) - len(alive)))
        self._train(alive, range(1, self.n_seeds), results)
        return {genome_id: Sample.of(ended, self.split) for genome_id, ended in results.items()}

    def _train(
        self, arms: Sequence[Arm], seeds: range, results: dict[str, list[JobResult]]
    ) -> None:
        order = [(arm, seed) for seed in seeds for arm in _turned(arms, seed)]
        tasks = [self._task(arm, seed) for arm, seed in order]
        ended = at_once(tasks, self.n_slots, self.trials.stop)
        for (arm, _), result in zip(order, ended, strict=True):
            results[arm.genome.id].append(result)

    def _task(self, arm: Arm, seed: int) -> Callable[[], JobResult]:
        place = f"{self.champion_id}/{arm.name}/{seed}"
        name = f"ablation/{place}"  # a name of its own, and so a seed of its own
        whose = BASE_ID if arm.name == BASE else f"{self.champion_id}/{arm.name}"
        trial = Trial(name, whose, Purpose.CLAIM, arm.genome, self.split, f"trainings/{place}")

        def train() -> JobResult:
            recorded = self.journal.find("job", name) is not None
            result = self.trials.run(trial)
            self.display.trained(arm.name, seed, _in_words(result, self.split), recorded)
            return result

        return train


def at_once(
    tasks: Sequence[Callable[[], JobResult]], n_slots: int, stop: Callable[[], None]
) -> list[JobResult]:
    """Carry out tasks on as many threads as there are slots; results in the tasks' order.

    Once one of them fails, or somebody interrupts, no other is begun and `stop` ends those that
    are under way.

    Raises:
        BaseException: whatever the first task to fail raised.
    """
    failures: list[BaseException] = []

    def guarded(task: Callable[[], JobResult]) -> JobResult:
        if failures:
            raise Interrupted
        try:
            return task()
        except BaseException as failure:
            failures.append(failure)
            raise

    with ThreadPoolExecutor(n_slots, thread_name_prefix="variant") as pool:
        futures = [pool.submit(guarded, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException as interruption:
            failures.append(interruption)
        if failures:
            stop()
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def _turned(arms: Sequence[Arm], by: int) -> list[Arm]:
    """Return the arms, beginning elsewhere each time."""
    k = by % len(arms) if arms else 0
    return [*arms[k:], *arms[:k]]


def _has_failed(result: JobResult) -> bool:
    return result.outcome.status not in (Status.OK, Status.INFRA_LOST)


def _in_words(result: JobResult, split: str) -> str:
    scored = result.evaluation
    if scored is not None and scored.status is Status.OK:
        words = f"perplexity {number(scored.metrics[f'{split}_perplexity'])}"
        return f"{words}  contended" if result.contended else words
    return f"{result.outcome.status.value}: {result.outcome.message[:200]}".rstrip(": ")
