"""What people had to do with a run, as its report tells it.

Reads: a chronicle. Writes: nothing.
Never: shows a text without end: agents and people write them; what is cut says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from darwin_exp.chronicle import Agent, Chronicle, Environment
from darwin_exp.hitl.asked import Standing, State
from darwin_exp.hitl.inbox import Author, Entry
from darwin_exp.involvement import Involvement, Review, involvement
from darwin_exp.report.boundaries import measured_again, name_of
from darwin_exp.wording import duration, number

MOST_ROWS = 150  # of each table; a run may ask a thousand times
LONGEST_LINE, LONGEST_TEXT = 160, 4_000  # characters of a cell, and of a whole content
BY_RULE = "the run's own rules"
STEERING = {
    "guided": "guidance",
    "pinned": "pin",
    "vetoed": "veto",
    "paused": "pause",
    "resumed": "resume",
    "stop_after_generation": "stop",
    "budget": "budget",
    "revoked": "revocation",
}
UNITS = {"budget_seconds": " s", "memory_mb": " MB"}


@dataclass(frozen=True)
class Text:
    """A text of somebody's, as far as it is shown."""

    shown: str
    n_cut: int

    @classmethod
    def of(cls, text: str) -> Text:
        return cls(text[:LONGEST_TEXT], max(0, len(text) - LONGEST_TEXT))


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        reason: its first line.
        content: what an approval would approve.
        instead: what was approved in its place.
        decided: who decided what, and when; empty while it waits.
        outcome: what an approval came to; None where nothing has come of it yet.
        withdrawn: what became of it when it was revoked.
        carriers: who no longer lives because of that.
    """

    request_id: str
    type: str
    askers: tuple[str, ...]
    generation: int
    reason: str
    expected: str
    content: Text
    instead: Text | None
    state: str
    tone: str
    decided_by: str
    decided_at: float | None
    note: str
    outcome: str
    is_done: bool | None
    withdrawn: str
    carriers: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """One thing that a person said beside answers: guidance, a pin, a stop and so on."""

    what: str
    whom: str
    words: str
    by: str
    at: float


@dataclass(frozen=True)
class Fallen:
    """One who was OK and was not when measured again."""

    agent: Agent
    status: str
    message: str


@dataclass(frozen=True)
class Surroundings:
    """One environment.

    Attributes:
        changed: what differs from the run's own, a phrase each.
        base: the base's perplexity in it, the geometric mean of its runs.
        n_again: how many of earlier environments were measured again in it.
    """

    environment: Environment
    name: str
    changed: tuple[str, ...]
    base: float | None
    n_base: int
    n_again: int
    fallen: tuple[Fallen, ...]


@dataclass(frozen=True)
class People:
    """Everything that the report says of people.

    Attributes:
        asked: the requests that were no reviews, or wait for theirs; those that wait first.
        uncounted: what was written and does not count, with the reason.
        idle: what reviews cost, in words; empty where there were none.
        marks: of individuals, what people had to do with them.
    """

    asked: tuple[Asked, ...]
    reviews: tuple[Review, ...]
    said: tuple[Said, ...]
    uncounted: tuple[tuple[str, str], ...]
    idle: str
    paused: str
    environments: tuple[Surroundings, ...]
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def verdicts(self) -> str:
        """Count reviews by how they ended."""
        counts = Counter(review.verdict for review in self.reviews)
        return ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())


def people(chronicle: Chronicle, slot_seconds: float | None = None) -> People | None:
    """Return what is to be told of people; None where they had nothing to do with the run.

    Args:
        slot_seconds: of the whole run, busy or not; None where that is not known.
    """
    found = involvement(chronicle.events)
    if not found and len(chronicle.environments) == 1:
        return None
    return People(
        tuple(_asked(found)),
        found.reviews,
        tuple(_said(found)),
        tuple((_name_of(one.entry.author), one.why) for one in found.board.refused),
        _idle(found, slot_seconds),
        f"paused for {duration(found.paused_seconds)} in all" if found.paused_seconds else "",
        tuple(_surroundings(chronicle, found)),
        _marks(found),
    )


def in_words(people: People, told: Mapping[str, Any]) -> str:
    """Say what people were asked, how they answered, and what it came to.

    Args:
        told: the people of summary.json.
    """
    if not told["asked"]:
        return "Nobody asked for anything."
    requests = "1 request" if told["asked"] == 1 else f"{told['asked']:,} requests"
    if people.reviews:
        requests += f", {len(people.reviews):,} of them for a review"
    counts = [f"{told[word]:,} {word}" for word in ("granted", "denied", "expired")]
    words = f"{requests}: {', '.join(counts)}, {told['waiting']:,} still waiting."
    effects = told["effects"]
    if sum(effects.values()):
        words += f" Of the approvals {effects['done']} took effect and {effects['failed']} failed"
        words += f"; {told['withdrawn']} taken back." if told["withdrawn"] else "."
    return words


def first_line(text: str, most: int = LONGEST_LINE) -> str:
    """Return the first line of a text, cut where it is long."""
    line = text.strip().partition("\n")[0].rstrip()
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _name_of(author: Author) -> str:
    return BY_RULE if author.door == "run" else f"{author.name} ({author.door})"


# --- requests ------------------------------------------------------------------------------------


def _asked(found: Involvement) -> Iterator[Asked]:
    """Yield the requests that are no reviews, or wait; those that wait come first."""
    reviewed = {review.request_id for review in found.reviews}
    told = [one for name, one in found.board.requests.items() if name not in reviewed]
    for standing in sorted(told, key=lambda one: not one.waits):
        request, decision = standing.request, _decision(standing)
        outcome = found.outcomes.get(request.request_id)
        taken_back = [one for one in found.withdrawals if one.request_id == request.request_id]
        changed = next((e.payload for e in standing.history if _is_change(e)), None)
        yield Asked(
            request_id=request.request_id,
            type=request.type.value.replace("_", " "),
            askers=standing.askers,
            generation=request.generation,
            reason=first_line(request.reason),
            expected=first_line(request.expected_effect),
            content=Text.of(request.content),
            instead=None if changed is None else Text.of(str(changed["content"])),
            state=_state(standing, decision),
            tone=_tone(standing.state),
            decided_by="" if decision is None else _name_of(decision.author),
            decided_at=None if decision is None else decision.written_at,
            note=first_line(standing.note),
            outcome="" if outcome is None else _outcome_words(outcome.message, outcome.generation),
            is_done=None if outcome is None else outcome.is_done,
            withdrawn="; ".join(_outcome_words(one.message, one.generation) for one in taken_back),
            carriers=tuple(name for one in taken_back for name in one.carriers),
        )


def _is_change(entry: Entry) -> bool:
    return entry.kind == "answered" and entry.payload.get("decision") == "change"


def _decision(standing: Standing) -> Entry | None:
    """Return the entry that decided; None while it waits and nobody has asked back."""
    deciding = {State.REVOKED: "revoked", State.EXPIRED: "expired"}.get(standing.state, "answered")
    return next((one for one in reversed(standing.history) if one.kind == deciding), None)


def _state(standing: Standing, decision: Entry | None) -> str:
    words = {
        State.PENDING: "waits",
        State.ASKED_BACK: "asked back, waits",
        State.CHANGED: "approved, changed",
        State.EXPIRED: "expired in silence: no",
    }
    state = words.get(standing.state, standing.state.value)
    by_rule = decision is not None and decision.author.door == "run"
    return f"{state} by rule" if by_rule and standing.state is not State.EXPIRED else state


def _tone(state: State) -> str:
    if state in (State.APPROVED, State.CHANGED):
        return "good"
    return "plain" if state in (State.PENDING, State.ASKED_BACK) else "bad"


def _outcome_words(message: str, generation: int) -> str:
    return f"generation {generation}: {first_line(message, 400)}"


# --- what was said, and what it cost --------------------------------------------------------------


def _said(found: Involvement) -> Iterator[Said]:
    uncounted = {one.entry.sequence for one in found.board.refused}
    for entry in found.entries:
        if entry.kind not in STEERING or entry.sequence in uncounted:
            continue
        told = entry.payload
        words = str(told.get("text") or told.get("note") or "")
        if entry.kind == "budget":
            words = f"{told.get('key')} = {told.get('value')}"
        whom = told.get("to") or told.get("individual_id") or told.get("request_id") or ""
        yield Said(
            STEERING[entry.kind],
            str(whom),
            first_line(words, 600),
            _name_of(entry.author),
            entry.written_at,
        )


def _idle(found: Involvement, slot_seconds: float | None) -> str:
    """Say what reviews cost."""
    if not found.reviews:
        return ""
    words = f"Reviews waited {duration(found.waited_seconds)} in all and left "
    if found.idle_seconds < 0.5:
        return f"{words}no slot idle."
    words += f"slots idle for {duration(found.idle_seconds)}"
    if slot_seconds and found.idle_seconds <= slot_seconds:
        share = 100 * found.idle_seconds / slot_seconds
        words += f" ({share:.0f} % of slot time)" if share >= 1 else " (under 1 % of slot time)"
    return f"{words}."


def _marks(found: Involvement) -> dict[str, list[str]]:
    """Return of individuals what people had to do with them."""
    marks: dict[str, list[str]] = {}

    def mark(name: object, words: str) -> None:
        already = marks.setdefault(str(name), [])
        already += [words] if words not in already else []

    for review in found.reviews:
        before = "before the claim " if review.of_champion else ""
        by = f" by {review.by}" if review.by else ""
        mark(review.individual_id, f"{before}{review.verdict}{by}")
    for outcome in found.outcomes.values():
        if outcome.is_done and outcome.details.get("individual_id"):
            mark(outcome.details["individual_id"], f"commissioned by {outcome.request_id}")
    for words, marked in (("pinned", found.board.pins), ("vetoed", found.board.vetoes)):
        for name, entry in marked.items():
            mark(name, f"{words} by {entry.author.name}")
    for one in found.withdrawals:
        for name in one.carriers:
            mark(name, f"taken out with {one.request_id}")
    return marks


# --- environments --------------------------------------------------------------------------------


def _surroundings(chronicle: Chronicle, found: Involvement) -> Iterator[Surroundings]:
    """Yield the environments; nothing where there is but one."""
    if len(chronicle.environments) == 1:
        return
    for environment in chronicle.environments:
        again = measured_again(chronicle, environment)
        fallen = [(agent, agent.measurements[environment.index]) for agent in again]
        losses = [
            math.log(event.payload["metrics"]["val_perplexity"])
            for event in chronicle.base_repeats_in(environment.index)
            if "val_perplexity" in event.payload["metrics"]
        ]
        yield Surroundings(
            environment,
            name_of(chronicle, environment),
            tuple(_changed(found, environment, chronicle.config)),
            math.exp(math.fsum(losses) / len(losses)) if losses else None,
            len(losses),
            len(again),
            tuple(
                Fallen(agent, measured.status.value, first_line(measured.message))
                for agent, measured in fallen
                if measured.fitness is None
            ),
        )


def _changed(found: Involvement, environment: Environment, own: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs from the run's own data, image and budgets."""
    for key, value in environment.changed.items():
        if key == "extra_train":
            for file in value:
                yield f"more text to train on: {text_in_words(found, file)}"
        elif key == "libraries":
            yield f"may be imported: {', '.join(map(str, value))}"
        elif key == "image":
            yield f"image {first_line(str(value), 24)}"
        else:
            before = own.get(key, own.get(f"sandbox.{key}"))
            instead = "" if before is None else f" instead of {before}{UNITS.get(key, '')}"
            yield f"{key.replace('_', ' ')}: {value}{UNITS.get(key, '')}{instead}"


def surroundings_in_words(chronicle: Chronicle, environment: Environment) -> list[str]:
    """Say what an environment has that the run did not begin with, a phrase each."""
    return list(_changed(involvement(chronicle.events), environment, chronicle.config))


def text_in_words(found: Involvement, file: Mapping[str, Any]) -> str:
    """Say of more training text what it is, where it is from and under which licence."""
    told = details_of(found, file)
    words = [f"{number(told['tokens'])} tokens"] if isinstance(told.get("tokens"), int) else []
    source = " ".join(str(told[key]) for key in ("source", "path") if told.get(key))
    words += [f"from {first_line(source)}"] if source else []
    words += [f"licence {first_line(str(told['licence']), 60)}"] if told.get("licence") else []
    words.append(f"hash {str(file.get('content_hash', ''))[:12]}")
    return ", ".join(words)


def details_of(found: Involvement, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the approval that brought a file says of it; empty where none does."""
    for one in found.outcomes.values():
        if one.is_done and one.details.get("content_hash") == file.get("content_hash"):
            return one.details
    return {}
