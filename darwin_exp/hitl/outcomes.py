"""Outcomes: what came of the answers that people gave, in words for both doors.

Reads: the journal, where the run writes what it has done.
Never: says that something was done which the run has not recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_exp.hitl.asked import GRANTED, RequestType, Standing, State
from darwin_exp.involvement import Involvement, Review, involvement
from darwin_exp.journal import FILE_NAME, JournalError, load
from darwin_exp.protocols import Event
from darwin_exp.wording import duration

TAKING_EFFECT = frozenset(
    {
        RequestType.DATASET,
        RequestType.SCRIPT,
        RequestType.FILE_STRUCTURE,
        RequestType.LIBRARY,
        RequestType.RESOURCES,
    }
)

MOST_DIGITS = 30  # of a number, commas included
_WENT_ON = ("approved", "changed")


@dataclass(frozen=True)
class Outcome:
    """What came of one answer.

    Attributes:
        word: for a list.
        sentence: the whole of it.
        tone: yes, no or waiting, as a door colours it.
    """

    word: str
    sentence: str
    tone: str


@dataclass(frozen=True)
class Outcomes:
    """What came of all of them, as far as the run has got.

    Attributes:
        caps: the caps that people have set, in words, by the entry that set them.
        claimed: whom the run has claimed.
        has_ended: whether no process of the run is to do any more.
        problem: why the journal could not be read; empty where it could.
    """

    told: Involvement = field(default_factory=Involvement)
    caps: Mapping[int, str] = field(default_factory=dict)
    claimed: frozenset[str] = frozenset()
    has_ended: bool = False
    problem: str = ""

    @classmethod
    def of(cls, events: Sequence[Event]) -> Outcomes:
        """Fold a run's events."""
        last = next((one for one in reversed(events) if one.kind in ("session", "end")), None)
        caps = {
            int(one.key): f"{in_words(one.payload['key'], one.payload['value'])} from now on"
            for one in events
            if one.kind == "budget"
        }
        claimed = frozenset(
            str(one.payload["selected_id"]) for one in events if one.kind == "claim"
        )
        return cls(involvement(events), caps, claimed, last is not None and last.kind == "end")

    @classmethod
    def read(cls, run_folder: Path) -> Outcomes:
        """Read a run's journal, whether or not it is alive; a run without one has done nothing."""
        if not (run_folder / FILE_NAME).is_file():
            return cls()
        try:
            return cls.of(load(run_folder))
        except JournalError as error:
            return cls(problem=f"what came of answers is not known: {error}")

    def of_request(self, standing: Standing) -> Outcome | None:
        """Return what came of the answer to a request; None where there is nothing to tell."""
        if self.problem:
            return None
        request, state = standing.request, standing.state
        done = self.told.outcomes.get(request.request_id)
        for gone in reversed(self.told.withdrawals):
            if gone.request_id == request.request_id:
                words = f"withdrawn in generation {gone.generation}: {gone.message}"
                if gone.carriers:
                    words += f"; no longer alive for it: {', '.join(gone.carriers)}"
                return Outcome("withdrawn", words, "no")
        if state is State.REVOKED:
            return self._revoked(standing)
        if done is not None:
            word, tone = ("done", "yes") if done.is_done else ("failed", "no")
            return Outcome(word, f"{word} in generation {done.generation}: {done.message}", tone)
        if (review := self._review(request.request_id)) is not None:
            return _reviewed(review)
        if state not in GRANTED:
            return None
        if request.type in TAKING_EFFECT:
            return Outcome("to come", self._at("takes effect"), "waiting")
        if cap := self._cap(standing):
            return Outcome("done", f"done: {cap}", "yes")
        if request.type in (RequestType.EDIT, RequestType.BUDGET):
            return Outcome("to come", "the run takes it in at its next look", "waiting")
        return Outcome("told", "whoever asked is told so with the next prompt", "yes")

    def _revoked(self, standing: Standing) -> Outcome:
        """Return what became of a grant that was taken back and is not recorded as withdrawn."""
        kind, name = standing.request.type, standing.request.request_id
        done, review = self.told.outcomes.get(name), self._review(name)
        if done is not None and done.is_done:
            return Outcome("to be withdrawn", self._at("is withdrawn"), "waiting")
        if cap := self._cap(standing):
            words = f"it came too late: {cap}; set another with `budget`"
            return Outcome("too late", words, "no")
        if review is not None and review.verdict in _WENT_ON:
            return Outcome("revoked", self._outcast(review), "no")
        if kind in TAKING_EFFECT or kind in (RequestType.EDIT, RequestType.BUDGET):
            return Outcome("no effect", "revoked before it had any effect", "no")
        return Outcome("told", "revoked; whoever asked is told so with the next prompt", "no")

    def _outcast(self, review: Review) -> str:
        who = f"its individual, {review.individual_id}"
        words = f"revoked: {who}, and those who descend from it live no longer from the next "
        words += "generation on"
        if not review.of_champion:
            return words
        if review.individual_id in self.claimed:
            return f"{words}; the claim stands"
        return f"{words}; a claim that is under way is made"

    def _review(self, name: str) -> Review | None:
        found = (one for one in reversed(self.told.reviews) if one.request_id == name)
        return next(found, None)

    def _cap(self, standing: Standing) -> str:
        """Return the cap that an answer has set, in words."""
        set_by = (self.caps.get(entry.sequence, "") for entry in standing.history)
        return next(filter(None, set_by), "")

    def _at(self, what: str) -> str:
        if self.has_ended:
            return f"the run has ended; it {what} if the run is resumed for further generations"
        return f"{what} at the next generation"


def _reviewed(review: Review) -> Outcome:
    waited = f"after {duration(review.waited_seconds)}"
    words = {
        "approved": f"went on {waited}, as it was shown",
        "changed": f"went on {waited}, as {review.by} changed it",
        "denied": f"did not go on: {review.note}",
        "expired": f"did not go on: {review.note or 'nobody answered in time'}",
    }.get(review.verdict, review.verdict)
    went_on = review.verdict in _WENT_ON
    return Outcome("went on" if went_on else "stopped", words, "yes" if went_on else "no")


def in_words(key: str, value: Any) -> str:
    """Return a cap as both doors tell it, however large its number is."""
    if isinstance(value, float):
        return f"{key} is {value:g}"
    digits = f"{value:,}"
    return f"{key} is {digits if len(digits) <= MOST_DIGITS else 'beyond all bounds'}"
