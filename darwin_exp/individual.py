"""The nouns of an evolution: genomes, individuals, proposals, jobs and what came of them.

Everything here is frozen and knows nothing of the stages that make or use it, so that any
of it can be pickled to another node, written to the journal, or compared in a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from darwin_exp.genome import Genome as Genome


class Status(Enum):
    """What became of an individual, a training run or an evaluation."""

    OK = "OK"  # trained and scored
    CRASHED = "CRASHED"  # the training code ended by itself without a usable result
    TIMED_OUT = "TIMED_OUT"  # frozen at its budget with no complete checkpoint
    OUT_OF_MEMORY = "OUT_OF_MEMORY"  # went past its memory limit
    INVALID = "INVALID"  # the edit did not apply, parse or keep the contract
    DUPLICATE = "DUPLICATE"  # the same code was seen before
    REJECTED = "REJECTED"  # failed an integrity check
    QUARANTINED = "QUARANTINED"  # killed its evaluator too often to be tried again
    INFRA_LOST = "INFRA_LOST"  # our fault: retried, never held against the individual


class Reason(Enum):
    """Why a status is not OK; the sentence beside it says it in words."""

    NONE = "none"
    # INVALID and DUPLICATE
    DOES_NOT_APPLY = "does_not_apply"
    SYNTAX = "syntax"
    CONTRACT = "contract"
    NO_OP = "no_op"
    SEEN_BEFORE = "seen_before"
    FORBIDDEN_PATH = "forbidden_path"
    FORBIDDEN_IMPORT = "forbidden_import"  # of a module that training code has no need of
    HIDDEN_DATA = "hidden_data"  # more literal data than code needs: weights or text, perhaps
    NOTHING_TO_EDIT = "nothing_to_edit"
    MALFORMED = "malformed"  # a model's answer that could not be read
    TRUNCATED = "truncated"  # a model's answer that was cut off, of which nothing is used
    REFUSED = "refused"  # a model would not answer, or answered nothing
    SMOKE = "smoke"  # failed its first few steps, before a budget was spent on it
    NOT_APPROVED = "not_approved"  # a person was asked first, and did not say yes
    # training
    EXCEPTION = "exception"
    SIGNAL = "signal"
    MEMORY = "memory"
    NO_CHECKPOINT = "no_checkpoint"
    # artefacts and integrity
    ARTEFACT = "artefact"
    MODEL_CODE = "model_code"
    SHAPE = "shape"
    NONFINITE = "nonfinite"
    CAUSALITY = "causality"
    NORMALISATION = "normalisation"
    NONDETERMINISM = "nondeterminism"
    IMPLAUSIBLE = "implausible"
    RESOURCES = "resources"  # took more of the machine than its slot has
    # our own failures
    START_UP = "start_up"
    CONTENTION = "contention"
    INFRASTRUCTURE = "infrastructure"


@dataclass(frozen=True)
class ModelSpec:
    """A language model that an agent owns, as part of what it is: its offspring inherit it.

    Attributes:
        name: as the endpoint knows it.
        base_url: of an OpenAI-compatible endpoint, such as "http://127.0.0.1:8000/v1".
        temperature: of its sampling; None leaves that to the endpoint.
        key_env: name of the environment variable that holds the endpoint's key. Never the key.
    """

    name: str
    base_url: str
    temperature: float | None = None
    key_env: str = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Edit:
    """One named change to a genome, and why it was made.

    Attributes:
        operator: the name of the built-in edit, or of the model that wrote it.
        file: the file it changes, relative to the genome.
        why: one line for people and for memory.
        parameters: what is needed to make the same edit again.
    """

    operator: str
    file: str
    why: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A rewritten genome, before anything was trained.

    Attributes:
        genome: the rewritten code.
        edits: the edits that led from the base genome to this one, oldest first.
        n_new: how many of them (the last ones) this proposal added to its parent.
        summary: one line for memory and for the table of individuals.
        expected_effect: what the editor hoped for, in words; empty when it did not say.
        model: the language model that the child owns; None where agents own none.
        requests: what the editor asks people for, each with "type", "reason" and "content".
    """

    genome: Genome
    edits: tuple[Edit, ...]
    n_new: int
    summary: str
    expected_effect: str = ""
    model: ModelSpec | None = None
    requests: tuple[Mapping[str, str], ...] = ()

    @property
    def new_edits(self) -> tuple[Edit, ...]:
        return self.edits[len(self.edits) - self.n_new :]


