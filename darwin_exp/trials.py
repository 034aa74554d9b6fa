"""Trials: one training and scoring of a genome, carried out once however often a run is resumed.

A trial that we lost (a broken sandbox, a core that others took) is repeated; what is recorded in
the journal is what the rest of the run may know of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darwin_exp import randomness
from darwin_exp.conditions import Conditions
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Job,
    JobResult,
    Purpose,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import Executor, InfrastructureFailure, Interrupted

CHECKPOINT = "artefacts/model.safetensors"  # below the folder of a trial
BASE_ID = "g00-i00"
MAX_TRIES = 3  # a lost trial is repeated at most twice
# Selected code is examined harder for the claim than in the search: with so many times the
# prefixes, as far as so many cuts of each window go, and with so many of the windows asked for
# twice. That is about twice the tokens. What claims say of rates is not asked for: closing times
# them separately.
_CLAIMS = (Purpose.CLAIM, Purpose.EQUAL_STEPS)
CLAIM_PREFIXES, CLAIM_CUTS, CLAIM_SECOND_PASS = 4, 2, 0.5


class Broken(Exception):
    """Our side fails whatever is tried; the last loss was not recorded, so resuming tries again."""


@dataclass(frozen=True)
class Trial:
    """One training to be carried out.

    Attributes:
        name: unique within the run, such as "g01-i03/0"; the repeats add ".1" and ".2".
        split: what is scored; None trains only.
        folder: where its files are left, below the run's folder.
        max_steps: overrides the run's own number of steps.
        budget_seconds: overrides the run's own clock.
        most_seconds: lowers whichever clock there is.
        keeps_model: whether the trained weights are wanted once they are scored.
        shorter_run: tokens and seconds of a re-timing's other run.
    """

    name: str
    individual_id: str
    purpose: Purpose
    genome: Genome
    split: str | None
    folder: str
    max_steps: int | None = None
    budget_seconds: float | None = None
    most_seconds: float = math.inf
    keeps_model: bool = False
    shorter_run: tuple[int, float] | None = None


@dataclass(frozen=True)
class Bench:
    """What all trials of an environment have in common."""

    seed: int
    integrity_key: bytes
    data: DataSpec
    training: TrainingSpec
    evaluation: EvaluationSpec
    sandbox: SandboxSpec
    run_folder: Path


class Trials:
    """Carries out trials through the executor and records them in the journal.

    Attributes:
        stopping: set once the run is to end.
        environment: in which trials are carried out; 0 is the one that the run began in.
        conditions: what is other there than where the run began.
    """

    def __init__(self, bench: Bench, executor: Executor, journal: Journal) -> None:
        self._bench = self._own = bench
        self.environment = 0
        self.conditions = Conditions()
        self._executor = executor
        self._journal = journal
        self.stopping = threading.Event()
        self._mutex = threading.Lock()
        self._lost_in_a_row: list[str] = []  # individuals, since a trial last got through

    def stop(self) -> None:
        """Kill what is under way and refuse every trial from now on: they end with Interrupted."""
        self.stopping.set()
        self._executor.close(cancel=True)

    def enter(self, environment: int, conditions: Conditions) -> None:
        """Carry out every trial from now on under other conditions."""
        self.environment, self.conditions = environment, conditions
        self._bench = replace(
            self._own,
            data=conditions.data(self._own.data),
            training=conditions.training(self._own.training),
            sandbox=conditions.sandbox(self._own.sandbox),
        )

    def run(self, trial: Trial) -> JobResult:
        """Carry out a trial, repeated where it was lost, and return how it ended.

        Raises:
            Interrupted: the run is stopping; nothing of this trial was recorded.
            Broken: nothing gets through any more.
        """
        for attempt in range(MAX_TRIES):
            job = self._job(trial, attempt)
            last = attempt == MAX_TRIES - 1
            event = self._journal.once(
                "timing" if trial.purpose is Purpose.RETIME else "job",
                job.job_id,
                lambda job=job, last=last: self._carry_out(job, last),  # type: ignore[misc]
                given={
                    "individual_id": trial.individual_id,
                    "purpose": trial.purpose.value,
                    "genome_id": trial.genome.id,
                    "split": trial.split,
                    "seed": job.training.seed,
                    "max_steps": job.training.max_steps,
                    **({"environment": self.environment} if self.environment else {}),
                },
            )
            result = result_from(job.job_id, event.payload, event.measured)
            if not trial.keeps_model:
                (job.folder / CHECKPOINT).unlink(missing_ok=True)
            if result.training.status is not Status.INFRA_LOST:
                break
        return result

    def _job(self, trial: Trial, attempt: int) -> Job:
        bench = self._bench
        training = replace(
            bench.training,
            seed=randomness.training_seed(bench.seed, trial.name),
            max_steps=trial.max_steps or bench.training.max_steps,
            budget_seconds=min(
                trial.budget_seconds or bench.training.budget_seconds, trial.most_seconds
            ),
        )
        evaluation = None
        if trial.split is not None:
            evaluation = replace(bench.evaluation, split=trial.split)
            if trial.purpose in _CLAIMS:
                evaluation = replace(evaluation, verify_rate=False)
            if trial.purpose is Purpose.CLAIM and trial.individual_id != BASE_ID:
                evaluation = replace(
                    evaluation,
                    n_prefixes=CLAIM_PREFIXES * evaluation.n_prefixes,
                    cuts_per_window=CLAIM_CUTS,
                    second_pass=CLAIM_SECOND_PASS,
                )
            if trial.purpose is Purpose.RETIME:
                # Nothing but its speed is asked: one window shows that it is a model at all.
                evaluation = replace(
                    evaluation,
                    n_prefixes=0,
                    second_pass=0.0,
                    max_logits_bytes=1,
                    shorter_run=trial.shorter_run,
                )
        job_id = f"{trial.name}.{attempt}" if attempt else trial.name
        return Job(
            job_id=job_id,
            individual_id=trial.individual_id,
            purpose=trial.purpose,
            genome=trial.genome,
            data=bench.data,
            training=training,
            sandbox=bench.sandbox,
            evaluation=evaluation,
            secret=randomness.secret(bench.integrity_key, "scorer", job_id),
            folder=bench.run_folder / trial.folder,
            run_id=bench.run_folder.name,
        )

    def _carry_out(self, job: Job, last: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if self.stopping.is_set():
            raise Interrupted
        try:
            result = self._executor.submit(job).result()
            self._note_loss(None)
        except InfrastructureFailure as failure:
            self._note_loss(job.individual_id, failure)
            result = JobResult(job.job_id, _lost(Reason.INFRASTRUCTURE, str(failure)))
        if result.contended and not last:
            # Held against our machine, not against the candidate; the last try is kept and marked.
            why = (
                f"its threads waited {result.training.run_delay_seconds:.1f} s for a CPU that "
                "other processes held"
            )
            result = JobResult(
                job.job_id, _lost(Reason.CONTENTION, why), None, result.total_seconds
            )
        return _payload(result), _measured(result)

    def _note_loss(self, individual_id: str | None, failure: Exception | None = None) -> None:
        """Take note that a trial was lost, or (None) got through.

        Raises:
            Broken: as many in a row were lost as one trial is given tries, and no single candidate
                can be the cause: they are of several individuals, or of the base.
        """
        with self._mutex:
            if individual_id is None:
                self._lost_in_a_row.clear()
                return
            self._lost_in_a_row.append(individual_id)
            several = len(set(self._lost_in_a_row)) > 1 or individual_id == BASE_ID
            if len(self._lost_in_a_row) >= MAX_TRIES and several:
                raise Broken(f"nothing can be trained here any more: {failure}") from failure


def _lost(reason: Reason, message: str) -> TrainingRun:
    return TrainingRun(Status.INFRA_LOST, reason, message)


def _payload(result: JobResult) -> dict[str, Any]:
    outcome = result.outcome
    scored = result.evaluation
    return {
        "trained": result.training.status.value,
        "scored": None if scored is None else scored.status.value,
        "status": outcome.status.value,
        "reason": outcome.reason.value,
        "message": outcome.message,
        "exit_code": result.training.exit_code,
        "metrics": {} if scored is None else dict(scored.metrics),
    }


def _measured(result: JobResult) -> dict[str, Any]:
    training, scored = result.training, result.evaluation
    return {
        "rates": {} if scored is None else dict(scored.rates),
        "details": {} if scored is None else dict(scored.details),
        "stopped_at_budget": training.stopped_at_budget,
        "startup_seconds": training.startup_seconds + (scored.startup_seconds if scored else 0.0),
        "training_startup_seconds": training.startup_seconds,
        "training_seconds": training.training_seconds,
        "scoring_seconds": scored.scoring_seconds if scored else 0.0,
        "overhead_seconds": result.overhead_seconds,
        "total_seconds": result.total_seconds,
        "cpu_seconds": training.cpu_seconds,
        "run_delay_seconds": training.run_delay_seconds,
        "contended": result.contended,
        "steps_claimed": training.steps_claimed,
        "tokens_claimed": training.tokens_claimed,
        "loss_claimed": training.loss_claimed,
        "log_tail": training.log_tail,
        "log_truncated": training.log_truncated,
    }


def result_from(job_id: str, payload: Mapping[str, Any], measured: Mapping[str, Any]) -> JobResult:
    """Return the result that a "job" or "timing" event tells of, without its artefacts."""
    trained = Status(payload["trained"])
    scored = payload["scored"]
    decided_by_training = scored is None
    training = TrainingRun(
        status=trained,
        reason=Reason(payload["reason"]) if decided_by_training else Reason.NONE,
        message=payload["message"] if decided_by_training else "",
        stopped_at_budget=measured["stopped_at_budget"],
        startup_seconds=measured["training_startup_seconds"],
        training_seconds=measured["training_seconds"],
        cpu_seconds=measured["cpu_seconds"],
        run_delay_seconds=measured["run_delay_seconds"],
        exit_code=payload["exit_code"],
        steps_claimed=measured["steps_claimed"],
        tokens_claimed=measured["tokens_claimed"],
        loss_claimed=measured["loss_claimed"],
        log_tail=measured["log_tail"],
        log_truncated=measured["log_truncated"],
    )
    evaluation = None
    if scored is not None:
        evaluation = Evaluation(
            status=Status(scored),
            reason=Reason(payload["reason"]),
            message=payload["message"],
            metrics=payload["metrics"],
            rates=measured["rates"],
            details=measured["details"],
            startup_seconds=measured["startup_seconds"] - measured["training_startup_seconds"],
            scoring_seconds=measured["scoring_seconds"],
        )
    return JobResult(job_id, training, evaluation, measured["total_seconds"], measured["contended"])
