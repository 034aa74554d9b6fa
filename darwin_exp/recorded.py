"""Individuals as a journal recorded them: who each was, and what it came to in each environment.

Reads: events. Writes: nothing.
Never: mixes what was measured in two environments, or fills in what was not measured.

What people grant may change what a run is measured in: its text, its image, its budgets. Each such
change opens an environment, in which the base and all living individuals are measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from darwin_exp.individual import Edit, Status
from darwin_exp.protocols import Event


@dataclass(frozen=True)
class Environment:
    """What a run measured in, from one generation on; the first is that of its beginning.

    Attributes:
        index: 0 for the first.
        generation: the first generation in it.
        changed: what differs from the run's own data, image and budgets, by name.
        because: ids of the requests whose approval or revocation opened it.
    """

    index: int
    environment_id: str
    generation: int
    changed: Mapping[str, Any] = field(default_factory=dict)
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What an individual came to in one environment.

    Attributes:
        values: metrics and rates by name; a re-timed rate has replaced the searched one.
        searched: rates as the search measured them.
        seconds: startup, training, scoring, overhead and total of the last training, if any.
    """

    status: Status
    reason: str
    message: str
    values: Mapping[str, float]
    searched: Mapping[str, float]
    fitness: float | None
    contended: bool
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Agent:
    """One individual as it was recorded.

    Where it was measured again, its values are those of the last time. Its status is what it
    came to when it was made: one that fails in a later environment was OK in its own.

    Attributes:
        edits: from the base genome to this one, oldest first.
        new_edits: those of them that it added to its parent.
        values: metrics and rates by name; a re-timed rate has replaced the searched one.
        seconds: startup, training, scoring, overhead and total of its last training, if any.
        finished_at: seconds since the epoch.
        environment: the index of the last one that it was measured in.
        measurements: by the environment's index, the one that it was made in first.
    """

    individual_id: str
    generation: int
    slot: int
    parent_ids: tuple[str, ...]
    editor_id: str | None
    edits: tuple[Edit, ...]
    new_edits: tuple[Edit, ...]
    summary: str
    expected_effect: str
    status: Status
    reason: str
    message: str
    values: Mapping[str, float]
    fitness: float | None
    genome_id: str
    attempts: int
    repaired: bool
    contended: bool
    seconds: Mapping[str, float]
    finished_at: float
    environment: int = 0
    measurements: Mapping[int, Measurement] = field(default_factory=dict, repr=False)

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    @property
    def is_base(self) -> bool:
        return self.editor_id is None

    @property
    def made_in(self) -> int:
        """The index of the environment that it was made in."""
        return next(iter(self.measurements), self.environment)

    @property
    def fell_in(self) -> Measurement | None:
        """The measurement by which it was lost: it was OK, and was not when measured again."""
        last = self.measurements.get(self.environment)
        return last if last is not None and self.is_ok and last.status is not Status.OK else None

    def value(self, name: str) -> float | None:
        """Return a metric or rate, or None where it was not measured."""
        return self.values.get(name)

    def seen_in(self, environment: int) -> Agent:
        """Return it as one environment knows it; without values where it was not measured there."""
        found = self.measurements.get(environment)
        if found is None:
            return replace(self, values={}, fitness=None, environment=environment)
        return replace(
            self,
            values=found.values,
            fitness=found.fitness,
            contended=found.contended,
            seconds=found.seconds,
            environment=environment,
        )


def environment_of(event: Event) -> int:
    """Return the index of the environment that an event belongs to, as its payload tells it."""
    return int(event.payload.get("environment") or 0)


def environment_at(events: Iterable[Event], moment: Event | None) -> int:
    """Return the index of the environment that was current at an event; at the end for None."""
    index = 0
    for event in events:
        if event is moment:
            break
        if event.kind == "environment":  # an index is missing where one was given up
            index = int(event.payload["index"])
    return index


def environment_told(event: Event) -> Environment:
    """Return the environment that an "environment" event opened."""
    payload = event.payload
    return Environment(
        int(payload["index"]),
        str(payload["environment_id"]),
        int(payload["generation"]),
        payload["changed"],
        tuple(event.measured.get("because") or ()),
    )


def measurements(events: Iterable[Event]) -> dict[str, dict[int, Measurement]]:
    """Return of each individual its measurements by environment, the first one first."""
    told: dict[str, dict[int, Event]] = {}
    retimed: dict[tuple[str, int], Mapping[str, Any]] = {}
    for event in events:
        if event.kind in ("individual", "remeasured"):
            told.setdefault(event.payload["individual_id"], {})[environment_of(event)] = event
        elif event.kind == "retimed":
            name = event.payload["individual_id"]
            # Whatever it was last measured in is what it was timed again in; the last time counts.
            last = max(told.get(name, {0: None}))
            retimed[name, last] = event.measured
    return {
        name: {k: _measurement(event, retimed.get((name, k), {})) for k, event in found.items()}
        for name, found in told.items()
    }


def _measurement(event: Event, again: Mapping[str, Any]) -> Measurement:
    payload, measured = event.payload, event.measured
    searched = measured.get("rates") or {}
    rates = searched | {name: again[name] for name in ("mfu", "tokens_per_second") if name in again}
    suffix = "_seconds"
    return Measurement(
        status=Status(payload["status"]),
        reason=payload["reason"],
        message=payload["message"],
        values=payload["metrics"] | {k: v for k, v in rates.items() if v is not None},
        searched=searched,
        fitness=payload["fitness"],
        contended=bool(measured.get("contended")),
        seconds={
            key.removesuffix(suffix): value
            for key, value in measured.items()
            if key.endswith(suffix) and isinstance(value, int | float)
        },
    )


def agent_told(event: Event, measured: Mapping[str, Mapping[int, Measurement]]) -> Agent:
    """Return the individual that an "individual" event tells of.

    Args:
        measured: what `measurements` found in all of the run's events.
    """
    payload = event.payload
    name = str(payload["individual_id"])
    edits = tuple(Edit(**edit) for edit in payload["edits"])
    measurements = measured[name]
    last = max(measurements)
    return Agent(
        individual_id=name,
        generation=payload["generation"],
        slot=payload["slot"],
        parent_ids=tuple(payload["parent_ids"]),
        editor_id=payload["editor_id"],
        edits=edits,
        new_edits=edits[len(edits) - payload["n_new_edits"] :],
        summary=payload["summary"],
        expected_effect=payload.get("expected_effect") or "",
        status=Status(payload["status"]),
        reason=payload["reason"],
        message=payload["message"],
        values=measurements[last].values,
        fitness=measurements[last].fitness,
        genome_id=payload["genome_id"],
        attempts=payload["attempts"],
        repaired=payload["repaired"],
        contended=measurements[last].contended,
        seconds=measurements[last].seconds,
        finished_at=event.written_at,
        environment=last,
        measurements=measurements,
    )
