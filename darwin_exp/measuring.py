"""Measuring: the base and individuals trained and scored, in whichever environment is current.

Reads: genomes. Writes: through trials, the journal and the folders of individuals.
Never: decides who is measured, or what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from darwin_exp.archive import Archive
from darwin_exp.births import Birth
from darwin_exp.gates import smoke_objection
from darwin_exp.individual import Genome, Individual, JobResult, Purpose, Status
from darwin_exp.trials import BASE_ID, Trial, Trials

SMOKE_SECONDS = 120.0  # for a few steps, and for compiling before them
AtOnce = Callable[[Iterable[Callable[[], Any]]], list[Any]]


class BaseFailed(Exception):
    """The base genome could not be trained and scored, so nothing can be compared with it."""


@dataclass(frozen=True)
class Measuring:
    """Has genomes trained and scored.

    Attributes:
        at_once: runs tasks on all slots and returns their results in order.
        n_bases_at_once: trainings of the base that take the slots beside it at the beginning.
        smoke_steps: steps of a draft's trial before it gets a budget.
    """

    trials: Trials
    archive: Archive
    at_once: AtOnce
    n_bases_at_once: int
    smoke_steps: int
    keeps_all: bool

    def train_base(self, genome: Genome, n: int) -> list[JobResult]:
        """Train the base n times, beside itself: it meets the load that all later ones meet.

        Raises:
            BaseFailed: the first of them does not train and score.
        """
        folders = [
            "",
            *(f"{BASE_ID}/{self._where.replace('/', '-')}beside-{k}" for k in range(1, n)),
        ]
        names = [f"{BASE_ID}/0", *(f"{BASE_ID}/beside-{k}" for k in range(1, n))]
        result, *beside = self.at_once(
            lambda name=name, folder=folder: self._trial(  # type: ignore[misc]
                BASE_ID, name, Purpose.BASE_REPEAT, genome, folder
            )
            for name, folder in zip(names, folders, strict=True)
        )
        if result.outcome.status is not Status.OK:
            tail = "\n".join(result.training.log_tail.splitlines()[-12:])
            raise BaseFailed(
                f"the base genome does not train and score: {result.outcome.status.value} "
                f"({result.outcome.message or result.outcome.reason.value})\n{tail}".rstrip()
            )
        return [result, *beside]

    def compare_with(self, base: Individual, beside: Sequence[JobResult]) -> None:
        """Compare everybody from now on with the base, as it was just measured.

        Args:
            beside: its other trainings, for the noise floor.
        """
        self.archive.found(base)
        for again in beside:
            self.archive.repeat_of_base(self.archive.judged(base, again, attempts=1))

    def repeat_base(self, repeat: int) -> None:
        """Train the base once more among the others, for the noise floor."""
        base = self.archive.base
        assert base is not None
        name = f"{BASE_ID}/repeat-{repeat}"
        result = self._trial(BASE_ID, name, Purpose.BASE_REPEAT, base.genome, name)
        self.archive.repeat_of_base(self.archive.judged(base, result, attempts=1))

    def train(self, individual_id: str, name: str, genome: Genome) -> JobResult:
        """Train and score an individual's code, for the first time or mended."""
        return self._trial(individual_id, name, Purpose.SEARCH, genome, is_new=True)

    def again(self, individual: Individual) -> Individual:
        """Return a living individual as it is in this environment; unknown fitness if it fails."""
        name = individual.individual_id
        result = self._trial(name, f"{name}/0", Purpose.SEARCH, individual.genome)
        measured = self.archive.judged(individual, result, individual.attempts)
        self.archive.record_again(measured, result)
        return measured

    def smoke(self, birth: Birth, genome: Genome, draft: str) -> str | None:
        """Train a draft for a few steps; return why it fails them, or None."""
        name = birth.individual_id
        trial = Trial(
            f"{name}/smoke-{draft}",
            name,
            Purpose.SMOKE,
            genome,
            split=None,
            folder=f"individuals/{name}/smoke",
            max_steps=self.smoke_steps,
            most_seconds=SMOKE_SECONDS,
        )
        return smoke_objection(self.trials.run(trial))

    def try_out(self, genome: Genome, attempt: str) -> None:
        """Train a few steps of the base, whatever comes of it, under the conditions of now.

        Raises:
            Broken: nothing can be trained under them.
        """
        name = f"{BASE_ID}/smoke-{attempt}"
        self.trials.run(
            Trial(
                name,
                BASE_ID,
                Purpose.SMOKE,
                genome,
                split=None,
                folder=f"individuals/{name}",
                max_steps=3,
                most_seconds=SMOKE_SECONDS,
            )
        )

    def _trial(
        self,
        individual_id: str,
        name: str,
        purpose: Purpose,
        genome: Genome,
        folder: str = "",
        is_new: bool = False,
    ) -> JobResult:
        """Carry out a trial.

        Args:
            folder: where it leaves its files; the individual's own where nothing is said.
            is_new: whether no environment before this one can have measured it.
        """
        wanted = not folder or self.keeps_all
        return self.trials.run(
            Trial(
                name if is_new else f"{self._where}{name}",
                individual_id,
                purpose,
                genome,
                "val",
                f"individuals/{folder or individual_id}",
                keeps_model=wanted,
            )
        )

    @property
    def _where(self) -> str:
        """What trials are called by, of those that earlier environments may have measured."""
        environment = self.trials.environment
        return f"e{environment}/" if environment else ""
