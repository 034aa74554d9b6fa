"""The swap points: the whole architecture on one screen.

Config builds parts; `evolution` moves individuals through the parts; parts never import each
other; only the journal remembers. A new feature is a new variant of one of these and a YAML file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any, Protocol

from darwin_exp.individual import (
    Edit,
    Evaluation,
    Genome,
    Individual,
    Job,
    JobResult,
    ModelSpec,
    Proposal,
    Reason,
    Status,
    TrainingRun,
)


class EditFailed(Exception):
    """A mutator had nothing to offer, or its edit did not apply.

    Args:
        again: whether a draft that is told of this may do better.
        attempted: the rewrite that was turned down, where there was one.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        again: bool = False,
        attempted: Proposal | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.again = again
        self.attempted = attempted


class InfrastructureFailure(Exception):
    """Our fault, not the candidate's: the job may be tried again."""


class SandboxUnavailable(Exception):
    """The sandbox asked for cannot work on this machine; the message says what would mend it."""


class Interrupted(Exception):
    """The run was asked to stop; whatever was under way was not recorded."""


class Stopped(Exception):
    """A cap ended the run before its last generation; it can be resumed."""


class ModelsUnavailable(Exception):
    """The language models asked for cannot be used; the message says what would mend it."""


# --- mutation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """One entry of a memory: what was tried, by whom, and what came of it.

    Attributes:
        effect: change of fitness against the parent (higher is better); None if not measured.
        z_score: effect in units of the noise floor's standard deviation of a difference.
    """

    individual_id: str
    generation: int
    parent_id: str
    editor_id: str
    edits: tuple[Edit, ...]
    summary: str
    status: Status
    expected_effect: str = ""
    effect: float | None = None
    z_score: float | None = None
    error: str = ""


@dataclass(frozen=True)
class EditRequest:
    """What a mutator is told before it edits.

    Attributes:
        parent: whose code is edited.
        editor: whose knowledge edits it.
        mate: second parent of a crossover, or None.
        lessons: what the editor's memory offers; empty when memory is off.
        objections: why earlier drafts for this same individual and attempt were turned down.
        ordinal: how many individuals were requested before this one.
        individual_id: whom the rewrite is for.
        generation: of that individual.
        attempt: 0 for the first training, 1 for the first repair, and so on.
        base: what everything is compared with; None before it was measured.
        noise: standard deviation of the base's repeated fitness; None until it is known.
        guidance: what people have to say to this editor, in their own words, the oldest first.
        came_of_requests: what became of what this editor asked people for, and what is in force
            for everybody; agents' words may be among it.
    """

    parent: Individual
    editor: Individual
    mate: Individual | None = None
    lessons: tuple[Lesson, ...] = ()
    objections: tuple[str, ...] = ()
    ordinal: int = 0
    individual_id: str = ""
    generation: int = 0
    attempt: int = 0
    base: Individual | None = None
    noise: float | None = None
    guidance: tuple[str, ...] = ()
    came_of_requests: tuple[str, ...] = ()


class Mutator(Protocol):
    """Rewrites a genome. Pure up to `rng` (and, for a model, the journaled exchange)."""

    @property
    def trusted(self) -> bool:
        """Tell whether every edit is this project's own code."""
        ...

    @property
    def max_drafts(self) -> int:
        """Return how often it may draft for one individual, objections included."""
        ...

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        """Return a rewritten genome.

        Raises:
            EditFailed: nothing fits this parent.
        """
        ...

    def repair(
        self, request: EditRequest, failed: Proposal, failure: JobResult, rng: Random
    ) -> Proposal:
        """Return a mended version of a proposal whose job failed.

        Raises:
            EditFailed: it knows no cure.
        """
        ...


# --- language models --------------------------------------------------------------------------


class Finish(Enum):
    """How a language model's answer ended."""

    COMPLETE = "complete"
    LENGTH = "length"  # cut off at the most tokens that it may have: nothing of it is used
    REFUSED = "refused"  # a refusal, a content filter, or nothing at all


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: its role ("system", "user" or "assistant") and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class Query:
    """One question to a language model, known by its key: it is paid for once.

    Attributes:
        key: unique within a run and the same in a resumed one, such as "g01-i03/0/1": the
            individual, the attempt (0, or the number of a repair) and the call within it.
        purpose: "draft" or "repair".
        schema: JSON schema that the answer keeps, with a "title"; None for free text.
        max_tokens: longest answer.
    """

    key: str
    individual_id: str
    purpose: str
    model: ModelSpec
    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """What a language model answered.

    Attributes:
        usd: what it cost; None where its price is not known.
    """

    text: str
    finish: Finish
    tokens_in: int
    tokens_out: int
    usd: float | None = None


