"""The typed configuration: every key, its meaning, and whether a resumed run may change it.

YAML in conf/ composes these schemas, so that a typo or a wrong type dies at the door. Below
`__main__` nothing sees an OmegaConf object: `typed` turns the composed tree into dataclasses once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PROJECT = Path(__file__).resolve().parent.parent
CONF = PROJECT / "conf"


class ConfigError(Exception):
    """The configuration cannot be run; one line names the key or file and the cure."""


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


@dataclass
class MfuConfig(FitnessConfig):
    name: str = "mfu"
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
    integrity: IntegrityConfig = field(default_factory=IntegrityConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


SCHEMAS: dict[str, dict[str, type]] = {
    "trainer": {"trainer": TrainerConfig},
    "dataset": {"dataset": DatasetConfig},
    "mutator": {"mutator": MutatorConfig, "operators": OperatorsConfig, "scripted": ScriptedConfig},
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
    "sandbox": {"sandbox": SandboxConfig},
    "executor": {"executor": ExecutorConfig},
    "tracking": {"tracking": TrackingConfig},
}
GROUPS = tuple(SCHEMAS)
OPERATIONAL_GROUPS = ("tracking", "executor")


def register() -> None:
    """Put the schemas where the YAML files find them, under names that start with `base_`."""
    store = ConfigStore.instance()
    store.store(name="base_darwin", node=DarwinConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"base_{name}", node=schema)


def typed(composed: DictConfig) -> DarwinConfig:
    """Turn a composed configuration into checked dataclasses.

    Raises:
        ConfigError: a value is impossible.
        OmegaConfBaseException: a value is missing or of the wrong type (see guidance.explain).
    """
    config = OmegaConf.to_object(composed)
    assert isinstance(config, DarwinConfig)
    check(config)
    return config


def check(config: DarwinConfig) -> None:
    """Refuse numbers that cannot be run.

    Raises:
        ConfigError: names the key, the value and the cure.
    """
    _at_least("population_size", config.population_size, 2)
    _at_least("n_survivors", config.n_survivors, 1)
    if config.n_survivors >= config.population_size:
        raise ConfigError(
            f"n_survivors={config.n_survivors} leaves no room for offspring in "
            f"population_size={config.population_size}; choose n_survivors <= "
            f"{config.population_size - 1}"
        )
    _at_least("n_generations", config.n_generations, 0)
    _positive("budget_seconds", config.budget_seconds)
    for name, value in (("max_steps", config.max_steps), ("workers", config.workers)):
        if value is not None:
            _at_least(name, value, 1)
    if config.max_hours is not None:
        _positive("max_hours", config.max_hours)
    if config.stagnation_generations is not None:
        _at_least("stagnation_generations", config.stagnation_generations, 1)
    _at_least("trainer.context_length", config.trainer.context_length, 2)
    _at_least("base.n_repeats", config.base.n_repeats, 1)
    _at_least("promotion.n_seeds", config.promotion.n_seeds, 2)
    _at_least("promotion.n_equal_steps", config.promotion.n_equal_steps, 0)
    if config.promotion.n_equal_steps == 1:
        raise ConfigError("promotion.n_equal_steps=1 gives no interval; choose 0, or 2 or more")
    _at_least("repair.max_attempts", config.repair.max_attempts, 0)
    _at_least("selection.elitism", config.selection.elitism, 0)
    if config.selection.elitism > config.n_survivors:
        raise ConfigError(
            f"selection.elitism={config.selection.elitism} is more than "
            f"n_survivors={config.n_survivors}"
        )
    if isinstance(config.selection, TournamentConfig):
        _at_least("selection.size", config.selection.size, 1)
    if isinstance(config.selection, Nsga2Config):
        wrong = set(config.selection.objectives) - OBJECTIVES
        if wrong or not config.selection.objectives:
            raise ConfigError(
                f"selection.objectives={config.selection.objectives} must name some of "
                f"{', '.join(sorted(OBJECTIVES))}"
            )
    if isinstance(config.memory, JsonMemoryConfig):
        _at_least("memory.capacity", config.memory.capacity, 1)
    _at_least("sandbox.uid", config.sandbox.uid, 1)
    if isinstance(config.mutator, OperatorsConfig):
        fewest_and_most = config.mutator.edits_per_child
        if len(fewest_and_most) != 2 or not 1 <= fewest_and_most[0] <= fewest_and_most[1]:
            raise ConfigError(
                f"mutator.edits_per_child={fewest_and_most} must be [fewest,most] with 1 <= fewest"
                " <= most, such as [1,2]"
            )
        _at_least("mutator.max_drafts", config.mutator.max_drafts, 1)
    if isinstance(config.crossover, MergeConfig) and not 0 <= config.crossover.probability <= 1:
        raise ConfigError(
            f"crossover.probability={config.crossover.probability} must lie between 0 and 1"
        )
    if config.sandbox.device not in ("cpu", "cuda"):
        raise ConfigError(f"sandbox.device={config.sandbox.device} must be cpu or cuda")
    for name in ("threads", "memory_mb", "file_mb", "max_processes"):
        _at_least(f"sandbox.{name}", getattr(config.sandbox, name), 1)
    _positive("sandbox.startup_seconds", config.sandbox.startup_seconds)
    _positive("eval.seconds", config.eval.seconds)
    _at_least("eval.n_prefixes", config.eval.n_prefixes, 0)
    _at_least("eval.batch_tokens", config.eval.batch_tokens, 1)
    _at_least("eval.max_logits_bytes", config.eval.max_logits_bytes, 1)
    if config.integrity.key is not None:
        try:
            bytes.fromhex(config.integrity.key)
        except ValueError as error:
            raise ConfigError("integrity.key must be hexadecimal digits, or null") from error
    _check_splits(config.dataset.splits)


def _check_splits(splits: list[float]) -> None:
    if len(splits) != 4 or min(splits) < 0 or not math.isclose(sum(splits), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"dataset.splits={splits} must be four shares (train, val, gate, test) that sum to 1"
        )
    if splits[0] == 0 or splits[1] == 0:
        raise ConfigError(f"dataset.splits={splits}: train and val must not be empty")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")


def _positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{key}={value} must be greater than 0")


# --- resuming: which keys may differ ------------------------------------------------------------


def leaves(
    config: Any, prefix: str = "", operational: bool = False
) -> Iterator[tuple[str, Any, bool]]:
    """Yield (key, value, operational) of every leaf of a typed configuration."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        name = f"{prefix}{entry.name}"
        free = operational or bool(entry.metadata.get("operational"))
        if is_dataclass(value):
            free = free or entry.name in OPERATIONAL_GROUPS
            yield from leaves(value, f"{name}.", free)
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", item, free) for key, item in value.items())
        else:
            yield name, value.value if isinstance(value, Enum) else value, free


