"""What language models were asked, answered and cost, and what became of it.

Reads: a chronicle, and the effects of its agents. Writes: nothing.
Never: counts a try as an answer, an answer as used whose rewrite did not pass, or a price that is
not known as nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.individual import Status
from darwin_exp.protocols import Event
from darwin_exp.report.effects import Effect

SHOWN = 30  # exchanges of the selected agent's line
LONGEST = 4000  # characters of a text of theirs
USED, TURNED_DOWN, OPEN = "used", "turned down", "under way"


@dataclass(frozen=True)
class ModelRecord:
    """What is known of one language model, at one endpoint and temperature.

    Attributes:
        n_used: answers that became code which was trained.
        n_turned_down: answers that could not be read or applied, or that a gate objected to.
        usd: None where the price of any of its answers is not known.
        median_seconds: until an answer was there, with the tries before it.
        n_kept: rewrites that ended OK with an edit of its own.
        perplexity_percent: median change of their perplexity against the parent.
        mfu_percent: the same of MFU.
        n_effects: rewrites behind the change of perplexity.
    """

    name: str
    base_url: str
    n_calls: int
    n_used: int
    n_turned_down: int
    tokens_in: int
    tokens_out: int
    usd: float | None
    median_seconds: float | None
    n_kept: int
    perplexity_percent: float | None
    mfu_percent: float | None
    n_effects: int


@dataclass(frozen=True)
class Text:
    """A text of an exchange, and how many characters of it are not shown."""

    role: str
    shown: str
    n_cut: int


@dataclass(frozen=True)
class Exchange:
    """One question and its answer.

    Attributes:
        asked: what was new in the question against the exchange before.
        verdict: used, turned down or under way; with the reason where it was recorded.
    """

    key: str
    individual_id: str
    purpose: str
    model: str
    asked: tuple[Text, ...]
    answer: Text
    finish: str
    tokens_in: int
    tokens_out: int
    usd: float | None
    seconds: float | None
    verdict: str


@dataclass(frozen=True)
class FirstAttempts:
    """How the first attempts of rewrites went; those that were lost and duplicates are left out.

    Attributes:
        n_repaired: rewrites whose first attempt was not OK and whose last one was.
    """

    n: int
    n_not_ok: int
    n_repaired: int


@dataclass(frozen=True)
class Exchanges:
    """Everything about language models in a run that asked any.

    Attributes:
        failures: what went wrong with tries, and how often.
        of_line: the last exchanges of the selected agent's line.
        n_left_out: earlier ones of that line.
    """

    models: tuple[ModelRecord, ...]
    failures: tuple[tuple[str, int], ...]
    of_line: tuple[Exchange, ...]
    n_left_out: int
    first_attempts: FirstAttempts


def exchanges(
    chronicle: Chronicle,
    effects: Mapping[str, Effect],
    line: Sequence[Agent],
    summary: Mapping[str, Any],
) -> Exchanges | None:
    """Return what is to be told of language models; None where none was asked.

    Args:
        line: the selected agent's ancestors and itself.
        summary: what summary.json holds.
    """
    answers = list(chronicle.of_kind("llm_answered"))
    failures = tuple(_failures(chronicle))
    if not answers and not failures:
        return None
    verdicts = _verdicts(chronicle, answers)
    members = {agent.individual_id for agent in line}
    of_line = [event for event in answers if event.payload["individual_id"] in members]
    return Exchanges(
        models=tuple(_records(chronicle, effects, answers, verdicts)),
        failures=failures,
        of_line=tuple(_shown(of_line, verdicts))[-SHOWN:],
        n_left_out=max(0, len(of_line) - SHOWN),
        first_attempts=_first_attempts(chronicle, summary),
    )


def label_of(model: Mapping[str, Any]) -> str:
    """Return a language model's name, with its temperature where it has one of its own."""
    temperature = model.get("temperature")
    return str(model["name"]) if temperature is None else f"{model['name']}@{temperature:g}"


# --- what became of answers -----------------------------------------------------------------------


def _attempt_of(query: str) -> str:
    """Return the individual and attempt that a query belongs to: its key without the call."""
    return query.rpartition("/")[0]


def _verdicts(chronicle: Chronicle, answers: Sequence[Event]) -> dict[str, str]:
    """Return what became of each answer, by its query's key.

    A rewrite that passed says in its last edit which calls made it: one, or where chunks are edited
    one by one, several. A call that another followed in the same attempt, and that is not among
    them, was turned down.
    """
    ended = {event.key: event.payload for event in chronicle.of_kind("proposal")}
    attempts: dict[str, list[Event]] = {}
    for event in answers:
        attempts.setdefault(_attempt_of(event.key), []).append(event)
    verdicts: dict[str, str] = {}
    for attempt, calls in attempts.items():
        made, last = ended.get(attempt), calls[-1].key
        verdicts |= dict.fromkeys((event.key for event in calls), TURNED_DOWN)
        if made is None:
            verdicts |= {e.key: OPEN for e in calls if e.payload.get("schema") == "chunk"}
            verdicts[last] = OPEN
        elif "reason" in made:
            verdicts[last] = f"{TURNED_DOWN}: {str(made['reason']).replace('_', ' ')}"
        else:
            verdicts |= dict.fromkeys(_calls_behind(made, last), USED)
    return verdicts


