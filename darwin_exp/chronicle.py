"""The chronicle of a run: what its journal says, as people ask for it.

Reads: the events of one journal. Writes: nothing.
Never: asks a file, MLflow or the configuration for what the journal holds; fills in what was not
measured.

Report, comparison and ablation read runs through this one fold, so that they agree. What people
grant may change what a run is measured in; each such change opens an environment, and nothing is
compared across two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from darwin_exp.individual import Genome
from darwin_exp.journal import load
from darwin_exp.protocols import Event
from darwin_exp.recorded import (
    Agent,
    Environment,
    Measurement,
    agent_told,
    environment_at,
    environment_of,
    environment_told,
    measurements,
)

__all__ = ["Agent", "Chronicle", "Environment", "Measurement", "environment_at", "environment_of"]


@dataclass(frozen=True)
class Chronicle:
    """A run, folded from its events.

    Attributes:
        events: all of them, in order, for what is not offered here.
        agents: the base first, then in the order in which they were finished.
    """

    run_id: str
    events: tuple[Event, ...]
    agents: tuple[Agent, ...]
    _by_id: Mapping[str, Agent] = field(repr=False, default_factory=dict)

    @classmethod
    def read(cls, run_folder: Path) -> Chronicle:
        """Read a run's journal, also while the run goes on.

        Raises:
            JournalError: there is none, or it is damaged.
            ValueError: the run had not begun when its journal ends.
        """
        return cls.of(load(run_folder))

    @classmethod
    def of(cls, events: Sequence[Event]) -> Chronicle:
        """Fold events.

        Raises:
            ValueError: they hold no beginning of a run.
        """
        begun = next((event for event in events if event.kind == "run"), None)
        if begun is None:
            raise ValueError("the run had not begun: its journal holds no measurement yet")
        measured = measurements(events)
        agents = [agent_told(event, measured) for event in events if event.kind == "individual"]
        agents.sort(key=lambda agent: not agent.is_base)
        by_id = {agent.individual_id: agent for agent in agents}
        return cls(str(begun.measured["run_id"]), tuple(events), tuple(agents), by_id)

    # --- what the run was ------------------------------------------------------------------------

    @cached_property
    def begun(self) -> Event:
        """The event with config, environment and base files."""
        return next(self.of_kind("run"))

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration's leaves by dotted key."""
        config: Mapping[str, Any] = self.begun.payload["config"]
        return config

    @property
    def command(self) -> str:
        return str(self.begun.measured["command"])

    @property
    def sweep_id(self) -> str | None:
        return self.begun.measured.get("sweep_id")

    @property
    def status(self) -> str:
        """How its last process ended: finished, stopped, interrupted, failed; else "running"."""
        last = next(
            (event for event in reversed(self.events) if event.kind in ("end", "session")), None
        )
        return str(last.payload["status"]) if last and last.kind == "end" else "running"

    def of_kind(self, kind: str) -> Iterator[Event]:
        """Yield the events of a kind, in order."""
        return (event for event in self.events if event.kind == kind)

    # --- what it was measured in ------------------------------------------------------------------

    @cached_property
    def environments(self) -> tuple[Environment, ...]:
        """All of them, in order; a run in which nobody granted anything has one."""
        return (
            Environment(0, str(self.begun.payload.get("environment_id") or ""), 0),
            *map(environment_told, self.of_kind("environment")),
        )

    @property
    def current(self) -> Environment:
        """The environment that everything is compared in: the last."""
        return self.environments[-1]

    @cached_property
    def claimed_in(self) -> Environment:
        """The environment that was current at the last claim; before any, the last."""
        index = environment_at(self.events, self.closing)
        return next(one for one in self.environments if one.index == index)

    # --- who lived -------------------------------------------------------------------------------

    def agent(self, individual_id: str) -> Agent | None:
        """Return an individual by its id; None where it is not finished."""
        return self._by_id.get(individual_id)

    @property
    def base(self) -> Agent | None:
        return self.agents[0] if self.agents and self.agents[0].is_base else None

    @property
    def rewrites(self) -> tuple[Agent, ...]:
        """Everybody but the base."""
        return tuple(agent for agent in self.agents if not agent.is_base)

    @property
    def closing(self) -> Event | None:
        """The last claim's event: baseline_id, selected_id, why_none, claim."""
        return next((event for event in reversed(self.events) if event.kind == "claim"), None)

    @property
    def selected(self) -> Agent | None:
        """Whom the run selected at its end; before that, the fittest in the last environment."""
        if self.closing is not None:
            return self.agent(self.closing.payload["selected_id"])
        ok = [agent for agent in self.compared if agent.fitness is not None]
        # Compared with None, because a fitness of 0 is one: the base's, where they are weighted.
        return max(
            ok,
            key=lambda agent: -math.inf if agent.fitness is None else agent.fitness,
            default=None,
        )

    @property
    def compared(self) -> tuple[Agent, ...]:
        """Those who were measured in the last environment, the base first."""
        last = self.current.index
        return tuple(agent for agent in self.agents if agent.environment == last)

    @property
    def base_repeats(self) -> tuple[Event, ...]:
        """The OK trainings of the base that measure the noise floor, the first included."""
        return self.base_repeats_in(self.current.index)

    def base_repeats_in(self, environment: int) -> tuple[Event, ...]:
        """Return the OK trainings of the base in an environment."""
        return self._base_repeats.get(environment, ())

    @cached_property
    def _base_repeats(self) -> dict[int, tuple[Event, ...]]:
        found: dict[int, tuple[Event, ...]] = {}
        for event in self.of_kind("job"):
            if event.payload["purpose"] == "base_repeat" and event.payload["status"] == "OK":
                k = environment_of(event)
                found[k] = (*found.get(k, ()), event)
        return found

    def best_so_far(self) -> list[float | None]:
        """Return the highest fitness after each finished rewrite, the base's before any.

        It begins anew with each environment: where one was opened, with the best of those who
        were measured again.
        """
        curve: list[float | None] = []
        for began, values in self.best_by_environment():
            curve[began:] = values
        return curve

    def best_by_environment(self) -> list[tuple[int, list[float | None]]]:
        """Return of each environment the rewrites finished before it, and its best so far.

        The first value is of the base and those measured again; then one after each rewrite.
        """
        opened = {environment.index: 0 for environment in self.environments}
        made: dict[int, list[float | None]] = {k: [] for k in opened}
        again: dict[int, list[float | None]] = {k: [] for k in opened}
        for agent in self.agents:
            for k, found in agent.measurements.items():
                is_new = k == agent.made_in and not agent.is_base
                (made if is_new else again)[k].append(found.fitness)
        for before, k in pairwise(opened):
            opened[k] = opened[before] + len(made[before])
        return [(opened[k], _highest(again[k], made[k])) for k in opened]

    # --- what they were --------------------------------------------------------------------------

    @cached_property
    def base_genome(self) -> Genome:
        return Genome.of(self.begun.payload["files"])

    def genome_of(self, individual_id: str) -> Genome:
        """Return an individual's code, rebuilt from the base and the journaled rewrites.

        Raises:
            KeyError: no rewrite of that name was journaled.
        """
        path, name = [], individual_id
        while (agent := self.agent(name)) is not None and not agent.is_base:
            proposal = self._last_proposal(name)
            if proposal is None:  # no edit could be made: it has its parent's code
                name = agent.parent_ids[0]
                continue
            path.append(proposal)
            name = proposal["parent_id"]
        if agent is None:
            raise KeyError(individual_id)
        genome = self.base_genome
        for proposal in reversed(path):
            genome = genome.with_files(proposal["changed"], proposal["removed"])
        return genome

    def _last_proposal(self, individual_id: str) -> Mapping[str, Any] | None:
        """Return the last rewrite that was journaled for an individual, repairs included."""
        return self._proposals.get(individual_id)

    @cached_property
    def _proposals(self) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        for event in self.of_kind("proposal"):
            if "changed" in event.payload:
                found[event.payload["individual_id"]] = event.payload
        return found


def _highest(before: Sequence[float | None], then: Sequence[float | None]) -> list[float | None]:
    """Return the highest of some, and then after each of the others."""
    best = max((one for one in before if one is not None), default=None)
    curve = [best]
    for one in then:
        if one is not None and (best is None or one > best):
            best = one
        curve.append(best)
    return curve
