"""What edits did: every agent against its parent, and every operator over all agents.

Reads: a chronicle. Writes: nothing.
Never: compares a re-timed rate with a searched one, or what was measured in two environments;
guesses a spread from a single outcome.

A rewrite is compared with its parent in the environment that it was made in: both were measured
there, whatever was measured again later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from darwin_exp.chronicle import Agent, Chronicle, Measurement, environment_of
from darwin_exp.individual import Status
from darwin_exp.protocols import Event
from darwin_exp.statistics import NoiseFloor, z_score

PERPLEXITY, MFU = "val_perplexity", "mfu"


@dataclass(frozen=True)
class Effect:
    """What an agent's new edits did together, against the parent it was made from.

    Attributes:
        perplexity_percent: change of validation perplexity; negative is better.
        mfu_percent: change of MFU as the search measured both; positive is better.
        z: change of fitness over the noise floor of a difference; positive is better. None where
            either fitness stands for too high a perplexity rather than for MFU.
    """

    perplexity_percent: float | None = None
    mfu_percent: float | None = None
    z: float | None = None


@dataclass(frozen=True)
class Mean:
    """A weighted mean of relative changes, with its 95 % interval where two outcomes or more are.

    Attributes:
        percent: geometric mean of the changes, in percent.
        low: end of the interval; None where nothing can be said of the spread.
        high: the other end.
        n: outcomes that it rests on.
    """

    percent: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class OperatorRecord:
    """What is known of one operator (a built-in edit, or the model that wrote edits).

    Attributes:
        n_tried: rewrites that held it among their new edits and were sent to be trained.
        n_ok: those that were trained and scored.
        n_alone: the OK ones in which it was the only new edit.
        failures: how often each other status came of it.
    """

    name: str
    n_tried: int
    n_ok: int
    n_alone: int
    perplexity: Mean | None
    mfu: Mean | None
    failures: Mapping[str, int]


@dataclass
class _Tally:
    tried: int = 0
    ok: int = 0
    alone: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    perplexity: list[tuple[float, float]] = field(default_factory=list)  # weight, log ratio
    mfu: list[tuple[float, float]] = field(default_factory=list)


def noise_floor(chronicle: Chronicle, environment: int | None = None) -> NoiseFloor:
    """Return the last spread of the base's fitness that a generation recorded.

    Args:
        environment: the index of the one that it was recorded in; None for the last.
    """
    here = chronicle.current.index if environment is None else environment
    for event in reversed(chronicle.events):
        if event.kind == "generation" and environment_of(event) == here:
            noise = event.payload.get("noise_sd")
            if noise is not None:
                return NoiseFloor(noise, len(chronicle.base_repeats_in(here)))
    return NoiseFloor()


def effects(chronicle: Chronicle) -> dict[str, Effect]:
    """Return each rewrite's effect against its parent, by individual id."""
    noise = {one.index: noise_floor(chronicle, one.index) for one in chronicle.environments}
    below_zero_is_nats = chronicle.config.get("fitness.name") == "mfu"
    found = {}
    for agent in chronicle.rewrites:
        pair = at_birth(chronicle, agent)
        if pair is None:
            continue
        child, parent = pair
        gain = None
        if child.fitness is not None and parent.fitness is not None:
            gain = child.fitness - parent.fitness
            if below_zero_is_nats and min(child.fitness, parent.fitness) < 0:
                gain = None  # of other units than the noise floor, which is one of MFU
        found[agent.individual_id] = Effect(
            percent_of(log_ratio(child.values.get(PERPLEXITY), parent.values.get(PERPLEXITY))),
            percent_of(log_ratio(child.searched.get(MFU), parent.searched.get(MFU))),
            z_score(gain, noise[agent.made_in]),
        )
    return found


def at_birth(chronicle: Chronicle, agent: Agent) -> tuple[Measurement, Measurement] | None:
    """Return an agent's and its parent's measurement in the environment that it was made in."""
    parent = chronicle.agent(agent.parent_ids[0]) if agent.parent_ids else None
    before = parent.measurements.get(agent.made_in) if parent is not None else None
    return None if before is None else (agent.measurements[agent.made_in], before)


