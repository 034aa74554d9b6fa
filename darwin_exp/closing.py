"""The closing of a run: who is selected, what may be claimed of it, and at what rate it trains.

The search's winner was chosen for its luck as much as for its merit. So base and winner are
trained again with fresh seeds, side by side, and scored on the test split, which nothing has read
until then: once by the clock, as in the search, and once by the number of steps, which tells what
is learned a step from how many steps fit. Rates are taken from two runs of fixed length, whose
difference holds no start-up.
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
from darwin_exp.statistics import welch
from darwin_exp.trials import Trial, Trials

AtOnce = Callable[[Iterable[Callable[[], Any]]], list[Any]]

# The runs of a re-timing: name, share of the steps claimed in the search, fewest steps.
LONG_SHARE = 0.3
RETIMINGS = (("short", 0.08, 4), ("long", LONG_SHARE, 12))
LONGEST_SECONDS = 20.0  # about what the long one may take, however long the search trained

# How much longer than in the search the same number of steps may take before a run is frozen: a
# busy machine needs some; code that trains past the steps it was told gains no more.
PATIENCE = 1.5


@dataclass(frozen=True)
class Closing:
    """Closes a run over its archive; every step of it is journaled once.

    Attributes:
        at_once: runs tasks on all slots and returns their results in order.
        n_seeds: fresh trainings of either side by the clock.
        n_equal_steps: fresh trainings of either side by the number of steps.
        has_test: whether the data set has a test split to read.
        max_steps: the run's own number of steps; None where the clock ends a training.
    """

    trials: Trials
    journal: Journal
    at_once: AtOnce
    n_seeds: int
    n_equal_steps: int
    has_test: bool
    max_steps: int | None = None

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
        why_none = self._why_no_claim(base, selected)
        steps, why_no_steps = self._equal_steps(base, selected, why_none)
        readings = [] if why_none else self._by_the_clock(base, selected, last)
        readings += [] if steps is None else self._by_steps(base, selected, last, steps)
        scored = iter(self.at_once([lambda one=one: self._read_test(one) for one in readings]))  # type: ignore[misc]
        losses: dict[tuple[str, int | None], list[float]] = {}
        for reading, loss in zip(readings, scored, strict=True):
            seen = losses.setdefault((reading.individual.individual_id, reading.max_steps), [])
            seen += [] if loss is None else [loss]

        # Each further look at the test split is held to a stricter level (Bonferroni).
        alpha = 0.05 / (1 + len(earlier))

        def claim(max_steps: int | None) -> dict[str, Any] | None:
            sides = [losses.get((one.individual_id, max_steps)) for one in (base, selected)]
            if sides[0] is None or sides[1] is None:
                return None
            return asdict(welch(sides[0], sides[1], alpha))

        sides = {"baseline_id": base.individual_id, "selected_id": selected.individual_id}
        self.journal.once(
            "equal_steps",
            key,
            lambda: ({"claim": None if steps is None else claim(steps)}, {}),
            given={**sides, "n_steps": steps, "why_none": why_no_steps},
        )
        self.journal.once(
            "claim",
            key,
            lambda: ({"claim": claim(None)}, {}),
            given={
                **sides,
                "why_none": why_none,
                "earlier_claims": len(earlier),  # each has read the test split before this one
            },
        )

    # --- the claim -------------------------------------------------------------------------------

    def _why_no_claim(self, base: Individual, selected: Individual) -> str | None:
        if selected is base:
            return "no individual was better than the base"
        if not self.has_test:
            return "the data set has no test split"
        return None

    def _equal_steps(
        self, base: Individual, selected: Individual, why_none: str | None
    ) -> tuple[int | None, str | None]:
        """Return how many steps both sides are to be given, or None and why not.

        It is what the slower side did in the search, so that neither needs longer than it had.
        """
        if why_none is not None:
            return None, why_none
        if self.max_steps is not None:
            return None, f"every training of this run has {self.max_steps} steps already"
        if self.n_equal_steps == 0:
            return None, "promotion.n_equal_steps=0"
        searched = [self._search_job(one) for one in (base, selected)]
        steps: list[int] = [event.measured["steps_claimed"] or 0 for event in searched if event]
        fewest = min(steps, default=0)
        return (fewest, None) if fewest else (None, "a side left no count of its steps")

    def _by_the_clock(self, base: Individual, selected: Individual, last: int) -> list[_Reading]:
        return [
            _Reading(one, f"{one.individual_id}/claim-{last:02d}-{k}")
            for k in range(self.n_seeds)
            for one in _turn_about(base, selected, k)
        ]

    def _by_steps(
        self, base: Individual, selected: Individual, last: int, steps: int
    ) -> list[_Reading]:
        seconds = {}
        for one in (base, selected):
            searched = self._search_job(one)
            assert searched is not None
            share = steps / searched.measured["steps_claimed"]
            seconds[one.individual_id] = PATIENCE * share * searched.measured["training_seconds"]
        return [
            _Reading(
                one,
                f"{one.individual_id}/steps-{last:02d}-{k}",
                steps,
                1.0 + seconds[one.individual_id],
            )
            for k in range(self.n_equal_steps)
            for one in _turn_about(base, selected, k)
        ]

    def _read_test(self, reading: _Reading) -> float | None:
        """Train afresh and return the loss on test in nats, or None where it does not count."""
        one, name = reading.individual, reading.name
        self.journal.once(
            "test_read", name, lambda: ({}, {}), given={"individual_id": one.individual_id}
        )
        result = self.trials.run(
            Trial(
                name,
                one.individual_id,
                Purpose.CLAIM if reading.max_steps is None else Purpose.EQUAL_STEPS,
                one.genome,
                "test",
                f"individuals/{name}",
                max_steps=reading.max_steps,
                budget_seconds=reading.budget_seconds,
            )
        )
        scored = result.evaluation
        if scored is None or scored.status is not Status.OK:
            return None
        if reading.max_steps is not None and result.training.stopped_at_budget:
            return None  # it did not do its steps, or did more than it was told
        return math.log(scored.metrics["test_perplexity"])

    # --- rates -----------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class _Reading:
    """One fresh training that is scored on the test split; None leaves the run's own bounds."""

    individual: Individual
    name: str
    max_steps: int | None = None
    budget_seconds: float | None = None


def _turn_about(base: Individual, selected: Individual, k: int) -> tuple[Individual, Individual]:
    """Return both sides in turn, so that neither always starts first or sits on the same slot."""
    return (base, selected) if k % 2 == 0 else (selected, base)


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
