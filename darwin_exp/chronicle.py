"""The chronicle of a run: what its journal says, as people ask for it.

Reads: the events of one journal. Writes: nothing.
Never: asks a file, MLflow or the configuration for what the journal holds; fills in what was not
measured.

Report, comparison and ablation read runs through this one fold, so that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from darwin_exp.individual import Edit, Genome, Status
from darwin_exp.journal import load
from darwin_exp.protocols import Event


@dataclass(frozen=True)
class Agent:
    """One individual as it was recorded.

    Attributes:
        edits: from the base genome to this one, oldest first.
        new_edits: those of them that it added to its parent.
        values: metrics and rates by name; a re-timed rate has replaced the searched one.
        seconds: startup, training, scoring, overhead and total of its last training, if any.
        finished_at: seconds since the epoch.
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

    @property
    def is_ok(self) -> bool:
        return self.status is Status.OK

    @property
    def is_base(self) -> bool:
        return self.editor_id is None

    def value(self, name: str) -> float | None:
        """Return a metric or rate, or None where it was not measured."""
        return self.values.get(name)


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
        retimed = {  # an individual's last counts
            event.payload["individual_id"]: event.measured
            for event in events
            if event.kind == "retimed"
        }
        agents = [_agent(event, retimed) for event in events if event.kind == "individual"]
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
        """Whom the run selected at its end; before that, the fittest so far."""
        if self.closing is not None:
            return self.agent(self.closing.payload["selected_id"])
        ok = [agent for agent in self.agents if agent.fitness is not None]
        # Compared with None, because a fitness of 0 is one: the base's, where they are weighted.
        return max(
            ok,
            key=lambda agent: -math.inf if agent.fitness is None else agent.fitness,
            default=None,
        )

    @cached_property
    def base_repeats(self) -> tuple[Event, ...]:
        """The OK trainings of the base that measure the noise floor, the first included."""
        return tuple(
            event
            for event in self.of_kind("job")
            if event.payload["purpose"] == "base_repeat" and event.payload["status"] == "OK"
        )

    def best_so_far(self) -> list[float | None]:
        """Return the highest fitness after each finished rewrite, the base's before any."""
        best = self.base.fitness if self.base else None
        curve = [best]
        for agent in self.rewrites:
            if agent.fitness is not None and (best is None or agent.fitness > best):
                best = agent.fitness
            curve.append(best)
        return curve

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


def _agent(event: Event, retimed: Mapping[str, Mapping[str, Any]]) -> Agent:
    payload, measured = event.payload, event.measured
    name = str(payload["individual_id"])
    edits = tuple(Edit(**edit) for edit in payload["edits"])
    again = retimed.get(name, {})
    rates = {**measured.get("rates", {})}
    rates |= {rate: again[rate] for rate in ("mfu", "tokens_per_second") if rate in again}
    suffix = "_seconds"
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
        values=payload["metrics"] | {k: v for k, v in rates.items() if v is not None},
        fitness=payload["fitness"],
        genome_id=payload["genome_id"],
        attempts=payload["attempts"],
        repaired=payload["repaired"],
        contended=bool(measured.get("contended")),
        seconds={
            key.removesuffix(suffix): value
            for key, value in measured.items()
            if key.endswith(suffix) and isinstance(value, int | float)
        },
        finished_at=event.written_at,
    )
