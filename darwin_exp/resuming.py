"""Resuming: what a run that goes on may be told anew, and what it must find as it was.

Reads: what was typed, what the run recorded, and the workshop as it is now. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from darwin_exp.config import ConfigError, is_operational, leaves
from darwin_exp.journal import Journal
from darwin_exp.parts import Workshop
from darwin_exp.protocols import Event
from darwin_exp.schema import DarwinConfig


def applicable(overrides: Sequence[str], recorded: DarwinConfig) -> list[str]:
    """Return the typed `key=value`s that apply to a recorded configuration.

    Raises:
        ConfigError: one of them would change the recipe.
    """
    known = {key for key, _, _ in leaves(recorded)}
    kept = []
    for override in overrides:
        key, _, _ = override.partition("=")
        if key == "resume":
            continue
        if key.startswith(("+", "~")):
            raise ConfigError(
                f"{override}: a resumed run keeps its recipe; resume takes key=value only"
            )
        if key in known or ("." in key and is_operational(key)):
            kept.append(override)
    return kept


def refuse_other_environment(run_folder: Path, begun: Event, workshop: Workshop) -> None:
    """Refuse to go on where scores could not be compared with those that are there.

    Raises:
        ConfigError: names what differs, and the cure.
    """
    recorded = begun.payload["environment"]
    for name, value in workshop.environment.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"{run_folder.name}: its scores were measured with {name}={recorded.get(name)!r} "
                f"and here it is {value!r}, so they cannot be compared; start a new run (in a "
                f"sweep: remove {run_folder}, and its job begins anew)"
            )
    before, now = begun.measured["n_slots"], len(workshop.slots)
    by_the_clock = workshop.config.max_steps is None or workshop.config.fitness.name != "perplexity"
    if by_the_clock and before != now:
        raise ConfigError(
            f"workers={now}: this run's scores depend on the clock, and were measured with "
            f"{before} slots at work at once; go on with workers={before}"
        )


def refuse_shorter(wanted: DarwinConfig, journal: Journal) -> None:
    """Refuse fewer generations than were begun: their individuals would be there and not count.

    Raises:
        ConfigError: says how many it takes.
    """
    begun = [int(event.key[1 : event.key.index("-")]) for event in journal.of_kind("proposal")]
    begun += [
        event.payload["generation"]
        for kind in ("effect", "environment", "environment_abandoned")
        for event in journal.of_kind(kind)
    ]
    if wanted.n_generations < max(begun, default=0):
        raise ConfigError(
            f"n_generations={wanted.n_generations}: generation {max(begun)} has begun; choose "
            f"n_generations={max(begun)} or more"
        )
