"""The summary of a run: a fold over its journal, written to summary.json.

Reads: events. Writes: nothing.
Never: fills in a value that was not measured, which is None; compares across environments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from darwin_exp.individual import Purpose, Status
from darwin_exp.involvement import involvement
from darwin_exp.protocols import Event
from darwin_exp.recorded import environment_at, environment_of
from darwin_exp.statistics import welch

FINISHED, INTERRUPTED, STOPPED, FAILED = "finished", "interrupted", "stopped", "failed"
OK, NONE_OK, WRONG, LOST, CAPPED, BY_SIGNAL = 0, 1, 2, 3, 4, 130
WORST_FIRST = (BY_SIGNAL, WRONG, NONE_OK, LOST, CAPPED, OK)


def worst(codes: Sequence[int]) -> int:
    """Return the exit code of a sweep whose jobs ended with these."""
    return min(codes, key=_badness, default=OK)


def _badness(code: int) -> int:
    return WORST_FIRST.index(code) if code in WORST_FIRST else -1


def summarise(events: Sequence[Event], n_requested: int, status: str) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        n_requested: mutated individuals that the plan asks for.
        status: how this process ended: finished, interrupted, stopped or failed.
    """
    run = next(event for event in events if event.kind == "run")
    individuals = [event for event in events if event.kind == "individual"]
    mutated = [event for event in individuals if event.payload["editor_id"] is not None]
    counts = Counter(event.payload["status"] for event in mutated)
    ok, lost, duplicates = (
        counts.pop(name.value, 0) for name in (Status.OK, Status.INFRA_LOST, Status.DUPLICATE)
    )
    closing = _last(events, "claim")
    first = _first_attempts(events, mutated)
    repaired = sum(bool(event.payload["repaired"]) for event in mutated)
    return {
        "run_id": run.measured["run_id"],
        "status": status,
        "exit_code": _exit_code(status, ok, lost),
        "requested": n_requested,
        "ok": ok,
        "failed": dict(sorted(counts.items())),
        "lost": lost,
        "duplicates": duplicates,
        "not_started": n_requested - len(mutated),
        "repaired": repaired,
        "error_rate": first.count(False) / len(first) if first else None,
        "resolution_rate": repaired / first.count(False) if first.count(False) else None,
        **_sides(events, individuals, closing),
        "seconds": _seconds(events),
        "llm": _spent_on_models(events),
        "environment": _environment(events, closing),
        "environments": 1 + sum(event.kind == "environment" for event in events),
        "people": involvement(events).in_numbers,
        "mlflow_run_id": None,
    }


def _exit_code(status: str, ok: int, lost: int) -> int:
    if status == INTERRUPTED:
        return BY_SIGNAL
    if status == STOPPED:
        return CAPPED
    if status == FAILED:
        return WRONG
    if not ok:
        return NONE_OK
    return LOST if lost else OK


def _first_attempts(events: Sequence[Event], mutated: Sequence[Event]) -> list[bool]:
    """Tell of each mutated individual whether its first attempt was OK; lost ones are left out."""
    first: dict[str, str] = {}
    for event in events:
        if event.kind != "job" or event.payload["purpose"] != "search":
            continue
        name, status = event.payload["individual_id"], event.payload["status"]
        # Not the trainings of a later environment, whose names begin with it.
        if event.key.startswith(f"{name}/0") and status != Status.INFRA_LOST.value:
            first[name] = status
    outcomes = []
    for event in mutated:
        status = event.payload["status"]
        if status in (Status.DUPLICATE.value, Status.INFRA_LOST.value):
            continue
        outcomes.append(first.get(event.payload["individual_id"], status) == Status.OK.value)
    return outcomes


def _sides(
    events: Sequence[Event], individuals: Sequence[Event], closing: Event | None
) -> dict[str, Any]:
    """Return baseline, champion and improvement, as the environment of the closing knows them."""
    by_id = {event.payload["individual_id"]: event for event in individuals}
    base = next((event for event in individuals if event.payload["editor_id"] is None), None)
    selected = by_id.get(closing.payload["selected_id"]) if closing else None
    here = environment_at(events, closing)
    rates = _rates(events, here)
    jobs = [event for event in events if event.kind == "job" and environment_of(event) == here]
    sides = {
        name: None if event is None else _side(event, jobs, rates, closing)
        for name, event in (("baseline", base), ("champion", selected))
    }
    improvement = _improvement(closing, sides)
    run = next(event for event in events if event.kind == "run")
    steps = run.payload.get("config", {}).get("max_steps")
    for event in events:
        if event.kind == "environment" and event.payload["index"] == here and steps:
            steps = event.payload["changed"].get("max_steps") or steps
    improvement["n_steps"] = steps  # then time decided nothing, and both claims are one
    improvement["equal_steps"] = (
        _claim_of_steps(improvement, closing, jobs)
        if steps
        else _at_steps(_last(events, "equal_steps"))
    )
    return {**sides, "improvement": improvement}


