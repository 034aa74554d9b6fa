"""Where a run's time went: its generations and its closing, and what the slots did meanwhile.

Reads: a chronicle. Writes: nothing.
Never: counts the pauses between a run's processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from darwin_exp.chronicle import Chronicle
from darwin_exp.protocols import Event

STAGES = ("startup", "training", "scoring", "overhead")
CLOSING_KINDS = ("timing", "retimed", "test_read", "equal_steps", "claim")
CLOSING_PURPOSES = ("claim", "equal_steps")
OF_PEOPLE = ("inbox", "budget", "review", "paused")


@dataclass(frozen=True)
class Phase:
    """A part of the run: a generation, or its closing.

    Attributes:
        wall_seconds: for which a process worked at it.
        slot_seconds: what the slots did meanwhile, by stage; idle where the slots are known.
    """

    name: str
    wall_seconds: float
    slot_seconds: Mapping[str, float]


def phases_of(chronicle: Chronicle, n_slots: int | None) -> list[Phase]:
    """Split the run's time by generation and stage; pauses between processes are nobody's."""
    names = _phase_names(chronicle.events)
    wall = dict.fromkeys(names, 0.0)
    stages = {name: dict.fromkeys(STAGES, 0.0) for name in wall}
    busy = dict.fromkeys(wall, 0.0)
    before = None
    for event, name in zip(chronicle.events, names, strict=True):
        if before is not None and event.kind != "session":
            wall[name] += max(0.0, event.written_at - before)
        before = event.written_at
        if event.kind in ("job", "timing"):
            for stage in STAGES:
                stages[name][stage] += event.measured.get(f"{stage}_seconds") or 0.0
            busy[name] += event.measured.get("total_seconds") or 0.0
    for name, seconds in stages.items():
        if n_slots:
            seconds["idle"] = max(0.0, wall[name] * n_slots - busy[name])
    return [Phase(name, wall[name], stages[name]) for name in wall]


def _phase_names(events: Sequence[Event]) -> list[str]:
    """Return of each event to which phase it, and the time before it, belongs."""
    names: list[str] = []
    following = "unfinished"
    for event in reversed(events):
        if event.kind == "generation":
            following = f"generation {event.payload['generation']}"
        closing = event.kind in CLOSING_KINDS or event.payload.get("purpose") in CLOSING_PURPOSES
        if event.kind in OF_PEOPLE and following == "unfinished":
            closing = "closing" in names  # which followed upon it
        names.append("closing" if closing else following)
    names.reverse()
    for k, event in enumerate(events):
        if event.kind == "end" and k:
            names[k] = names[k - 1]
    return names
