"""The closing of a run: who is selected, what may be claimed of it, and at what rate it trains.

The search's winner was chosen for its luck as much as for its merit. So base and winner are
trained again with fresh seeds, side by side, and scored on the test split, which nothing has read
until then. Rates are taken from two runs of fixed length, whose difference holds no start-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from darwin_exp.individual import Individual, JobResult, Purpose, Status
from darwin_exp.journal import Journal
from darwin_exp.protocols import Event
from darwin_exp.selection import pareto_front
from darwin_exp.statistics import Claim, welch
from darwin_exp.trials import Trial, Trials

AtOnce = Callable[[Iterable[Callable[[], Any]]], list[Any]]

# The runs of a re-timing: name, share of the steps claimed in the search, fewest steps.
LONG_SHARE = 0.3
RETIMINGS = (("short", 0.08, 4), ("long", LONG_SHARE, 12))
LONGEST_SECONDS = 20.0  # about what the long one may take, however long the search trained


@dataclass(frozen=True)
class Closing:
    """Closes a run over its archive; every step of it is journaled once.

    Attributes:
        at_once: runs tasks on all slots and returns their results in order.
        has_test: whether the data set has a test split to read.
    """

    trials: Trials
    journal: Journal
    at_once: AtOnce
    n_seeds: int
    has_test: bool

    def close(self, archive: Mapping[str, Individual], base: Individual, last: int) -> None:
        """Select the best of the archive, re-time the best trade-offs and make the claim.

        Args:
            last: the last generation; a run that is continued makes a new claim after it.
        """
        ok = [one for one in archive.values() if one.fitness is not None]
        selected = max(ok, key=lambda one: (one.fitness, one is base))
        front = pareto_front(ok, ("val_perplexity", "mfu"))
        timed = {one.individual_id: one for one in (base, selected, *front)}
        self.at_once([lambda one=one: self._retime(one) for one in timed.values()])  # type: ignore[misc]
        key = f"after-g{last:02d}"
        earlier = [event for event in self.journal.of_kind("claim") if event.key < key]
        claim = self._claim(base, selected, last, len(earlier))
        self.journal.once(
            "claim",
            key,
            lambda: ({"claim": None if claim is None else asdict(claim)}, {}),
            given={
                "baseline_id": base.individual_id,
                "selected_id": selected.individual_id,
                "why_none": self._why_no_claim(base, selected),
                "earlier_claims": len(earlier),  # each has read the test split before this one
            },
        )

    def _why_no_claim(self, base: Individual, selected: Individual) -> str | None:
        if selected is base:
            return "no individual was better than the base"
        if not self.has_test:
            return "the data set has no test split"
        return None

    def _claim(
        self, base: Individual, selected: Individual, last: int, n_earlier: int
    ) -> Claim | None:
        """Train both with fresh seeds, interleaved, and compare their log perplexities on test.

        Args:
            n_earlier: claims that have read the test split before; each further look at it is
                held to a stricter level (Bonferroni).
        """
        if self._why_no_claim(base, selected):
            return None
        pairs = []
        for k in range(self.n_seeds):
            # Turn about, so that neither side always starts first or sits on the same slot.
            pair = (base, selected) if k % 2 == 0 else (selected, base)
            pairs += [(one, f"{one.individual_id}/claim-{last:02d}-{k}") for one in pair]
        results: list[JobResult] = self.at_once(
            [lambda one=one, name=name: self._read_test(one, name) for one, name in pairs]  # type: ignore[misc]
        )
        losses: dict[str, list[float]] = {base.individual_id: [], selected.individual_id: []}
        for (one, _), result in zip(pairs, results, strict=True):
            scored = result.evaluation
            if scored is not None and scored.status is Status.OK:
                losses[one.individual_id].append(math.log(scored.metrics["test_perplexity"]))
        alpha = 0.05 / (1 + n_earlier)
        return welch(losses[base.individual_id], losses[selected.individual_id], alpha)

    def _read_test(self, individual: Individual, name: str) -> JobResult:
        self.journal.once(
            "test_read", name, lambda: ({}, {}), given={"individual_id": individual.individual_id}
        )
        folder = f"individuals/{name}"
        return self.trials.run(
            Trial(name, individual.individual_id, Purpose.CLAIM, individual.genome, "test", folder)
        )

    def _retime(self, individual: Individual) -> None:
        """Replace an individual's claimed rate by the slope between a short and a long run."""
        search = self._search_job(individual)
        steps = search.measured["steps_claimed"] if search else None
        if search is None or steps is None or individual.measured("mfu") is None:
            return
        most = round(LONGEST_SECONDS * steps / max(search.measured["training_seconds"], 1e-9))
        runs = []
        for what, share, fewest in RETIMINGS:
            name = f"{individual.individual_id}/retime-{what}"
            trial = Trial(
                name,
                individual.individual_id,
                Purpose.RETIME,
                individual.genome,
                None,
                f"individuals/{name}",
                max_steps=max(fewest, round(min(share * steps, share / LONG_SHARE * most))),
            )
            runs.append(self.trials.run(trial))
        bound = search.measured["details"].get("speed", {}).get("tokens_per_second_bound")
        self.journal.once(
            "retimed",
            individual.individual_id,
            lambda: ({}, retimed(individual, runs, bound)),
            given={"individual_id": individual.individual_id},
        )

    def _search_job(self, individual: Individual) -> Event | None:
        """Return the job that scored an individual in the search."""
        found = None
        for event in self.journal.of_kind("job"):
            ours = event.payload["individual_id"] == individual.individual_id
            if ours and event.payload["split"] == "val" and event.payload["status"] == "OK":
                found = found or event
        return found


def retimed(
    individual: Individual, runs: Sequence[JobResult], bound: float | None
) -> dict[str, Any]:
    """Return tokens per second and MFU by the slope between two runs, or why there is none.

    Args:
        runs: the short and the long run, trained and not scored.
        bound: the harness's own forward and backward rate with its allowance, tokens per second;
            it bounds a re-timed rate as it bounds a claimed one.
    """
    from darwin_exp.evaluation.mfu import retimed_rate

    for run in runs:
        if run.training.status is not Status.OK:
            return {"why_none": f"{run.job_id}: {run.training.status.value}"}
    try:
        rate = retimed_rate(runs[0].training, runs[1].training)
    except ValueError as error:
        return {"why_none": str(error)}
    if bound is not None:
        rate = min(rate, bound)
    mfu, believed = individual.rates["mfu"], individual.rates["tokens_per_second"]
    return {"tokens_per_second": rate, "mfu": mfu * rate / believed}