class Purpose(Enum):
    """Why a job is run; only SEARCH jobs belong to requested individuals."""

    SEARCH = "search"
    BASE_REPEAT = "base_repeat"
    CLAIM = "claim"  # scored on test, under the run's own clock or steps
    EQUAL_STEPS = "equal_steps"  # scored on test, after as many steps as the other side's
    RETIME = "retime"  # for its rate; where it is scored too, for what its model allows
    SMOKE = "smoke"  # a few steps, never scored, before a rewrite gets its budget


@dataclass(frozen=True)
class DataSpec:
    """A prepared data set as the harness sees it; a genome is shown the train split only.

    Attributes:
        folder: where meta.json, train.bin and held_out/ lie.
        content_hash: hash over tokens, splits and vocabulary.
        vocab_size: number of token ids, V.
        token_bytes: bytes per stored token id, 2 or 4 (little-endian unsigned).
        extra_train: files of token ids, in train.bin's format, that an approved request added.
    """

    folder: Path
    content_hash: str
    vocab_size: int
    token_bytes: int = 2
    extra_train: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TrainingSpec:
    """How one genome is to be trained.

    Attributes:
        budget_seconds: wall clock after which the group is frozen.
        max_steps: optimizer steps after which the genome should stop by itself, if not None.
        seed: the harness's seed for this run.
        context_length: tokens per sequence, T.
        device: "cpu" or "cuda".
        threads: compute threads of the run.
        startup_seconds: deadline of the ready signal; missing it is our fault.
        memory_mb: resident memory of the whole group.
        file_mb: largest single file that may be written.
        max_processes: processes and threads of the group.
    """

    budget_seconds: float
    max_steps: int | None
    seed: int
    context_length: int
    device: str = "cpu"
    threads: int = 1
    startup_seconds: float = 60.0
    memory_mb: int = 4096
    file_mb: int = 1024
    max_processes: int = 256


@dataclass(frozen=True)
class EvaluationSpec:
    """How the trained model is to be scored.

    Attributes:
        split: "val", "gate" or "test".
        max_logits_bytes: upper bound of float32 logits that one pass transfers.
        n_prefixes: secret prefixes of the causality check.
        cuts_per_window: how many prefixes of one window may be asked for, each no shorter than
            the one before; with `n_prefixes` it bounds what the check costs.
        second_pass: share of the windows that the first server is asked for in full as well, in
            another order.
        batch_tokens: tokens that M answers at a time.
        seconds: deadline of the whole scoring.
        peak_flops: FLOP/s that MFU is measured against; None where unknown.
        verify_rate: whether the claimed token rate is bounded by the harness's own timing.
        shorter_run: tokens and seconds of a shorter run of the same code; what the claim is then
            made of is the difference.
    """

    split: str
    max_logits_bytes: int = 2 << 30
    n_prefixes: int = 256
    cuts_per_window: int = 1
    second_pass: float = 0.25
    batch_tokens: int = 8192
    seconds: float = 300.0
    peak_flops: float | None = None
    verify_rate: bool = True
    shorter_run: tuple[int, float] | None = None


