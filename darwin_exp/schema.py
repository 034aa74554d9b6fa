"""The schemas of the configuration: every key, what it means, and whether resuming may change it.

One dataclass for each group of conf/, and a subclass for each variant that has settings of its
own. They are mutable and typed as OmegaConf needs them; `config` makes them, checks them and reads
them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


def _key(default: Any, help: str, operational: bool = False) -> Any:
    """Declare a key; an operational one may change when a run is resumed."""
    metadata = {"help": help, "operational": operational}
    if isinstance(default, list | dict):
        kind, value = type(default), default
        return field(default_factory=lambda: kind(value), metadata=metadata)
    return field(default=default, metadata=metadata)


OBJECTIVES = frozenset({"val_perplexity", "val_bpb", "mfu", "tokens_per_second"})


class Dedup(Enum):
    reject = "reject"
    replicate = "replicate"


class Keep(Enum):
    survivors = "survivors"
    all = "all"


class Scope(Enum):
    lineage = "lineage"
    population = "population"
    library = "library"


class Tokenizer(Enum):
    char = "char"
    bytes = "bytes"
    gpt2 = "gpt2"


class Show(Enum):
    auto = "auto"
    live = "live"
    plain = "plain"


class Choice(Enum):
    own = "own"
    weights = "weights"
    bandit = "bandit"


class Form(Enum):
    edits = "edits"
    rewrite = "rewrite"
    chunks = "chunks"
    text = "text"


class Mode(Enum):
    live = "live"
    record = "record"
    replay = "replay"


class Outage(Enum):
    wait = "wait"
    stop = "stop"


# --- groups: a base schema per swap point, a subclass per variant that has settings of its own ---


@dataclass
class GenomeConfig:
    dir: str = _key("trainer_base", "folder of the base genome")


@dataclass
class TrainerConfig:
    context_length: int = _key(MISSING, "tokens per sequence, in training and in scoring")
    settings: dict[str, Any] = _key({}, "model and optimizer settings written to settings.json")


@dataclass
class DatasetConfig:
    name: str = MISSING
    tokenizer: Tokenizer = _key(Tokenizer.char, "char, bytes or gpt2")
    path: str | None = _key(None, "a .txt file or folder (textdir), or a set (huggingface)")
    splits: list[float] = _key([0.85, 0.05, 0.05, 0.05], "shares of train, val, gate and test")
    dedup_blocks: bool = _key(True, "drop held-out blocks that stand in an earlier split")
    max_overlap: float = _key(0.05, "largest share of 13-word runs that train may share")
    options: dict[str, str] = _key({}, "huggingface: subset, split, text_column")


@dataclass
class MutatorConfig:
    name: str = MISSING


@dataclass
class OperatorsConfig(MutatorConfig):
    name: str = "operators"
    edits_per_child: list[int] = _key([2, 3], "fewest and most edits of one rewrite")
    max_drafts: int = _key(8, "drafts before a child that is only ever a duplicate is given up")
    only: list[str] = _key([], "draw these edits alone: names, or what they are about (all if [])")
    without: list[str] = _key([], "never draw these edits: names, or what they are about")


@dataclass
class ScriptedConfig(MutatorConfig):
    name: str = "scripted"
    file: str = _key(MISSING, "YAML file of edits that are played in order")


@dataclass
class ModelConfig:
    """One language model of several; what is left out is as the mutator has it."""

    name: str = MISSING
    base_url: str | None = None
    temperature: float | None = None
    key_env: str | None = None
    weight: float = 1.0


@dataclass
class OpenaiConfig(MutatorConfig):
    name: str = "openai"
    model: str = _key("gpt-4o-mini", "language model of every agent, unless `models` lists several")
    base_url: str = _key("https://api.openai.com/v1", "its OpenAI-compatible endpoint")
    temperature: float | None = _key(None, "of its sampling; null leaves that to the endpoint")
    key_env: str = _key("OPENAI_API_KEY", "environment variable that holds the endpoint's key")
    models: list[ModelConfig] = _key([], "several: [{name:A,weight:2},{name:B,base_url:URL}]")
    choice: Choice = _key(Choice.own, "whose model edits: the editor's own, weights or bandit")
    form: Form = _key(
        Form.edits, "of answers: edits, rewrite (whole files), chunks (the paper's) or text"
    )
    chunk_probability: float = _key(0.4, "share of a parent's chunks that are edited (form=chunks)")
    max_drafts: int = _key(
        2, "drafts for one child or repair, those that were turned down included"
    )
    prompt_tokens: int = _key(24_000, "most tokens of a prompt; what is less useful is left out")
    answer_tokens: int = _key(8_000, "most tokens of an answer")
    smoke_steps: int = _key(3, "steps that a draft must train before it gets a budget; 0: none")
    guidance: str = _key("", "what people tell every editor, in words")


@dataclass
class SelectionConfig:
    name: str = MISSING
    elitism: int = _key(1, "how many of the best survive in any case")


@dataclass
class TournamentConfig(SelectionConfig):
    name: str = "tournament"
    size: int = _key(3, "individuals drawn for each tournament")


@dataclass
class Nsga2Config(SelectionConfig):
    name: str = "nsga2"
    objectives: list[str] = _key(["val_perplexity", "mfu"], "metrics traded off against each other")


@dataclass
class FitnessConfig:
    name: str = MISSING
    n_timings: int = _key(1, "how often the best are timed again; 2 or more give an interval")


@dataclass
class MfuConfig(FitnessConfig):
    name: str = "mfu"
    n_timings: int = _key(5, "how often the best are timed again; 2 or more give an interval")
    perplexity_margin_percent: float | None = _key(
        0.0, "how far above the base's perplexity may be; null: ignored"
    )


@dataclass
class WeightedConfig(FitnessConfig):
    name: str = "weighted"
    perplexity_weight: float = _key(1.0, "weight of the gain in log perplexity over the base")
    mfu_weight: float = _key(0.2, "weight of the gain in log MFU over the base")


@dataclass
class MemoryConfig:
    name: str = MISSING


@dataclass
class JsonMemoryConfig(MemoryConfig):
    name: str = "json"
    scope: Scope = _key(Scope.population, "whose lessons an editor sees")
    capacity: int = _key(200, "most lessons recalled at once")


@dataclass
class CrossoverConfig:
    name: str = MISSING


@dataclass
class MergeConfig(CrossoverConfig):
    name: str = "merge"
    probability: float = _key(0.3, "share of offspring that have two parents")


@dataclass
class PairingConfig:
    name: str = MISSING


@dataclass
class PromotionConfig:
    name: str = MISSING
    n_seeds: int = _key(4, "fresh trainings of base and selected behind the closing claim")
    n_equal_steps: int = _key(3, "the same at equal steps; 0 leaves that out")


@dataclass
class SandboxConfig:
    name: str = MISSING
    device: str = _key("cpu", "cpu or cuda")
    threads: int = _key(1, "compute threads of one slot")
    memory_mb: int = _key(4096, "resident memory of one candidate")
    file_mb: int = _key(1024, "largest file that a candidate may write")
    max_processes: int = _key(256, "processes and threads of one candidate")
    startup_seconds: float = _key(60.0, "deadline of a candidate's ready signal")
    uid: int = _key(64000, "unprivileged user id of slot 0 where the harness is root")
    allow_untrusted: bool = _key(False, "run code of unknown origin in the bare process sandbox")


@dataclass
class DockerConfig(SandboxConfig):
    name: str = "docker"
    image: str | None = _key(None, "container image; null: what `make image` makes")
    runtime: str | None = _key(None, "container runtime such as runsc; null: the engine's own")
    gpus: list[str] = _key([], "the GPU of each slot, by index or UUID; [] counts from 0", True)


@dataclass
class ExecutorConfig:
    name: str = MISSING


@dataclass
class TrackingConfig:
    name: str = MISSING
    closing_seconds: float = _key(60.0, "longest wait for MLflow at the end of a run", True)


@dataclass
class EvalConfig:
    max_logits_bytes: int = _key(2 << 30, "float32 logits that one scoring pass may transfer")
    n_prefixes: int = _key(256, "secret prefixes of the causality check")
    batch_tokens: int = _key(8192, "tokens that a model answers at a time")
    seconds: float = _key(300.0, "deadline of scoring one candidate")


@dataclass
class BaseConfig:
    n_repeats: int = _key(3, "trainings of the base through the run, for the noise floor")


@dataclass
class RepairConfig:
    max_attempts: int = _key(1, "repairs of a failed candidate")


@dataclass
class LlmConfig:
    mode: Mode = _key(
        Mode.live, "live; record: and write llm.recording; replay: read it, call none"
    )
    recording: str | None = _key(
        None, "file to record to; to replay: a file, a run id or latest", True
    )
    outage: Outage = _key(Outage.wait, "when an endpoint is down: wait for it, or stop", True)
    timeout_seconds: float = _key(180.0, "longest wait for one answer", True)
    max_retries: int = _key(5, "tries after a failed one before it counts as an outage", True)
    max_usd: float | None = _key(None, "dollars that a run may spend, resumed or not", True)
    max_tokens: int | None = _key(None, "tokens that a run may spend, in and out together", True)
    max_calls: int | None = _key(None, "calls that a run may make", True)
    prices: dict[str, Any] = _key(
        {}, "USD for a million tokens in and out, by model: {NAME: [0.15,0.6]}", True
    )


class Reviewed(Enum):
    none = "none"
    flagged = "flagged"
    champion = "champion"
    all = "all"


class Way(Enum):
    ask = "ask"
    deny = "deny"
    auto = "auto"


@dataclass
class HitlPolicyConfig:
    dataset: Way = _key(Way.ask, "more training text: ask or deny", True)
    script: Way = _key(Way.ask, "a file for the agent's code: ask or deny", True)
    file_structure: Way = _key(Way.ask, "other files in the agent's code: ask or deny", True)
    library: Way = _key(Way.ask, "a package in a new image: ask or deny", True)
    resources: Way = _key(Way.ask, "another training budget: ask or deny", True)
    budget: Way = _key(Way.ask, "higher caps: ask or deny", True)
    question: Way = _key(Way.ask, "a question: ask, deny or auto", True)
    stuck: Way = _key(Way.ask, "no gain for some generations: ask, deny or auto", True)
    quarantine: Way = _key(Way.ask, "somebody was set apart: ask, deny or auto", True)
    edit: Way = _key(Way.ask, "a rewrite under review: ask, deny or auto", True)


@dataclass
class HitlConfig:
    review: Reviewed = _key(
        Reviewed.none, "rewrites that wait for a person: none, flagged, champion or all", True
    )
    ordinary_lines: int = _key(
        80, "changed lines, of 100 characters, beyond which a rewrite is flagged", True
    )
    policy: HitlPolicyConfig = field(default_factory=HitlPolicyConfig)
    block: bool = _key(False, "wait for an answer to whatever is asked, until the deadline", True)
    deadline_seconds: float | None = _key(None, "silence for so long means no; null waits", True)
    most_waiting_each: int = _key(3, "requests of one agent that may wait at once", True)
    most_waiting: int = _key(100, "the same for all agents together", True)
    dataset_sources: list[str] = _key(
        ["textdir", "stdlib", "shakespeare"], "sources of extra text that may be approved", True
    )
    stuck_generations: int | None = _key(3, "ask people after so many without a gain", True)
    notify_command: str = _key("", "run when something waits; gets JSON on standard input", True)
    notify_url: str = _key("", "gets a POST of that JSON; env:NAME reads a secret address", True)


@dataclass
class IntegrityConfig:
    key: str | None = _key(None, "hexadecimal key of the scorer's secrets; random when null")


@dataclass
class PathsConfig:
    runs: str = _key("runs", "where runs are kept", True)
    data: str = _key("data", "where prepared data sets are kept", True)
    memory: str = _key("memory", "where agents' memories are written", True)


@dataclass
class DarwinConfig:
    """The whole configuration of a run."""

    experiment: str = _key("adhoc", "name of the recipe; the MLflow experiment is darwin/NAME")
    population_size: int = _key(8, "agents alive at a time, the base among them at first")
    n_survivors: int = _key(3, "agents that selection keeps in each generation")
    n_generations: int = _key(3, "rounds of selection after the population is filled", True)
    seed: int = _key(0, "seed of every random decision of the run")
    budget_seconds: float = _key(12.0, "wall clock of one training")
    max_steps: int | None = _key(None, "optimizer steps of one training; null trains by the clock")
    workers: int | None = _key(
        None, "slots that train at once (null: 2); fixed under a clock", True
    )
    dedup: Dedup = _key(Dedup.reject, "reject code that was seen before, or replicate it")
    keep: Keep = _key(Keep.survivors, "whose checkpoints are kept: survivors or all", True)
    max_hours: float | None = _key(None, "stop, resumably, after so many hours", True)
    stagnation_generations: int | None = _key(None, "finish after so many without a gain", True)
    resume: str | None = _key(None, "run id, or latest: go on with that run", True)
    sweep: str | None = _key(None, "sweep id, or latest: go on with that sweep's jobs", True)
    show: Show = _key(Show.auto, "live display, plain lines, or whichever fits", True)
    genome: GenomeConfig = field(default_factory=GenomeConfig)
    trainer: TrainerConfig = MISSING
    dataset: DatasetConfig = MISSING
    mutator: MutatorConfig = MISSING
    selection: SelectionConfig = MISSING
    fitness: FitnessConfig = MISSING
    memory: MemoryConfig = MISSING
    crossover: CrossoverConfig = MISSING
    pairing: PairingConfig = MISSING
    promotion: PromotionConfig = MISSING
    sandbox: SandboxConfig = MISSING
    executor: ExecutorConfig = MISSING
    tracking: TrackingConfig = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    hitl: HitlConfig = field(default_factory=HitlConfig)
    integrity: IntegrityConfig = field(default_factory=IntegrityConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


SCHEMAS: dict[str, dict[str, type]] = {
    "trainer": {"trainer": TrainerConfig},
    "dataset": {"dataset": DatasetConfig},
    "mutator": {
        "mutator": MutatorConfig,
        "operators": OperatorsConfig,
        "rates": OperatorsConfig,
        "openai": OpenaiConfig,
        "scripted": ScriptedConfig,
    },
    "selection": {
        "selection": SelectionConfig,
        "tournament": TournamentConfig,
        "nsga2": Nsga2Config,
    },
    "fitness": {"fitness": FitnessConfig, "mfu": MfuConfig, "weighted": WeightedConfig},
    "memory": {"memory": MemoryConfig, "json": JsonMemoryConfig},
    "crossover": {"crossover": CrossoverConfig, "merge": MergeConfig},
    "pairing": {"pairing": PairingConfig},
    "promotion": {"promotion": PromotionConfig},
    "sandbox": {"sandbox": SandboxConfig, "docker": DockerConfig},
    "executor": {"executor": ExecutorConfig},
    "tracking": {"tracking": TrackingConfig},
}
GROUPS = tuple(SCHEMAS)
OPERATIONAL_GROUPS = ("tracking", "executor")
