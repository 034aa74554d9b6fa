"""The numbers of a comparison: per run, per setting, and within each environment.

Reads: chronicles. Writes: nothing.
Never: counts a run that is not finished into a mean; puts a number where nothing was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.compare.settings import group, short
from darwin_exp.summary import FINISHED, summarise


@dataclass(frozen=True)
class Measure:
    """One column of the comparison.

    Attributes:
        name: in comparison.json.
        heading: in tables.
        digits: after the decimal point.
        signed: whether it is a change, and shown with its sign.
    """

    name: str
    heading: str
    digits: int
    signed: bool = False


MEASURES = (
    Measure("improvement_percent", "test perplexity, gain %", 1, signed=True),
    Measure("test_perplexity", "test perplexity", 2),
    Measure("equal_steps_percent", "gain at equal steps %", 1, signed=True),
    Measure("mfu_percent", "re-timed MFU, change %", 1, signed=True),
    Measure("best_val_perplexity", "best val perplexity", 2),
    Measure("ok", "ok", 1),
    Measure("failed", "failed", 1),
    Measure("duplicates", "duplicates", 1),
    Measure("lost", "lost", 1),
    Measure("seconds", "seconds", 0),
)


@dataclass(frozen=True)
class RunValues:
    """What one run came to.

    Attributes:
        status: finished, stopped, interrupted, failed or running.
        values: by measure; None where it was not measured.
        curve: the best validation perplexity so far, before any rewrite and after each.
        why_none: why the run makes no claim, where it makes none.
        kept_base: whether nothing better than the base was found: its gains are 0.
    """

    run_id: str
    seed: int
    status: str
    values: Mapping[str, float | None]
    curve: tuple[float | None, ...]
    why_none: str | None = None
    kept_base: bool = False

    @property
    def is_finished(self) -> bool:
        return self.status == FINISHED


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of what is known; sd takes two, the mean takes one."""

    mean: float | None
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return mean and spread of some numbers."""
        return cls(
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )


@dataclass(frozen=True)
class CurvePoint:
    """Geometric mean over runs of the best so far, and one standard deviation of logs around."""

    rewrites: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    Attributes:
        keys: the values of the keys that differ among settings.
    """

    label: str
    keys: Mapping[str, Any]
    runs: tuple[RunValues, ...]

    @cached_property
    def finished(self) -> tuple[RunValues, ...]:
        return tuple(run for run in self.runs if run.is_finished)

    def known(self, measure: str) -> list[float]:
        """Return a measure of every finished run in which it was measured."""
        values = (run.values.get(measure) for run in self.finished)
        return [value for value in values if value is not None]

    def spread(self, measure: str) -> Spread:
        """Return mean and spread of a measure over the finished runs that have it."""
        return Spread.of(self.known(measure))

    def curve(self) -> list[CurvePoint]:
        """Return the best so far over the finished runs, as far as all of them go."""
        points = []
        for n, column in enumerate(zip(*(run.curve for run in self.finished), strict=False)):
            logs = [math.log(value) for value in column if value is not None]
            if not logs or len(logs) < len(column):
                continue
            spread = Spread.of(logs)
            assert spread.mean is not None
            low = high = None
            if spread.sd is not None:
                low, high = math.exp(spread.mean - spread.sd), math.exp(spread.mean + spread.sd)
            points.append(CurvePoint(n, math.exp(spread.mean), low, high))
        return points


