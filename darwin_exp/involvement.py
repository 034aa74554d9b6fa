"""What people had to do with a run: a fold over its journal.

Reads: events; of the inbox only what the run took from it. Writes: nothing.
Never: looks into the inbox itself, where more may wait than the run has heard of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from darwin_exp.hitl.inbox import Entry, from_json
from darwin_exp.hitl.requests import GRANTED, WAITING, Board, State, fold
from darwin_exp.protocols import Event

DONE = "done"  # the outcome of an effect that took place
CHAMPION_REVIEW = "champion/"  # how the keys of reviews before a claim begin
VERDICTS = {state.value: state for state in (*GRANTED, State.DENIED, State.EXPIRED)}


@dataclass(frozen=True)
class Review:
    """What became of a patch that waited for a person.

    Attributes:
        verdict: approved, changed, denied or expired.
        by: who decided; empty where nobody did.
        why: why it was reviewed.
        of_champion: whether it was reviewed before the claim, and not before it ran.
    """

    individual_id: str
    request_id: str
    verdict: str
    note: str
    by: str
    why: str
    waited_seconds: float
    of_champion: bool
    written_at: float


@dataclass(frozen=True)
class Outcome:
    """What an approval came to.

    Attributes:
        generation: in which it took effect.
        is_done: whether it took place.
        message: what happened, or why nothing did.
    """

    request_id: str
    type: str
    generation: int
    is_done: bool
    message: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Withdrawal:
    """An effect that a person took back, and who no longer lives because they carried it."""

    request_id: str
    type: str
    generation: int
    message: str
    carriers: tuple[str, ...]


@dataclass(frozen=True)
class Involvement:
    """All of it.

    Attributes:
        entries: what the run took from its inbox, in their order.
        board: what they amount to.
        idle_seconds: of slots, that reviews cost.
        paused_seconds: for which the run began no life because a person said so.
    """

    entries: tuple[Entry, ...] = ()
    board: Board = field(default_factory=Board)
    reviews: tuple[Review, ...] = ()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    withdrawals: tuple[Withdrawal, ...] = ()
    idle_seconds: float = 0.0
    paused_seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.entries or self.reviews or self.outcomes or self.paused_seconds)

    @property
    def waited_seconds(self) -> float:
        """How long patches waited, each counted by itself."""
        return sum(review.waited_seconds for review in self.reviews)

    @cached_property
    def states(self) -> dict[str, State]:
        """Where every request stands, by its id.

        A review is heard of before the run takes it out of its inbox: at the end, never.
        """
        states = {name: one.state for name, one in self.board.requests.items()}
        for review in self.reviews:
            if states.get(review.request_id, State.PENDING) in WAITING:
                states[review.request_id] = VERDICTS[review.verdict]
        return states

    @property
    def in_numbers(self) -> dict[str, Any]:
        """Return it as summary.json tells it; what was granted and revoked was granted."""
        states = Counter(self.states.values())
        n_done = sum(one.is_done for one in self.outcomes.values())
        return {
            "asked": states.total(),
            "granted": sum(states[state] for state in (*GRANTED, State.REVOKED)),
            "denied": states[State.DENIED],
            "expired": states[State.EXPIRED],
            "waiting": sum(states[state] for state in WAITING),
            "reviews": len(self.reviews),
            "review_waited_seconds": self.waited_seconds,
            "review_idle_seconds": self.idle_seconds,
            "effects": {"done": n_done, "failed": len(self.outcomes) - n_done},
            "withdrawn": len(self.withdrawals),
        }


def involvement(events: Iterable[Event]) -> Involvement:
    """Fold a run's events into what people had to do with it."""
    entries: dict[int, Entry] = {}
    reviews: list[Review] = []
    outcomes: dict[str, Outcome] = {}
    withdrawals: list[Withdrawal] = []
    idle = paused = 0.0
    run_id = None
    for event in events:
        if event.kind == "run":
            run_id = str(event.measured["run_id"])
        elif event.kind == "inbox":
            for told in event.payload["entries"]:
                entry = from_json(told)
                entries[entry.sequence] = entry  # lives overlap, so two may take the same one
        elif event.kind == "review":
            reviews.append(_review(event))
            idle += float(event.measured.get("idle_seconds") or 0.0)
        elif event.kind == "effect":
            outcomes[event.payload["request_id"]] = _outcome(event)
        elif event.kind == "withdrawn":
            withdrawals.append(_withdrawal(event))
        elif event.kind == "paused":
            paused += float(event.measured.get("seconds") or 0.0)
    taken = tuple(entries[sequence] for sequence in sorted(entries))
    return Involvement(
        taken, fold(taken, run_id), tuple(reviews), outcomes, tuple(withdrawals), idle, paused
    )


def _review(event: Event) -> Review:
    payload = event.payload
    return Review(
        individual_id=str(payload["individual_id"]),
        request_id=str(payload["request_id"]),
        verdict=str(payload["verdict"]),
        note=str(payload.get("note") or ""),
        by=str(payload.get("by") or ""),
        why=str(payload.get("why") or ""),
        waited_seconds=float(event.measured.get("waited_seconds") or 0.0),
        of_champion=event.key.startswith(CHAMPION_REVIEW),
        written_at=event.written_at,
    )


def _outcome(event: Event) -> Outcome:
    payload = event.payload
    return Outcome(
        str(payload["request_id"]),
        str(payload["type"]),
        int(payload["generation"]),
        payload["outcome"] == DONE,
        str(payload.get("message") or ""),
        payload.get("details") or {},
    )


def _withdrawal(event: Event) -> Withdrawal:
    payload = event.payload
    return Withdrawal(
        str(payload["request_id"]),
        str(payload["type"]),
        int(payload["generation"]),
        str(payload.get("message") or ""),
        tuple(map(str, payload.get("carriers") or ())),
    )