def is_operational(key: str) -> bool:
    """Tell of a dotted key, or of a group, whether a resumed run may change it."""
    head, _, inner = key.partition(".")
    top = {entry.name: entry for entry in fields(DarwinConfig)}.get(head)
    if top is None:
        return False
    if top.metadata.get("operational") or head in (*OPERATIONAL_GROUPS, "paths"):
        return True
    return any(
        entry.name == inner and bool(entry.metadata.get("operational"))
        for kind in SCHEMAS.get(head, {}).values()
        for entry in fields(kind)
    )


def refuse_changed_score(recorded: DarwinConfig, wanted: DarwinConfig) -> None:
    """Refuse to resume with another value of a key on which scores depend.

    Raises:
        ConfigError: names the first such key and both values.
    """
    before = {key: value for key, value, operational in leaves(recorded) if not operational}
    after = {key: value for key, value, operational in leaves(wanted) if not operational}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise ConfigError(
                f"{key}: the run was started with {before.get(key)!r} and scores depend on it, so "
                f"it cannot be resumed with {after.get(key)!r}; leave it out, or start a new run"
            )


def as_yaml(config: DarwinConfig) -> str:
    """Return the configuration as YAML that `from_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def schema_of(group: str, name: str) -> type:
    """Return the schema of a group's variant: its own where it has one, else the group's."""
    schemas = SCHEMAS[group]
    return schemas.get(name, schemas[group])


def from_yaml(path: Path, overrides: list[str], chosen: Mapping[str, Any]) -> DarwinConfig:
    """Read a recorded configuration and lay a command line's overrides over it.

    Args:
        overrides: `key=value` as typed.
        chosen: the composed node of each group whose variant was named on the command line.

    Raises:
        ConfigError: the file is damaged.
        OmegaConfBaseException: an override does not fit (see guidance.explain).
    """
    try:
        recorded = OmegaConf.load(path)
        assert isinstance(recorded, DictConfig)
        names = {group: str(recorded[group].get("name", group)) for group in GROUPS}
    except (
        OSError,
        ValueError,
        AssertionError,
        AttributeError,
        yaml.YAMLError,
        OmegaConfBaseException,
    ) as error:
        raise ConfigError(f"{path}: {error}; this run cannot be resumed") from error
    tree = OmegaConf.structured(DarwinConfig)
    for group in GROUPS:
        if group in chosen:
            recorded[group] = chosen[group]
            names[group] = str(chosen[group].get("name", group))
        tree[group] = OmegaConf.structured(schema_of(group, names[group]))
    merged = OmegaConf.merge(tree, recorded, OmegaConf.from_dotlist(overrides))
    assert isinstance(merged, DictConfig)
    return typed(merged)
