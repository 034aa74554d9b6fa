"""What tells settings apart: the configuration keys that differ among runs, and short names.

Reads: configurations as flat mappings of dotted keys. Writes: nothing.
Never: lets two runs share a setting that differ in a key that counts.

Choosing `memory=off` changes six keys. One of them says it all, the group's name; the others
follow from it. So the names of the groups that differ always stand in a label, and another key
only where those before it do not tell its value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from darwin_exp.config import is_operational
from darwin_exp.schema import DarwinConfig

# Operational keys may change when a run is resumed, but these decide how much it searches.
COUNT_NEVERTHELESS = frozenset({"n_generations", "stagnation_generations"})
NO_SETTING = frozenset({"seed", "integrity.key"})
MOST_COMPANIONS = 3
THE_ONLY_ONE = "all runs"
_ABSENT = "absent"  # JSON never is this text
_ORDER = {entry.name: place for place, entry in enumerate(fields(DarwinConfig))}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Grouping:
    """Runs sorted into settings.

    Attributes:
        labels: of every run, the name of its setting.
        keys: those that the labels show.
        along: keys of other groups that differ as well, and whose values the labels' keys tell.
    """

    labels: tuple[str, ...]
    keys: tuple[str, ...]
    along: tuple[str, ...]


def group(configs: Sequence[Config]) -> Grouping:
    """Sort runs into settings by what differs among their configurations."""
    columns = {key: _column(configs, key) for key in _counted(configs)}
    columns = {key: column for key, column in columns.items() if len(set(column)) > 1}
    shown = [key for key in columns if _is_choice(key)]
    others = [key for key in columns if key not in shown]
    # The finest first: what follows from it need not be said.
    for key in sorted(others, key=lambda key: -len(set(columns[key]))):
        if not _tells([columns[one] for one in shown], columns[key]):
            alike = [
                one
                for one in others
                if one.rpartition(".")[0] == key.rpartition(".")[0]
                and _same_partition(columns[one], columns[key])
            ]
            shown += alike[:MOST_COMPANIONS] if key in alike[:MOST_COMPANIONS] else [key]
    shown.sort(key=list(columns).index)
    heads = {key.partition(".")[0] for key in shown if _is_choice(key)}
    along = [key for key in others if key not in shown and key.partition(".")[0] not in heads]
    return Grouping(
        labels=tuple(_label(config, shown) for config in configs),
        keys=tuple(shown),
        along=tuple(along),
    )


def short(key: str) -> str:
    """Return a key as people type it: a group's choice by the group, a trainer's by its name."""
    return key.removesuffix(".name").removeprefix("trainer.settings.")


def _counted(configs: Sequence[Config]) -> list[str]:
    keys = {key for config in configs for key in config}
    kept = [
        key
        for key in keys
        if key not in NO_SETTING and (key in COUNT_NEVERTHELESS or not is_operational(key))
    ]
    return sorted(kept, key=lambda key: (_ORDER.get(key.partition(".")[0], len(_ORDER)), key))


def _is_choice(key: str) -> bool:
    return key == "experiment" or key.endswith(".name")


def _column(configs: Sequence[Config], key: str) -> tuple[str, ...]:
    return tuple(
        json.dumps(config[key], sort_keys=True) if key in config else _ABSENT for config in configs
    )


def _tells(known: Sequence[tuple[str, ...]], column: tuple[str, ...]) -> bool:
    """Tell whether runs that are alike in the known columns are alike in this one."""
    seen: dict[tuple[str, ...], str] = {}
    rows = zip(*known, strict=True) if known else [()] * len(column)
    return all(
        seen.setdefault(row, value) == value for row, value in zip(rows, column, strict=True)
    )


def _same_partition(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return _tells([one], other) and _tells([other], one)


def _label(config: Config, keys: Sequence[str]) -> str:
    words = [f"{short(key)}={_spelled(config[key])}" for key in keys if key in config]
    return " ".join(words) or THE_ONLY_ONE


def _spelled(value: Any) -> str:
    """Return a value as it is typed; a text that would read as something else keeps its quotes."""
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)
