"""The verdicts: what each part of a champion contributes, and which parts could be dropped.

Reads: what the trainings of each variant came to. Writes: nothing.
Never: calls a difference a contribution that chance alone can explain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from darwin_exp.ablate.dissection import Part
from darwin_exp.individual import JobResult, Status
from darwin_exp.statistics import geometric_mean, welch

PAYS, UNCLEAR, COSTS, FAILS = "pays", "unclear", "costs", "fails"
ALPHA = 0.05


@dataclass(frozen=True)
class Sample:
    """What came of training one variant several times.

    Attributes:
        log_perplexities: of the trainings that were scored.
        n_lost: trainings that were lost by our own fault.
        failure: the first failure that was the code's own; empty where there was none.
    """

    log_perplexities: tuple[float, ...] = ()
    n_lost: int = 0
    failure: str = ""

    @classmethod
    def of(cls, results: Sequence[JobResult], split: str) -> Sample:
        """Take the perplexities on a split out of the results of one variant."""
        ok, lost, failures = [], 0, []
        for result in results:
            outcome, scored = result.outcome, result.evaluation
            if scored is not None and scored.status is Status.OK:
                ok.append(math.log(scored.metrics[f"{split}_perplexity"]))
            elif outcome.status is Status.INFRA_LOST:
                lost += 1
            else:
                failures.append(f"{outcome.status.value}: {outcome.message}".rstrip(": "))
        return cls(tuple(ok), lost, failures[0] if failures else "")

    @property
    def n(self) -> int:
        return len(self.log_perplexities)

    @property
    def perplexity(self) -> float | None:
        return geometric_mean([math.exp(value) for value in self.log_perplexities])


@dataclass(frozen=True)
class Finding:
    """What was found out about one part.

    Attributes:
        perplexity: of the champion without it; None where there is no training of that.
        contribution_percent: how much lower the champion's perplexity is than without it.
        ci95: low and high end of the same, with 95 % confidence, of this part alone.
        verdict: pays, unclear, costs or fails; see `judge`.
    """

    part: Part
    n: int
    perplexity: float | None
    contribution_percent: float | None
    ci95: tuple[float, float] | None
    p_value: float | None
    verdict: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """Return it as it stands in summary.json."""
        return {
            "name": self.part.name,
            "what": self.part.what,
            "file": self.part.file,
            "kind": self.part.kind,
            "n": self.n,
            "perplexity": self.perplexity,
            "contribution_percent": self.contribution_percent,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "p_value": self.p_value,
            "verdict": self.verdict,
            "note": self.note,
        }


def judge(parts: Sequence[Part], without: Mapping[str, Sample], champion: Sample) -> list[Finding]:
    """Return what was found about each part, the largest contribution first.

    A part pays where the champion is better with it, costs where it is worse with it: its 95 %
    interval must lie above (below) zero and, because as many comparisons are made as there are
    parts, its p-value must hold after Holm's correction over all of them. So at most one ablation
    in twenty calls any part that does nothing by one of these names, and a part whose own interval
    excludes zero can still be unclear. Everything else is unclear: it may contribute something or
    nothing. A part fails where the champion cannot be trained without it.
    Source: S. Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        without: by the genome's id, the trainings of the champion without a part.
        champion: its own trainings, made beside those.
    """
    findings = [_measured(part, without.get(part.without.id), champion) for part in parts]
    compared = sorted((f for f in findings if f.p_value is not None), key=lambda f: f.p_value or 0)
    clear: set[str] = set()
    for rank, finding in enumerate(compared):
        if (finding.p_value or 0.0) >= ALPHA / (len(compared) - rank):
            break
        clear.add(finding.part.name)
    judged = [
        replace(f, verdict=PAYS if (f.contribution_percent or 0) > 0 else COSTS)
        if f.part.name in clear
        else f
        for f in findings
    ]
    return sorted(
        judged,
        key=lambda f: -math.inf if f.contribution_percent is None else f.contribution_percent,
        reverse=True,
    )


def _measured(part: Part, sample: Sample | None, champion: Sample) -> Finding:
    """Return what was measured of a part; a part that fails is known by now, the rest unclear."""
    if part.same:  # equal by construction, so there is nothing to measure
        return Finding(
            part, champion.n, champion.perplexity, 0.0, (0.0, 0.0), 1.0, UNCLEAR, part.note
        )
    failure = part.flaw or (sample.failure if sample and sample.n < 2 else "")
    if failure:
        note = "; ".join(filter(None, (part.note, failure)))
        return Finding(part, sample.n if sample else 0, None, None, None, None, FAILS, note)
    sample = sample or Sample()
    claim = welch(sample.log_perplexities, champion.log_perplexities)
    notes = [part.note]
    if sample.failure:
        notes.append(f"some of its trainings failed: {sample.failure}")
    if sample.n_lost:
        notes.append(f"{sample.n_lost} of its trainings lost")
    if claim.p_value is None:
        notes.append("too few trainings to compare")
    return Finding(
        part,
        sample.n,
        sample.perplexity,
        claim.perplexity_percent,
        claim.ci95,
        claim.p_value,
        UNCLEAR,
        "; ".join(filter(None, notes)),
    )


def droppable(findings: Sequence[Finding], also_unclear: bool = False) -> list[str]:
    """Return the parts that could be dropped, the least useful first.

    Those that cost, and those without which the champion came out no worse. A part that is
    unclear but came out better is kept: the best guess is that it helps, and several such parts
    can be worth a lot together. `also_unclear` drops these too, which makes the patch simpler at an
    unknown price; either way the pruned champion is trained against the whole one.
    """
    return [
        finding.part.name
        for finding in reversed(findings)
        if finding.verdict == COSTS
        or (
            finding.verdict == UNCLEAR
            and finding.contribution_percent is not None
            and (also_unclear or finding.contribution_percent <= 0)
        )
    ]


def advice(findings: Sequence[Finding]) -> str:
    """Say in one sentence what could be dropped."""
    names = droppable(findings)
    unclear = [f.part.name for f in findings if f.verdict == UNCLEAR and f.part.name not in names]
    said = (
        f"Could be dropped: {', '.join(names)} (the champion came out no worse without)"
        if names
        else "Nothing is to be dropped: without none of its parts was the champion as good"
    )
    if unclear:
        said += f"; unclear, and kept for now: {', '.join(unclear)} (more seeds would tell)"
    return f"{said}."