def _environment(events: Sequence[Event], closing: Event | None) -> dict[str, Any]:
    """Return which environment baseline and champion were compared in, and why there is one."""
    here = environment_at(events, closing)
    for event in events:
        if event.kind == "environment" and event.payload["index"] == here:
            because = list(event.measured.get("because") or ())
            return {"index": here, "id": event.payload["environment_id"], "why": because}
    run = next(event for event in events if event.kind == "run")
    return {"index": 0, "id": run.payload.get("environment_id"), "why": []}


def _rates(events: Sequence[Event], here: int) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Return each individual's searched MFU in an environment, and its last re-timing there."""
    searched: dict[str, Any] = {}
    retimed: dict[str, Mapping[str, Any]] = {}
    current = 0
    for event in events:
        if event.kind == "environment":
            current = event.payload["index"]
        elif event.kind in ("individual", "remeasured") and environment_of(event) == here:
            rates = event.measured.get("rates") or {}
            searched[event.payload["individual_id"]] = rates.get("mfu")
        elif event.kind == "retimed" and current == here:
            retimed[event.payload["individual_id"]] = event.measured
    names = searched.keys() | retimed.keys()
    return {name: (searched.get(name), retimed.get(name) or {}) for name in names}


def _side(
    event: Event,
    jobs: Sequence[Event],
    rates: Mapping[str, tuple[Any, Mapping[str, Any]]],
    closing: Event | None,
) -> dict[str, Any]:
    """Return what is known of one individual's code; of claims, only the last closing's count."""
    name = event.payload["individual_id"]
    last = f"{name}/claim-{closing.key.removeprefix('after-g')}-" if closing else None
    ours = [
        job
        for job in jobs
        if job.payload["individual_id"] == name
        and job.payload["genome_id"] == event.payload["genome_id"]
        and job.payload["status"] == Status.OK.value
        and job.payload["purpose"] != Purpose.EQUAL_STEPS.value
        and (job.payload["purpose"] != "claim" or (last and job.key.startswith(last)))
    ]

    def mean_log(metric: str) -> float | None:
        values = [
            job.payload["metrics"][metric] for job in ours if metric in job.payload["metrics"]
        ]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else None

    searched, again = rates.get(name, (None, {}))
    return {
        "individual_id": name,
        "generation": event.payload["generation"],
        "val_perplexity": mean_log("val_perplexity"),
        "val_bpb": mean_log("val_bpb"),
        "test_perplexity": mean_log("test_perplexity"),
        "mfu": again.get("mfu", searched),
        "mfu_retimed": again.get("mfu") is not None,
        "mfus_retimed": again.get("mfus"),
        "replicates": sum(job.payload["purpose"] == "claim" for job in ours),
    }


def _improvement(closing: Event | None, sides: Mapping[str, Any]) -> dict[str, Any]:
    claim = (closing.payload["claim"] if closing else None) or {}
    base, champion = sides["baseline"], sides["champion"]
    return {
        "perplexity_percent": claim.get("perplexity_percent"),
        **_mfu_gain(base, champion, is_claimed=bool(claim)),
        "ci95": claim.get("ci95"),
        "p_value": claim.get("p_value"),
        "significant": claim.get("significant"),
        "why_none": closing.payload["why_none"] if closing else "the run has not been closed",
        "earlier_claims": closing.payload.get("earlier_claims") if closing else None,
    }


def _claim_of_steps(
    improvement: Mapping[str, Any], closing: Event | None, jobs: Sequence[Event]
) -> dict[str, Any]:
    """Return the claim of a run by steps as one at equal steps, if each training did its steps."""
    told = {name: value for name, value in improvement.items() if name != "equal_steps"}
    last = "" if closing is None else f"/claim-{closing.key.removeprefix('after-g')}-"
    done = [job.measured.get("steps_claimed") for job in jobs if last and last in job.key]
    if any(steps != improvement["n_steps"] for steps in done):
        nothing = dict.fromkeys(("perplexity_percent", "ci95", "p_value", "significant"))
        return {**told, **nothing, "why_none": "not every training did all of its steps"}
    return told


