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
PERPLEXITY = "perplexity"  # the fitness that an ablation can judge parts by
ALPHA = 0.05
HOPELESS = (Status.CRASHED, Status.INVALID)


@dataclass(frozen=True)
class Sample:
    """What came of training one variant several times.

    Attributes:
        log_perplexities: of the trainings that were scored.
        n_lost: trainings that were lost by our own fault.
        n_failed: trainings that failed by the code's own fault.
        failure: the first of these; empty where there was none.
        fails: whether the variant has failed for good.
    """

    log_perplexities: tuple[float, ...] = ()
    n_lost: int = 0
    n_failed: int = 0
    failure: str = ""
    fails: bool = False

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
        first = failures[0] if failures else ""
        return cls(tuple(ok), lost, len(failures), first, fails_for_good(results))

    @property
    def n(self) -> int:
        return len(self.log_perplexities)

    @property
    def perplexity(self) -> float | None:
        return geometric_mean([math.exp(value) for value in self.log_perplexities])

    @property
    def troubles(self) -> str:
        """What went wrong with some of its trainings, in words; empty where nothing did."""
        words = []
        if self.n_failed:
            n_ended = self.n + self.n_failed + self.n_lost
            words.append(f"{self.n_failed} of {n_ended} trainings failed: {self.failure}")
        if self.n_lost:
            words.append(f"{self.n_lost} of its trainings lost")
        return "; ".join(words)


def fails_for_good(results: Sequence[JobResult]) -> bool:
    """Tell whether what came of a variant's trainings, in their order, shows that it fails.

    Code that crashes or breaks the contract before it was ever scored does so every time. Running
    out of time or memory, or past a check, can be a single training's bad luck: it takes two.
    """
    failed = [one for one in results if one.outcome.status not in (Status.OK, Status.INFRA_LOST)]
    if len(failed) > 1:
        return True
    was_scored = any(one.outcome.status is Status.OK for one in results)
    return bool(failed) and not was_scored and failed[0].outcome.status in HOPELESS


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
    interval must lie above (below) zero and, because many comparisons are made, its p-value must
    hold after Holm's correction over all of them (a part without which the program is the same is
    none of them). So at most one ablation in twenty calls any part that does nothing by one of
    these names, and a part whose own interval excludes zero can still be unclear. Everything else
    is unclear: it may contribute something or nothing. A part fails where the champion cannot be
    trained without it; see `fails_for_good`.
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
    if part.same:  # equal by construction: there is nothing to compare, nor to correct for
        return Finding(
            part, champion.n, champion.perplexity, 0.0, (0.0, 0.0), None, UNCLEAR, part.note
        )
    sample = sample or Sample()
    if part.flaw or sample.fails:
        note = "; ".join(filter(None, (part.note, part.flaw or sample.troubles)))
        return Finding(part, sample.n, None, None, None, None, FAILS, note)
    claim = welch(sample.log_perplexities, champion.log_perplexities)
    notes = [part.note, sample.troubles]
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


def advice(findings: Sequence[Finding], fitness: str = PERPLEXITY) -> str:
    """Say in one sentence what could be dropped; nothing, where fitness is not perplexity alone."""
    if fitness != PERPLEXITY:
        return (
            f"Contributions are of perplexity only, and the run's fitness is {fitness}: no part is "
            "named that could be dropped."
        )
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