def _calls_behind(made: Mapping[str, Any], last: str) -> list[str]:
    """Return the keys of the calls that made a rewrite; the last one where it does not say."""
    parameters = made["edits"][-1]["parameters"] if made["edits"] else {}
    first = str(parameters.get("exchange", last))
    attempt, _, call = first.rpartition("/")
    return [f"{attempt}/{int(call) + k}" for k in range(int(parameters.get("calls", 1)))]


def _failures(chronicle: Chronicle) -> Iterator[tuple[str, int]]:
    """Yield what went wrong with tries, the most frequent first."""
    found: Counter[str] = Counter()
    for event in chronicle.of_kind("llm_failed"):
        words = str(event.payload.get("kind", "unknown")).replace("_", " ")
        if event.payload.get("status") is not None:
            words += f" (HTTP {event.payload['status']})"
        if event.payload.get("unknown"):
            words += ", and nobody knows whether it was answered"
        found[words] += 1
    yield from found.most_common()


def _first_attempts(chronicle: Chronicle, summary: Mapping[str, Any]) -> FirstAttempts:
    """Return the counts behind the summary's rates."""
    uncounted = (Status.DUPLICATE, Status.INFRA_LOST)
    n = sum(agent.status not in uncounted for agent in chronicle.rewrites)
    return FirstAttempts(n, round(n * (summary["error_rate"] or 0.0)), summary["repaired"])


# --- models ---------------------------------------------------------------------------------------


def _records(
    chronicle: Chronicle,
    effects: Mapping[str, Effect],
    answers: Sequence[Event],
    verdicts: Mapping[str, str],
) -> Iterator[ModelRecord]:
    """Yield a record of each model, the one with the most calls first."""
    calls: dict[tuple[str, str], list[Event]] = {}
    writer: dict[str, tuple[str, str]] = {}  # of the rewrite that an individual ended with
    for event in answers:
        model = event.payload["model"]
        who = (label_of(model), str(model["base_url"]))
        calls.setdefault(who, []).append(event)
        if verdicts[event.key] == USED:
            writer[event.payload["individual_id"]] = who
    ok = [agent.individual_id for agent in chronicle.rewrites if agent.is_ok]
    for who, events in sorted(calls.items(), key=lambda item: (-len(item[1]), item[0])):
        kept = [effects.get(name, Effect()) for name in ok if writer.get(name) == who]
        perplexity = [e.perplexity_percent for e in kept if e.perplexity_percent is not None]
        seconds = [event.measured.get("seconds") for event in events]
        prices = [event.payload.get("usd") for event in events]
        became = [verdicts[event.key] for event in events]
        yield ModelRecord(
            name=who[0],
            base_url=who[1],
            n_calls=len(events),
            n_used=became.count(USED),
            n_turned_down=sum(verdict.startswith(TURNED_DOWN) for verdict in became),
            tokens_in=sum(event.payload["tokens_in"] for event in events),
            tokens_out=sum(event.payload["tokens_out"] for event in events),
            usd=sum(p for p in prices if p is not None) if None not in prices else None,
            median_seconds=_median([one for one in seconds if one is not None]),
            n_kept=len(kept),
            perplexity_percent=_median(perplexity),
            mfu_percent=_median([e.mfu_percent for e in kept if e.mfu_percent is not None]),
            n_effects=len(perplexity),
        )


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


# --- what was said --------------------------------------------------------------------------------


def _shown(answers: Sequence[Event], verdicts: Mapping[str, str]) -> Iterator[Exchange]:
    """Yield exchanges; of a conversation that goes on, what was said before is not said again."""
    before: tuple[str, list[list[str]]] = ("", [])
    for event in answers:
        payload = event.payload
        attempt = _attempt_of(event.key)
        messages = [list(message) for message in payload["messages"]]
        said = before[1] if before[0] == attempt else []
        new = messages[len(said) :] if messages[: len(said)] == said else messages
        before = (attempt, [*messages, ["assistant", payload["text"]]])
        yield Exchange(
            key=event.key,
            individual_id=payload["individual_id"],
            purpose=payload["purpose"],
            model=label_of(payload["model"]),
            asked=tuple(_text(role, text) for role, text in new),
            answer=_text("assistant", payload["text"]),
            finish=payload["finish"],
            tokens_in=payload["tokens_in"],
            tokens_out=payload["tokens_out"],
            usd=payload.get("usd"),
            seconds=event.measured.get("seconds"),
            verdict=verdicts[event.key],
        )


def _text(role: str, text: str) -> Text:
    return Text(role, text[:LONGEST], max(0, len(text) - LONGEST))
