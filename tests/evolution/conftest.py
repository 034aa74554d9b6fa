"""An evolution without training: jobs are answered from a hash of the code, at once."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from darwin_exp.effects import Effects
from darwin_exp.evolution import Parts, Plan, evolve
from darwin_exp.fitness import Fitness, PerplexityFitness
from darwin_exp.hitl.inbox import FILE_NAME, Inbox
from darwin_exp.hitl.policy import Policy
from darwin_exp.individual import (
    DataSpec,
    Edit,
    Evaluation,
    EvaluationSpec,
    Genome,
    Individual,
    Job,
    JobResult,
    Proposal,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.journal import Journal
from darwin_exp.means import Means
from darwin_exp.memory import JsonMemory
from darwin_exp.people import People
from darwin_exp.protocols import EditFailed, EditRequest, InfrastructureFailure, Memory
from darwin_exp.reviews import Reviews
from darwin_exp.selection import Truncation
from darwin_exp.trials import Bench, Trials
from darwin_exp.turns import Turns

BASE = Genome.of({"train.py": "rate = 1\n", "model.py": "width = 1\n"})


class AppendingMutator:
    """Adds a line with a drawn number: every draft differs, unless `numbers` is small."""

    trusted = True

    def __init__(self, numbers: int = 10**9, max_drafts: int = 8) -> None:
        self.numbers, self.max_drafts = numbers, max_drafts
        self.requests: list[EditRequest] = []

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        self.requests.append(request)
        number = rng.randrange(self.numbers)
        code = request.parent.genome.as_dict["train.py"] + f"step = {number}\n"
        edit = Edit("append", "train.py", "to see what happens", {"number": number})
        genome = request.parent.genome.with_files({"train.py": code})
        return Proposal(genome, (*request.parent.edits, edit), 1, f"step {number}")

    def repair(
        self, request: EditRequest, failed: Proposal, failure: JobResult, rng: Random
    ) -> Proposal:
        if "cannot be mended" in failure.training.message:
            raise EditFailed(Reason.NOTHING_TO_EDIT, "no cure")
        genome = failed.genome.with_files(
            {"train.py": failed.genome.as_dict["train.py"] + "mended = 1\n"}
        )
        return Proposal(genome, failed.edits, failed.n_new, failed.summary + ", mended")


Rule = Callable[[Job], JobResult | None]


class HashingExecutor:
    """Answers jobs at once; perplexity comes from the code, noise from the seed."""

    def __init__(self, n_slots: int = 1, rule: Rule | None = None) -> None:
        self.n_slots, self.rule = n_slots, rule
        self.jobs: list[Job] = []
        self._mutex = threading.Lock()

    def submit(self, job: Job) -> Future[JobResult]:
        future: Future[JobResult] = Future()
        with self._mutex:
            self.jobs.append(job)
        try:
            result = self.rule(job) if self.rule else None
        except InfrastructureFailure as failure:
            future.set_exception(failure)
            return future
        future.set_result(result or answer(job))
        return future

    def close(self, cancel: bool = False) -> None:
        pass


def answer(job: Job) -> JobResult:
    quality = int(hashlib.sha256(job.genome.fingerprint.encode()).hexdigest()[:6], 16) / 2**24
    perplexity = 10.0 - 2.0 * quality + 0.01 * Random(job.training.seed).gauss(0, 1)
    steps = job.training.max_steps or 100
    training = TrainingRun(
        Status.OK, training_seconds=steps / 100, steps_claimed=steps, tokens_claimed=10 * steps
    )
    if job.evaluation is None:
        return JobResult(job.job_id, training, None, 1.0)
    metrics = {f"{job.evaluation.split}_perplexity": perplexity}
    mfu = 0.2 + 0.1 * quality
    rates = {"tokens_per_second": 1000.0, "mfu": mfu, "mfu_claimed": mfu}
    details = {"speed": {"flops_per_token": mfu, "peak_flops": 1000.0}}
    scored = Evaluation(Status.OK, metrics=metrics, rates=rates, details=details)
    return JobResult(job.job_id, training, scored, 1.0)


def failing(job: Job, status: Status, reason: Reason, message: str = "") -> JobResult:
    return JobResult(job.job_id, TrainingRun(status, reason, message, log_tail="Traceback: boom"))


@dataclass
class Spectator:
    """Remembers what a person would have been shown."""

    finished: list[str] = field(default_factory=list)

    def generation_started(self, generation: int, n_generations: int) -> None:
        pass

    def individual_finished(self, individual: Individual, base: Individual | None) -> None:
        self.finished.append(individual.individual_id)

    def progress(self, done: int, total: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass


@dataclass
class Rehearsal:
    """One evolution in a folder; every argument can be replaced before `run`."""

    folder: Path
    mutator: AppendingMutator = field(default_factory=AppendingMutator)
    executor: HashingExecutor = field(default_factory=HashingExecutor)
    watch: Spectator = field(default_factory=Spectator)
    memory: Memory | None = None
    fitness: Fitness = field(default_factory=PerplexityFitness)
    plan: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    max_hours: float | None = None
    review: str = "none"
    policy: Policy = field(default_factory=Policy)
    people: People | None = None  # once it runs

    @property
    def inbox(self) -> Inbox:
        """What people write to, and the run reads."""
        return Inbox(self.folder / FILE_NAME)

    def run(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.folder)
        bench = Bench(
            seed=3,
            integrity_key=b"key",
            data=DataSpec(self.folder, "hash", 4),
            training=TrainingSpec(1.0, self.max_steps, 0, 8),
            evaluation=EvaluationSpec("val"),
            sandbox=SandboxSpec("process"),
            run_folder=self.folder,
        )
        trials = Trials(bench, self.executor, journal)
        try:
            people = self.people = People(
                journal,
                self.folder.name,
                Turns(self.executor.n_slots),
                trials.stopping,
                self.inbox,
                self.policy,
                announce=self.watch.note,
                caps={"max_hours": self.max_hours},
                told=journal.of_kind("inbox"),
            )
            parts = Parts(
                mutator=self.mutator,
                selector=Truncation(elitism=1),
                fitness=self.fitness,
                memory=self.memory or JsonMemory(self.folder / "memory", "population", 100),
                trials=trials,
                journal=journal,
                people=people,
                reviews=Reviews(
                    people,
                    journal,
                    self.review,
                    known=[event.key for event in journal.of_kind("review")],
                ),
                effects=Effects(journal, Means(self.folder, self.folder, image="sha256:own")),
                watch=self.watch,
                n_slots=self.executor.n_slots,
                run_folder=self.folder,
            )
            evolve(BASE, self.the_plan, parts)
        finally:
            journal.close()
        return journal

    @property
    def the_plan(self) -> Plan:
        defaults: dict[str, Any] = {
            "seed": 3,
            "population_size": 5,
            "n_survivors": 2,
            "n_generations": 3,
            "reject_duplicates": True,
            "keep_all_checkpoints": False,
            "stagnation_generations": None,
            "stuck_generations": None,
            "pair_with_peers": True,
            "crossover_probability": 0.5,
            "max_repairs": 1,
            "smoke_steps": 0,
            "n_base_repeats": 3,
            "n_claim_seeds": 4,
            "n_equal_steps": 3,
            "n_timings": 1,
            "has_test": True,
            "max_steps": self.max_steps,
        }
        return Plan(**{**defaults, **self.plan})


@pytest.fixture
def rehearse(tmp_path: Path) -> Callable[..., Rehearsal]:
    def make(folder: str = "run", **changes: Any) -> Rehearsal:
        return Rehearsal(tmp_path / folder, **changes)

    return make


@pytest.fixture
def executor_with() -> Callable[..., HashingExecutor]:
    return HashingExecutor


@pytest.fixture
def answered() -> Callable[[Job], JobResult]:
    return answer


@pytest.fixture
def mutator_with() -> Callable[..., AppendingMutator]:
    return AppendingMutator


@pytest.fixture
def fail() -> Callable[..., JobResult]:
    return failing


@pytest.fixture
def statuses() -> Callable[[Journal], Sequence[str]]:
    return lambda journal: [event.payload["status"] for event in journal.of_kind("individual")]