@dataclass(frozen=True)
class SandboxSpec:
    """Which sandbox a node shall build, and its options.

    Attributes:
        kind: "process", "bubblewrap" or "docker".
        allow_untrusted: whether code not written by built-in edits may run in it.
        uid: unprivileged user id of slot 0 where the harness runs as root; slot k gets uid + k.
        image: id of the image of containers, which no tag can move.
        runtime: what the engine runs containers with; None for its default.
        gpus: device ids of the GPUs that containers may use; slot k uses the k-th alone.
    """

    kind: str
    allow_untrusted: bool = False
    uid: int = 64_000
    image: str = ""
    runtime: str | None = None
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One pure unit of the executor: train a genome in T, then score it with M and S.

    Attributes:
        job_id: unique within a run, the same in a resumed run; also the journal's key.
        folder: where log, checkpoint and evaluation details are left, on a file system that
            driver and node share.
        run_id: name of the run, for the labels of what a sandbox starts.
        secret: bytes from which S derives what a genome must not predict.
        evaluation: None trains without scoring (smoke runs and most re-timings).
    """

    job_id: str
    individual_id: str
    purpose: Purpose
    genome: Genome
    data: DataSpec
    training: TrainingSpec
    sandbox: SandboxSpec
    evaluation: EvaluationSpec | None
    secret: bytes
    folder: Path
    run_id: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """What tells people whose a program is that a sandbox started for this job."""
        return {"run": self.run_id, "individual": self.individual_id, "attempt": self.job_id}


@dataclass(frozen=True)
class TrainingRun:
    """What zone T left behind. Steps, tokens and loss are the genome's claims, not facts.

    Attributes:
        stopped_at_budget: the harness froze it at the budget and found a complete checkpoint.
        startup_seconds: launch to ready signal.
        training_seconds: ready signal to exit or freeze.
        cpu_seconds: CPU time of the whole group.
        run_delay_seconds: time that its threads stood runnable while others held the CPU.
        log_tail: the end of what it printed, for repair and for people.
        artefacts: folder holding model.safetensors, model.json and progress.jsonl; None unless OK.
    """

    status: Status
    reason: Reason = Reason.NONE
    message: str = ""
    stopped_at_budget: bool = False
    startup_seconds: float = 0.0
    training_seconds: float = 0.0
    cpu_seconds: float = 0.0
    run_delay_seconds: float = 0.0
    exit_code: int | None = None
    steps_claimed: int | None = None
    tokens_claimed: int | None = None
    loss_claimed: float | None = None
    log_tail: str = ""
    log_truncated: bool = False
    artefacts: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the trusted scorer found.

    Attributes:
        metrics: deterministic metrics by name, such as val_perplexity, val_bpb, n_parameters.
        rates: metrics that depend on measured time: mfu, mfu_claimed, tokens_per_second.
        details: what the checks measured (causality differences, windows scored), for people.
    """

    status: Status
    reason: Reason = Reason.NONE
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    startup_seconds: float = 0.0
    scoring_seconds: float = 0.0


@dataclass(frozen=True)
class JobResult:
    """A finished job: how training went and, if it left a model, what the scorer found."""

    job_id: str
    training: TrainingRun
    evaluation: Evaluation | None = None
    total_seconds: float = 0.0
    contended: bool = False

    @property
    def outcome(self) -> TrainingRun | Evaluation:
        """The stage that decides: the evaluation where there is one, else the training."""
        return self.evaluation if self.evaluation is not None else self.training

    @property
    def overhead_seconds(self) -> float:
        """What was neither start-up, training nor scoring."""
        scored = self.evaluation
        useful = self.training.startup_seconds + self.training.training_seconds
        if scored is not None:
            useful += scored.startup_seconds + scored.scoring_seconds
        return max(0.0, self.total_seconds - useful)


@dataclass(frozen=True)
class Individual:
    """An agent of the population, with everything that is known of it.

    Attributes:
        slot: its place within its generation; with the generation it fixes its random numbers.
        parent_ids: the parent and, where two were crossed, the mate.
        editor_id: the individual whose knowledge edited the parent's code; None for the base.
        edits: the edits that lead from the base genome to this one.
        attempts: trainings it took, repairs included (contended repeats are not counted).
        fitness: higher is better; None where unknown.
        model: the language model that it edits others with; None where agents own none.
    """

    individual_id: str
    generation: int
    slot: int
    genome: Genome
    parent_ids: tuple[str, ...] = ()
    editor_id: str | None = None
    edits: tuple[Edit, ...] = ()
    n_new_edits: int = 0
    summary: str = ""
    status: Status = Status.OK
    reason: Reason = Reason.NONE
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    fitness: float | None = None
    attempts: int = 0
    repaired: bool = False
    contended: bool = False
    model: ModelSpec | None = None

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    def measured(self, name: str) -> float | None:
        """Return a metric or rate by name, or None where it was not measured."""
        return self.metrics.get(name, self.rates.get(name))