def _mfu_gain(
    base: Mapping[str, Any] | None, champion: Mapping[str, Any] | None, is_claimed: bool
) -> dict[str, Any]:
    """Return the change of re-timed MFU in percent, with an interval where both have several."""
    gain: dict[str, Any] = {"mfu_percent": None, "mfu_ci95": None, "mfu_p_value": None}
    if not (is_claimed and base and champion and base["mfu_retimed"] and champion["mfu_retimed"]):
        return gain
    gain["mfu_percent"] = 100 * (champion["mfu"] / base["mfu"] - 1)
    sides = [[math.log(mfu) for mfu in side["mfus_retimed"] or ()] for side in (base, champion)]
    claim = welch(sides[0], sides[1])  # of timings that did not choose the champion
    if claim.perplexity_percent is not None and claim.ci95 is not None:
        low, high = claim.ci95  # of how much lower the champion's is
        gain |= {
            "mfu_percent": -claim.perplexity_percent,
            "mfu_ci95": [-high, -low],
            "mfu_p_value": claim.p_value,
        }
    return gain


def _at_steps(closing: Event | None) -> dict[str, Any] | None:
    """Return the claim at equal steps; None where the run was closed without looking for one."""
    if closing is None:
        return None
    claim = closing.payload["claim"] or {}
    known = ("perplexity_percent", "ci95", "p_value", "significant")
    return {
        **{name: claim.get(name) for name in known},
        "mfu_percent": None,  # a rate: the re-timing of `improvement` is all that there is
        "replicates": min(claim["n_base"], claim["n_selected"]) if claim else None,
        "n_steps": closing.payload["n_steps"],
        "why_none": closing.payload["why_none"],
        "earlier_claims": closing.payload.get("earlier_claims"),
    }


def _spent_on_models(events: Sequence[Event]) -> dict[str, Any]:
    """Return what language models cost; the dollars are None where a price is not known.

    `unsettled` counts calls of which nobody knows how they ended, because the harness was killed
    or the connection was: they may have been paid for.
    """
    answers = [event.payload for event in events if event.kind == "llm_answered"]
    prices = [answer["usd"] for answer in answers]
    ended = {event.key for event in events if event.kind == "llm_failed"}
    unknown = {
        event.key for event in events if event.kind == "llm_failed" and event.payload.get("unknown")
    }
    answered: Counter[str] = Counter()
    reserved: dict[str, list[str]] = {}
    for event in events:
        if event.kind == "llm_reserved":
            reserved.setdefault(event.key.rpartition(".")[0], []).append(event.key)
        elif event.kind == "llm_answered":
            answered[event.key] += 1
    open_ends = sum(
        max(0, sum(key not in ended for key in keys) - answered[query])
        for query, keys in reserved.items()
    )
    return {
        "calls": len(answers),
        "tokens_in": sum(answer["tokens_in"] for answer in answers),
        "tokens_out": sum(answer["tokens_out"] for answer in answers),
        "usd": sum(prices) if prices and None not in prices else None,
        "unsettled": open_ends + len(unknown),
    }


def _last(events: Sequence[Event], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event.kind == kind), None)


def _seconds(events: Sequence[Event]) -> dict[str, Any]:
    jobs = [event.measured for event in events if event.kind in ("job", "timing")]
    ends = [k for k, event in enumerate(events) if event.kind == "generation"]
    until, n_generations = events[: ends[-1] + 1] if ends else [], len(ends)
    return {
        "total": _alive(events),
        "per_generation": _alive(until) / n_generations if n_generations else None,
        "startup": sum(job["startup_seconds"] for job in jobs),
        "training": sum(job["training_seconds"] for job in jobs),
        "scoring": sum(job["scoring_seconds"] for job in jobs),
        "overhead": sum(job["overhead_seconds"] for job in jobs),
        "busy_share": _busy_share(events),
    }


def _busy_share(events: Sequence[Event]) -> float | None:
    """Return the share of slot time that trained or scored, until the last rewrite was submitted.

    None for a run that was resumed: its pauses are no slot time.
    """
    jobs = [event for event in events if event.kind in ("job", "timing")]
    searched = [event for event in jobs if event.payload["purpose"] == "search"]
    sessions = [event for event in events if event.kind == "session"]
    run = next(event for event in events if event.kind == "run")
    if not searched or len(sessions) != 1 or "n_slots" not in run.measured:
        return None
    begin = min(event.written_at - event.measured["total_seconds"] for event in jobs)
    end = max(event.written_at - event.measured["total_seconds"] for event in searched)
    if end <= begin:
        return None
    busy = 0.0
    for event in jobs:
        useful = event.measured["training_seconds"] + event.measured["scoring_seconds"]
        total = event.measured["total_seconds"]
        inside = min(end, event.written_at) - (event.written_at - total)
        busy += useful * max(0.0, min(1.0, inside / total)) if total > 0 else 0.0
    return float(busy / ((end - begin) * run.measured["n_slots"]))


def _alive(events: Sequence[Event]) -> float:
    """Return the time for which processes worked at the run, without the pauses between them."""
    total, since, last = 0.0, None, 0.0
    for event in events:
        if event.kind == "session":
            if since is not None:
                total += last - since
            since = event.written_at
        last = event.written_at
    return total + (last - since if since is not None else 0.0)