def operator_records(chronicle: Chronicle) -> list[OperatorRecord]:
    """Return what became of each operator, best mean effect on perplexity first.

    An outcome with k new edits is shared among them as the drawing of edits does: each is given
    the whole change with a weight of 1/k, because nobody knows which of them did it. A rewrite
    that failed and was mended counts twice as tried: as it failed, and as it ended.
    """
    tallies = dict[str, _Tally]()
    last = {event.payload["individual_id"]: event.key for event in _made(chronicle)}
    outcomes = _outcomes(chronicle)
    for event in _made(chronicle):
        n_new = event.payload["n_new"]
        new = event.payload["edits"][len(event.payload["edits"]) - n_new :] if n_new else []
        status = outcomes.get(event.key)
        if status is None:  # still under way
            continue
        agent = chronicle.agent(event.payload["individual_id"])
        is_final = agent is not None and agent.is_ok and last[agent.individual_id] == event.key
        for name in {str(edit["operator"]) for edit in new}:
            tally = tallies.setdefault(name, _Tally())
            tally.tried += 1
            if status != Status.OK.value:
                tally.failures[status] += 1
                continue
            tally.ok += 1
            tally.alone += n_new == 1
            if is_final and agent is not None:
                _add_outcome(tally, chronicle, agent, 1 / n_new)
    records = [
        OperatorRecord(
            name,
            tally.tried,
            tally.ok,
            tally.alone,
            mean_of(tally.perplexity),
            mean_of(tally.mfu),
            dict(tally.failures),
        )
        for name, tally in tallies.items()
    ]
    return sorted(
        records, key=lambda r: (r.perplexity.percent if r.perplexity else math.inf, r.name)
    )


def _made(chronicle: Chronicle) -> Iterator[Event]:
    return (event for event in chronicle.of_kind("proposal") if "edits" in event.payload)


def _outcomes(chronicle: Chronicle) -> dict[str, str]:
    """Return how each rewrite's training ended, by the proposal's key; its last repeat counts."""
    return {
        event.key.partition(".")[0]: str(event.payload["status"])
        for event in chronicle.of_kind("job")
        if event.payload["purpose"] == "search"
    }


def _add_outcome(tally: _Tally, chronicle: Chronicle, agent: Agent, weight: float) -> None:
    pair = at_birth(chronicle, agent)
    if pair is None:
        return
    child, parent = pair
    change = log_ratio(child.values.get(PERPLEXITY), parent.values.get(PERPLEXITY))
    if change is not None:
        tally.perplexity.append((weight, change))
    change = log_ratio(child.searched.get(MFU), parent.searched.get(MFU))
    if change is not None:
        tally.mfu.append((weight, change))


def mean_of(outcomes: Sequence[tuple[float, float]]) -> Mean | None:
    """Return the weighted mean of log ratios, in percent, with Student's interval.

    Args:
        outcomes: (weight, log ratio) of each. Weights count as shares of an outcome: there are
            (sum w)^2 / sum w^2 of them, which sets the degrees of freedom (L. Kish 1965).
    """
    if not outcomes:
        return None
    total = math.fsum(weight for weight, _ in outcomes)
    mean = math.fsum(weight * change for weight, change in outcomes) / total
    n_effective = total**2 / math.fsum(weight**2 for weight, _ in outcomes)
    percent = percent_of(mean) or 0.0
    if len(outcomes) < 2 or n_effective <= 1:
        return Mean(percent, None, None, len(outcomes))
    from scipy.special import stdtrit

    variance = math.fsum(w * (change - mean) ** 2 for w, change in outcomes) / total
    variance *= n_effective / (n_effective - 1)
    margin = float(stdtrit(n_effective - 1, 0.975)) * math.sqrt(variance / n_effective)
    if not math.isfinite(margin) or abs(mean) + margin > 50:  # as good as unbounded
        return Mean(percent, None, None, len(outcomes))
    return Mean(percent, percent_of(mean - margin), percent_of(mean + margin), len(outcomes))


def log_ratio(after: float | None, before: float | None) -> float | None:
    """Return log(after / before); None unless both are positive and finite."""
    if after is None or before is None or not (after > 0 and before > 0):
        return None
    change = math.log(after) - math.log(before)
    return change if math.isfinite(change) else None


def percent_of(change: float | None) -> float | None:
    """Return a log ratio as a relative change in percent."""
    return None if change is None else 100 * math.expm1(min(change, 700.0))