@dataclass(frozen=True)
class Cohort:
    """Settings whose runs were measured alike, so that they may be compared.

    Attributes:
        peak_flops: what MFU was measured against; None where unknown.
    """

    environment_id: str
    peak_flops: float | None
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Comparison:
    """Settings side by side.

    Attributes:
        title: what is compared, such as a sweep's name and id.
        cohorts: one, unless the runs were measured in different environments.
        notes: what a reader must know beside the numbers, a sentence each.
    """

    title: str
    cohorts: tuple[Cohort, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[RunValues, ...]:
        return tuple(
            run for cohort in self.cohorts for setting in cohort.settings for run in setting.runs
        )


def compare(chronicles: Sequence[Chronicle], title: str, remarks: Sequence[str] = ()) -> Comparison:
    """Sort runs into settings and measure each.

    Args:
        chronicles: the runs, each once.
        remarks: notes that only the caller can make, such as runs that could not be read.
    """
    configs = [_config_of(chronicle) for chronicle in chronicles]
    grouping = group(configs)
    sorted_into: dict[tuple[str, float | None], dict[str, list[int]]] = {}
    for k, chronicle in enumerate(chronicles):
        labels = sorted_into.setdefault(_measured_in(chronicle), {})
        labels.setdefault(grouping.labels[k], []).append(k)
    cohorts = tuple(
        Cohort(
            *where,
            tuple(
                Setting(
                    label,
                    {key: configs[which[0]].get(key) for key in grouping.keys},
                    tuple(run_values(chronicles[k]) for k in which),
                )
                for label, which in labels.items()
            ),
        )
        for where, labels in sorted_into.items()
    )
    notes = [*_apart(chronicles, cohorts), *remarks]
    if grouping.along:
        keys = ", ".join(map(short, grouping.along))
        notes.append(f"between these settings differ as well: {keys}")
    return Comparison(title, cohorts, (*notes, *_notes_on_runs(cohorts)))


def run_values(chronicle: Chronicle) -> RunValues:
    """Measure one run."""
    told = summarise(chronicle.events, len(chronicle.rewrites), chronicle.status)
    gain, champion = told["improvement"], told["champion"] or {}
    curve = _curve(chronicle)
    # A search that ends where it began has gained nothing; left out, it would flatter its setting.
    kept = 0.0 if chronicle.closing and chronicle.selected is chronicle.base else None
    return RunValues(
        run_id=chronicle.run_id,
        seed=int(chronicle.config["seed"]),
        status=chronicle.status,
        values={
            "improvement_percent": kept if kept is not None else gain["perplexity_percent"],
            "test_perplexity": champion.get("test_perplexity"),
            "equal_steps_percent": (
                kept
                if kept is not None and gain["equal_steps"] is not None
                else (gain["equal_steps"] or {}).get("perplexity_percent")
            ),
            "mfu_percent": kept if kept is not None else gain["mfu_percent"],
            "best_val_perplexity": curve[-1],
            "ok": told["ok"],
            "failed": sum(told["failed"].values()),
            "duplicates": told["duplicates"],
            "lost": told["lost"],
            "seconds": told["seconds"]["total"],
        },
        curve=curve,
        why_none=gain["why_none"],
        kept_base=kept is not None,
    )


def _curve(chronicle: Chronicle) -> tuple[float | None, ...]:
    """Return the best so far in the environment of the claim; None before that was opened."""
    here = chronicle.claimed_in.index
    there_before = [one for one in chronicle.agents if one.is_base or one.made_in < here]
    values = [_perplexity(one, here) for one in there_before]
    best = min((value for value in values if value is not None), default=None)
    curve: list[float | None] = [None] * sum(not one.is_base for one in there_before)
    curve.append(best)
    for agent in chronicle.agents[len(there_before) :]:
        value = _perplexity(agent, here)
        if value is not None and (best is None or value < best):
            best = value
        curve.append(best)
    return tuple(curve)


def _perplexity(agent: Agent, environment: int) -> float | None:
    seen = agent.seen_in(environment)
    return seen.value("val_perplexity") if agent.is_ok else None


def _config_of(chronicle: Chronicle) -> dict[str, Any]:
    """Return a run's configuration; one that was resumed may have had more generations."""
    config = dict(chronicle.config)
    begun = [agent.generation for agent in chronicle.agents]
    config["n_generations"] = max([int(config["n_generations"]), *begun])
    return config


def _measured_in(chronicle: Chronicle) -> tuple[str, float | None]:
    return chronicle.claimed_in.environment_id, chronicle.begun.measured["peak_flops"]


# --- what must be said beside the numbers --------------------------------------------------------


def _apart(chronicles: Sequence[Chronicle], cohorts: Sequence[Cohort]) -> list[str]:
    if len(cohorts) < 2:
        return []
    environments = [chronicle.begun.payload["environment"] for chronicle in chronicles]
    names = sorted({name for environment in environments for name in environment})
    differ = [name for name in names if len({str(one.get(name)) for one in environments}) > 1]
    if any(chronicle.claimed_in.index for chronicle in chronicles):
        differ.append("what people granted on the way")
    if len({cohort.peak_flops for cohort in cohorts}) > 1:
        differ.append("the peak that MFU is measured against")
    return [
        f"the runs were measured in {len(cohorts)} environments ({', '.join(differ)}), and are "
        "compared within each only"
    ]


def _notes_on_runs(cohorts: Sequence[Cohort]) -> list[str]:
    notes = []
    for setting in (setting for cohort in cohorts for setting in cohort.settings):
        unfinished = [run for run in setting.runs if not run.is_finished]
        if unfinished:
            told = ", ".join(f"{run.run_id} ({run.status})" for run in unfinished)
            notes.append(f"{setting.label}: not counted, because not finished: {told}")
        kept = sum(run.kept_base for run in setting.finished)
        if kept:
            notes.append(
                f"{setting.label}: {kept} of {len(setting.finished)} found nothing better than the "
                "base, which counts as a gain of 0"
            )
        silent: dict[str, int] = {}
        for run in setting.finished:
            if run.values["improvement_percent"] is None:
                why = run.why_none or "unknown"
                silent[why] = silent.get(why, 0) + 1
        notes += [
            f"{setting.label}: {count} of {len(setting.finished)} without a gain on test: {why}"
            for why, count in silent.items()
        ]
    return notes
