"""The rounds: trains several variants side by side, one training of each and then the next seed.

Reads: the ablation's journal. Writes: trainings, through `trials`.
Never: lets one variant always go first, or on the same slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from darwin_exp.ablate.display import Display
from darwin_exp.ablate.verdicts import Sample, fails_for_good
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

        All trainings stand in one row, seed by seed, so that no slot idles while others work. An
        arm that has failed for good is not trained with its further seeds.

        Raises:
            Interrupted, KeyboardInterrupt: somebody stopped it.
            Broken: nothing can be trained here any more.
        """
        self.display.expect(self.n_seeds * len(arms))
        ended: dict[str, dict[int, JobResult]] = {arm.genome.id: {} for arm in arms}
        # The last of all may have no neighbour, and so a quieter machine. The rounds are turned so
        # that it is the first arm's: the base's, with which no part is compared.
        order = [
            (arm, seed)
            for seed in range(self.n_seeds)
            for arm in _turned(arms, seed + 2 - self.n_seeds)
        ]
        tasks = [self._task(arm, seed, ended[arm.genome.id]) for arm, seed in order]
        at_once(tasks, self.n_slots, self.trials.stop)
        return {
            genome_id: Sample.of(_counted(by_seed), self.split)
            for genome_id, by_seed in ended.items()
        }

    def _task(self, arm: Arm, seed: int, ended: dict[int, JobResult]) -> Callable[[], None]:
        """Return the training of an arm with a seed, which puts its result among those ended."""
        place = f"{self.champion_id}/{arm.name}/{seed}"
        name = f"ablation/{place}"  # a name of its own, and so a seed of its own
        whose = BASE_ID if arm.name == BASE else f"{self.champion_id}/{arm.name}"
        trial = Trial(name, whose, Purpose.CLAIM, arm.genome, self.split, f"trainings/{place}")

        def train() -> None:
            if fails_for_good(_counted(ended)):
                self.display.expect(-1)
                return
            recorded = self.journal.find("job", name) is not None
            result = ended[seed] = self.trials.run(trial)
            self.display.trained(arm.name, seed, _in_words(result, self.split), recorded)

        return train


def _counted(ended: Mapping[int, JobResult]) -> list[JobResult]:
    """Return an arm's results by seed, up to the first that is missing or the last that counts.

    A seed that was begun beside the one that decided does not count, so that the same results
    mean the same whatever was trained side by side.
    """
    counted: list[JobResult] = []
    while len(counted) in ended and not fails_for_good(counted):
        counted.append(ended[len(counted)])
    return counted


def at_once(tasks: Sequence[Callable[[], object]], n_slots: int, stop: Callable[[], None]) -> None:
    """Carry out tasks, begun in their order, on as many threads as there are slots.

    Once one of them fails, or somebody interrupts, no other is begun and `stop` ends those that
    are under way.

    Raises:
        BaseException: whatever the first task to fail raised.
    """
    failures: list[BaseException] = []

    def guarded(task: Callable[[], object]) -> None:
        if failures:
            raise Interrupted
        try:
            task()
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


def _turned(arms: Sequence[Arm], by: int) -> list[Arm]:
    """Return the arms, beginning elsewhere each time."""
    k = by % len(arms) if arms else 0
    return [*arms[k:], *arms[:k]]


def _in_words(result: JobResult, split: str) -> str:
    scored = result.evaluation
    if scored is not None and scored.status is Status.OK:
        words = f"perplexity {number(scored.metrics[f'{split}_perplexity'])}"
        return f"{words}  contended" if result.contended else words
    return f"{result.outcome.status.value}: {result.outcome.message[:200]}".rstrip(": ")