class LanguageModels(Protocol):
    """Asks language models, each question once: the answer is remembered before it is used."""

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the model that makes this edit, the same whenever it is asked again."""
        ...

    def ask(self, query: Query) -> Reply:
        """Return the answer, from memory where the question was answered before.

        Raises:
            Stopped: a cap on money, tokens or calls is reached, or the endpoint is down and the
                run shall not wait for it.
            ModelsUnavailable: no key, a wrong one, no such model, no such endpoint.
            Interrupted: the run is stopping.
        """
        ...


# --- sandbox ----------------------------------------------------------------------------------


class Zone(Enum):
    """Which harness program runs first in a sandbox; both then load genome code."""

    TRAIN = "train"
    MODEL = "model"


@dataclass(frozen=True)
class Limits:
    """What one sandboxed group may use."""

    startup_seconds: float = 60.0
    threads: int = 1
    memory_mb: int = 4096
    file_mb: int = 1024
    max_processes: int = 256
    log_bytes: int = 1_000_000
    device: str = "cpu"


@dataclass(frozen=True)
class Launch:
    """A program to start in a sandbox.

    Inside, the working directory holds `job.json`, `code/` (the genome, read-only), `in/`
    (read-only inputs by name) and `out/` (the only writable folder beside a private temp).

    Attributes:
        name: for labels and process titles; holds no secret.
        inputs: host path by the name under which it appears in `in/`.
        job: content of `job.json`; its paths are relative to the working directory.
        labels: what else tells people whose it is, such as "run"; the program does not see them.
    """

    name: str
    zone: Zone
    genome: Genome
    inputs: Mapping[str, Path]
    job: Mapping[str, Any]
    limits: Limits
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exit:
    """How a sandboxed group ended.

    Attributes:
        code: exit status, negative for a signal; None if the harness killed it, or the kernel did
            for others' memory.
        out_of_memory: it went past `Limits.memory_mb`.
        run_delay_seconds: CPU time that its slot owed it and others took.
    """

    code: int | None
    out_of_memory: bool = False
    cpu_seconds: float = 0.0
    run_delay_seconds: float = 0.0


class Sandboxed(Protocol):
    """One started group of processes, none of which runs once `close` has returned.

    What a sandbox then still has to put away, it has put away before the next group is used, or it
    is closed itself.
    """

    startup_seconds: float  # launch to ready signal
    ready_at: float  # time.monotonic() of the ready signal

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the group's main process to end; return whether it did."""
        ...

    def send(self, data: bytes, deadline: float) -> None:
        """Write to a MODEL program; raises InfrastructureFailure, TimeoutError or EOFError."""
        ...

    def receive(self, n_bytes: int, deadline: float) -> bytes:
        """Read exactly so many bytes; raises TimeoutError at the deadline, EOFError at its end."""
        ...

    def freeze(self) -> None:
        """Stop every process of the group, so that nothing is written from here on."""
        ...

    def collect(self, names: Iterable[str], destination: Path, max_bytes: int) -> dict[str, str]:
        """Copy plain files out of `out/`; return why each name that could not be taken was not.

        Symlinks, special files and anything beyond `max_bytes` are never followed or opened.
        """
        ...

    def log(self) -> tuple[str, bool]:
        """Return the end of what the group printed, and whether more was cut off."""
        ...

    def close(self) -> Exit:
        """Kill the whole group, verify that it is gone, remove its folders. Idempotent."""
        ...


class Sandbox(Protocol):
    """Runs untrusted programs of one slot; what is our failure raises InfrastructureFailure."""

    @property
    def name(self) -> str:
        """Return what the configuration calls it."""
        ...

    def warm_up(self) -> None:
        """Do ahead of time what every start needs, so that no candidate's time is spent on it."""
        ...

    def start(self, launch: Launch) -> Sandboxed:
        """Start a program and return once it has signalled ready.

        Raises:
            InfrastructureFailure: it was not ready within `Limits.startup_seconds`.
        """
        ...

    def close(self) -> None:
        """End every group that is still alive and give back what the sandbox holds. Idempotent."""
        ...


# --- evaluation, selection, execution ---------------------------------------------------------


class Evaluator(Protocol):
    """Scores a trained model in code that no genome byte reaches."""

    def evaluate(self, job: Job, training: TrainingRun, sandbox: Sandbox) -> Evaluation:
        """Return metrics, or a typed refusal; never raises for what a candidate does.

        Raises:
            InfrastructureFailure: the scoring itself could not be carried out.
        """
        ...


class Selector(Protocol):
    """Chooses who lives on and who reproduces. Pure functions of their arguments."""

    def survivors(self, population: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return at most n evaluated individuals, each at most once."""
        ...

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return n parents, with repetition where needed."""
        ...


class Executor(Protocol):
    """Runs jobs on slots. `submit` may block only while every slot is taken (serial)."""

    n_slots: int

    def submit(self, job: Job) -> Future[JobResult]:
        """Queue a job; its Future raises InfrastructureFailure or Interrupted, nothing else."""
        ...

    def close(self, cancel: bool = False) -> None:
        """Wait for what runs, or with `cancel` kill it; then free every slot. Idempotent."""
        ...


# --- what remembers and what people see -------------------------------------------------------


class Memory(Protocol):
    """What one generation tells the next."""

    problems: list[str]  # what could not be written, a sentence each

    def learn(self, lesson: Lesson) -> None:
        """Take in an outcome; it can be recalled once its generation is closed."""
        ...

    def close_generation(self) -> None:
        """Let what was learned since the last call be recalled; siblings learn nothing earlier."""
        ...

    def recall(self, parent: Individual, editor: Individual) -> tuple[Lesson, ...]:
        """Return what the editor may use when it edits this parent, oldest first."""
        ...


@dataclass(frozen=True)
class Event:
    """One line of the journal.

    Attributes:
        kind: what happened, such as "individual" or "job_finished".
        key: which one; (kind, key) is unique.
        payload: what the run's future depends on; equal in a repeated run.
        measured: times and rates, which differ from run to run.
    """

    sequence: int
    kind: str
    key: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    written_at: float = 0.0


class Tracker(Protocol):
    """A projection of the journal for people to look at. Never raises into the run."""

    @property
    def run_id(self) -> str | None:
        """Return the tracker's own id of the evolution's run; None while it has none."""
        ...

    def follow(self, event: Event) -> None:
        """Take note of an event; returns at once."""
        ...

    def ready(self, seconds: float) -> bool:
        """Wait at most so long for its first start; return whether nothing is left to wait for."""
        ...

    def close(self, seconds: float) -> int:
        """Deliver what is outstanding within so many seconds; return how many events remain."""
        ...
