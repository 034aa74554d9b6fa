"""The configuration between conf/ and the parts: made, checked, written down and read back.

YAML in conf/ composes the schemas of `schema.py`, so that a typo or a wrong type dies at the door.
Below `__main__` nothing sees an OmegaConf object: `typed` turns the composed tree into dataclasses
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from darwin_exp.schema import (
    GROUPS,
    OBJECTIVES,
    OPERATIONAL_GROUPS,
    SCHEMAS,
    DarwinConfig,
    DockerConfig,
    JsonMemoryConfig,
    MergeConfig,
    Mode,
    Nsga2Config,
    OpenaiConfig,
    OperatorsConfig,
    TournamentConfig,
)

PROJECT = Path(__file__).resolve().parent.parent
CONF = PROJECT / "conf"


class ConfigError(Exception):
    """The configuration cannot be run; one line names the key or file and the cure."""


def register() -> None:
    """Put the schemas where the YAML files find them, under names that start with `base_`."""
    store = ConfigStore.instance()
    whole = OmegaConf.structured(DarwinConfig)
    OmegaConf.set_struct(whole.llm.prices, False)  # takes any model's name
    store.store(name="base_darwin", node=whole)
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
    _at_least("fitness.n_timings", config.fitness.n_timings, 1)
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
    _check_models(config)
    if isinstance(config.crossover, MergeConfig) and not 0 <= config.crossover.probability <= 1:
        raise ConfigError(
            f"crossover.probability={config.crossover.probability} must lie between 0 and 1"
        )
    if config.sandbox.device not in ("cpu", "cuda"):
        raise ConfigError(f"sandbox.device={config.sandbox.device} must be cpu or cuda")
    for name in ("threads", "memory_mb", "file_mb", "max_processes"):
        _at_least(f"sandbox.{name}", getattr(config.sandbox, name), 1)
    _positive("sandbox.startup_seconds", config.sandbox.startup_seconds)
    if isinstance(config.sandbox, DockerConfig):
        _check_containers(config.sandbox)
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
    for name in ("ordinary_lines", "most_waiting_each", "most_waiting"):
        _at_least(f"hitl.{name}", getattr(config.hitl, name), 0)
    if config.hitl.stuck_generations is not None:
        _at_least("hitl.stuck_generations", config.hitl.stuck_generations, 1)


def _check_containers(box: DockerConfig) -> None:
    for name, value in (("image", box.image), ("runtime", box.runtime)):
        if value is not None and not value.strip():
            raise ConfigError(f"sandbox.{name} is empty; name one, or say null")
    if box.gpus and box.device != "cuda":
        raise ConfigError(
            f"sandbox.gpus={box.gpus} are used with sandbox.device=cuda only; say so, or leave "
            "them out"
        )
    if len(set(box.gpus)) < len(box.gpus) or not all(gpu.strip() for gpu in box.gpus):
        raise ConfigError(
            f"sandbox.gpus={box.gpus} must name each GPU once, by its index or UUID, such as [0,1]"
        )


def _check_models(config: DarwinConfig) -> None:
    chosen, llm = config.mutator, config.llm
    _positive("llm.timeout_seconds", llm.timeout_seconds)
    _at_least("llm.max_retries", llm.max_retries, 0)
    for name, cap in (("max_tokens", llm.max_tokens), ("max_calls", llm.max_calls)):
        if cap is not None:
            _at_least(f"llm.{name}", cap, 1)
    if llm.max_usd is not None:
        _positive("llm.max_usd", llm.max_usd)
    for model, price in llm.prices.items():
        numbers = price if isinstance(price, list) else []
        if len(numbers) != 2 or not all(map(_is_price, numbers)):
            raise ConfigError(
                f"llm.prices: {model}={price} must be USD for a million tokens in and out, such as "
                "[0.15,0.6]"
            )
    if llm.mode is not Mode.live and llm.recording is None:
        raise ConfigError(
            f"llm.mode={llm.mode.value} needs llm.recording: a file, or to replay also a run id"
        )
    if not isinstance(chosen, OpenaiConfig):
        if llm.mode is not Mode.live:
            raise ConfigError(
                f"llm.mode={llm.mode.value}: mutator={chosen.name} asks no language model; use "
                "mutator=openai"
            )
        return
    for name in ("max_drafts", "answer_tokens"):
        _at_least(f"mutator.{name}", getattr(chosen, name), 1)
    _at_least("mutator.prompt_tokens", chosen.prompt_tokens, 1000)
    _at_least("mutator.smoke_steps", chosen.smoke_steps, 0)
    if not 0 < chosen.chunk_probability <= 1:
        raise ConfigError(
            f"mutator.chunk_probability={chosen.chunk_probability} must be above 0 and at most 1"
        )
    for listed in chosen.models:
        if not (listed.weight > 0 and math.isfinite(listed.weight)):
            raise ConfigError(
                f"mutator.models: {listed.name} has weight={listed.weight}, which must be above 0"
            )
    for heat in [chosen.temperature, *(model.temperature for model in chosen.models)]:
        if heat is not None and not 0 <= heat <= 2:
            raise ConfigError(f"mutator.temperature={heat} must lie between 0 and 2, or be null")


def _is_price(usd: Any) -> bool:
    is_number = isinstance(usd, int | float) and not isinstance(usd, bool)
    return is_number and math.isfinite(usd) and usd >= 0


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
        elif isinstance(value, list) and any(map(is_dataclass, value)):
            yield name, [asdict(item) for item in value], free
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
    kinds = SCHEMAS[head].values() if head in SCHEMAS else [type(getattr(DarwinConfig(), head))]
    name = inner.partition(".")[0]
    return any(
        entry.name == name and bool(entry.metadata.get("operational"))
        for kind in kinds
        if is_dataclass(kind)
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
        ConfigError: the file is damaged, or an override cannot be read.
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
    merged = OmegaConf.merge(tree, recorded, _read_as_typed(overrides))
    assert isinstance(merged, DictConfig)
    return typed(merged)


def _read_as_typed(overrides: list[str]) -> DictConfig:
    """Read `key=value`s by Hydra's grammar, as when the run began.

    YAML, which OmegaConf reads them by, takes `[{name:A,weight:2}]` for something else.

    Raises:
        ConfigError: one of them does not keep that grammar.
        OmegaConfBaseException: its key is none.
    """
    parser = OverridesParser.create()
    told = OmegaConf.create()
    for typed_one in overrides:
        try:
            override = parser.parse_override(typed_one)
        except HydraException as error:
            raise ConfigError(f"{typed_one}: {str(error).splitlines()[0]}") from error
        OmegaConf.update(told, override.key_or_group, override.value(), force_add=True)
    return told
