"""The closing of a run: who is selected, what may be claimed of it, and at what rate it trains.

The search's winner was chosen for its luck as much as for its merit. So base and winner are
trained again with fresh seeds, side by side, and scored on the test split, which nothing has read
until then: once by the clock, as in the search, and once by the number of steps, which tells what
is learned a step from how many steps fit. Rates are taken from two runs of fixed length, whose
difference holds no start-up.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from darwin_exp.fitness import Fitness
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
        n_timings: how often rates are timed again.
        fitness: what decides who is selected, once rates have been timed again.
        has_test: whether the data set has a test split to read.
        max_steps: the run's own number of steps; None where the clock ends a training.
    """

    trials: Trials
    journal: Journal
    at_once: AtOnce
    n_seeds: int
    n_equal_steps: int
    n_timings: int
    fitness: Fitness
    has_test: bool
    max_steps: int | None = None

    def close(self, archive: Mapping[str, Individual], base: Individual, last: int) -> None:
        """Select the best of the archive, re-time the best trade-offs and make the claim.

        Args:
            last: the last generation; a run that is continued makes a new claim after it.
        """
        key = f"after-g{last:02d}"
        if self.journal.find("claim", key) is not None:
            return  # closed before, perhaps by rules that have changed since
        ok = [one for one in archive.values() if one.fitness is not None]
        selected = max(ok, key=lambda one: (one.fitness, one is base))
        front = pareto_front(ok, ("val_perplexity", "mfu"))
        timed = {one.individual_id: one for one in (base, selected, *front)}
        found = self._retime(base, list(timed.values()), key, "retime")
        if self.n_timings > 1:
            # What was selected by these timings is timed once more: they were partly luck.
            selected = self._fittest(base, found)
            pair = list({one.individual_id: one for one in (base, selected)}.values())
            self._retime(base, pair, key, "retime-claim")
        self._claim(base, selected, last, key)

    # --- the claim -------------------------------------------------------------------------------

    def _claim(self, base: Individual, selected: Individual, last: int, key: str) -> None:
        """Train both afresh, read the test split, and write down what may be said of them."""
        looks = [
            event
            for event in self.journal.of_kind("claim")
            if event.payload["claim"] is not None and _generation(event.key) < last
        ]
        why_none = self._why_no_claim(base, selected)
        steps, why_no_steps = self._equal_steps(base, selected, why_none)
        readings = [] if why_none else self._by_the_clock(base, selected, last)
        readings += [] if steps is None else self._by_steps(base, selected, last, steps)
        scored = self.at_once([lambda one=one: self._read_test(one) for one in readings])  # type: ignore[misc]
        losses: dict[tuple[str, int | None], list[float]] = {}
        for reading, loss in zip(readings, scored, strict=True):
            seen = losses.setdefault((reading.individual.individual_id, reading.max_steps), [])
            seen += [] if loss is None else [loss]

        # Every look at the test split after the first is held to half the level of the one before,
        # so that all of them together stay below twice that of one.
        alpha = 0.05 / 2 ** len(looks)

        def claim(max_steps: int | None) -> dict[str, Any] | None:
            of_base = losses.get((base.individual_id, max_steps))
            of_selected = losses.get((selected.individual_id, max_steps))
            if of_base is None or of_selected is None:
                return None
            return asdict(welch(of_base, of_selected, alpha))

        given = {
            "baseline_id": base.individual_id,
            "selected_id": selected.individual_id,
            "earlier_claims": len(looks),
        }
        self.journal.once(
            "equal_steps",
            key,
            lambda: ({"claim": None if steps is None else claim(steps)}, {}),
            given={**given, "n_steps": steps, "why_none": why_no_steps},
        )
        self.journal.once(
            "claim",
            key,
            lambda: ({"claim": claim(None)}, {}),
            given={**given, "why_none": why_none},
        )

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

        It is what the slower side did under the clock, so that neither needs longer than it had.
        """
        if why_none is not None:
            return None, why_none
        if self.max_steps is not None:
            return None, f"every training of this run has {self.max_steps} steps already"
        if self.n_equal_steps == 0:
            return None, "promotion.n_equal_steps=0"
        fewest = min(round(self._pace(one)[0]) for one in (base, selected))
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
            searched, took = self._pace(one)
            seconds[one.individual_id] = 1.0 + PATIENCE * took * steps / searched
        return [
            _Reading(
                one,
                f"{one.individual_id}/steps-{last:02d}-{k}",
                steps,
                seconds[one.individual_id],
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
        if reading.max_steps not in (None, result.training.steps_claimed):
            return None  # time ran out, or it went past the steps it was told
        if reading.max_steps is not None and result.training.stopped_at_budget:
            return None
        return math.log(scored.metrics["test_perplexity"])

    # --- rates -----------------------------------------------------------------------------------

    def _retime(
        self, base: Individual, individuals: Sequence[Individual], key: str, stage: str
    ) -> dict[str, Individual]:
        """Replace claimed rates by slopes between short and long runs, taken in turn.

        Args:
            key: of the closing; a run that is continued times everybody again, at one time.
            stage: the first part of the runs' names.

        Returns the individuals by name, with the rates that were found.
        """
        turns = [(one, k) for k in range(self.n_timings) for one in individuals]
        timed = self.at_once(
            [lambda one=one, k=k: self._time(one, f"{stage}-{key}-{k}") for one, k in turns]  # type: ignore[misc]
        )
        rounds: dict[str, list[list[JobResult]]] = {}
        for (one, _), runs in zip(turns, timed, strict=True):
            rounds.setdefault(one.individual_id, []).extend([runs] if runs else [])
        quiet = _quieter_by(base, rounds.get(base.individual_id, []))
        after = {}
        for one in individuals:
            name, rates = one.individual_id, {}
            if rounds[name]:
                event = self.journal.once(
                    "retimed",
                    f"{name}/{stage}-{key}",
                    lambda one=one: ({}, self._found(one, rounds[one.individual_id], quiet)),  # type: ignore[misc]
                    given={"individual_id": name},
                )
                names = ("tokens_per_second", "mfu")
                rates = {name: event.measured[name] for name in names if name in event.measured}
            after[name] = replace(one, rates={**one.rates, **rates})
        return after

    def _found(
        self, individual: Individual, rounds: Sequence[Sequence[JobResult]], quiet: float
    ) -> dict[str, Any]:
        searched = self._searched(individual)
        bound = searched[0].measured["details"].get("speed", {}).get("tokens_per_second_bound")
        return retimed(individual, rounds, None if bound is None else bound * quiet)

    def _fittest(self, base: Individual, timed: Mapping[str, Individual]) -> Individual:
        """Return the fittest of those that were timed again, by what was found then.

        A fitness that looks at rates would else choose whoever met the quietest machine.
        """
        again = timed[base.individual_id]

        def fitness(one: Individual) -> tuple[float, bool]:
            is_base = one is again
            value = self.fitness(one.metrics, one.rates, again, is_base=is_base)
            return (-math.inf if value is None else value, is_base)

        fittest = max(timed.values(), key=fitness)
        return base if fittest is again else fittest

    def _time(self, individual: Individual, stage: str) -> list[JobResult]:
        """Make the two runs of one timing; none where there is no rate to be replaced."""
        steps, seconds = self._pace(individual)
        if not steps or individual.measured("mfu") is None:
            return []
        most = round(LONGEST_SECONDS * steps / max(seconds, 1e-9))
        runs = []
        for what, share, fewest in RETIMINGS:
            name = f"{individual.individual_id}/{stage}-{what}"
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
        return runs

    # --- what the search knows of them -----------------------------------------------------------

    def _pace(self, individual: Individual) -> tuple[float, float]:
        """Return median steps and seconds of an individual's trainings so far; 0 without a count.

        The base's repeats were trained under the same load as everybody else.
        """
        searched = [event.measured for event in self._searched(individual)]
        steps = [measured["steps_claimed"] or 0 for measured in searched]
        seconds = [measured["training_seconds"] for measured in searched]
        return (statistics.median(steps), statistics.median(seconds)) if searched else (0.0, 0.0)

    def _searched(self, individual: Individual) -> list[Event]:
        """Return the jobs that scored an individual in the search."""
        return [
            event
            for event in self.journal.of_kind("job")
            if event.payload["individual_id"] == individual.individual_id
            and event.payload["split"] == "val"
            and event.payload["status"] == Status.OK.value
        ]


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


def _generation(key: str) -> int:
    return int(key.removeprefix("after-g"))


def _slopes(rounds: Sequence[Sequence[JobResult]]) -> tuple[list[float], str]:
    """Return tokens per second by the slope of each round, and why the last bad one has none."""
    from darwin_exp.evaluation.mfu import retimed_rate

    rates, why_none = [], ""
    for short, long in rounds:
        failed = next((run for run in (short, long) if run.training.status is not Status.OK), None)
        if failed is not None:
            why_none = f"{failed.job_id}: {failed.training.status.value}"
            continue
        try:
            rates.append(retimed_rate(short.training, long.training))
        except ValueError as error:
            why_none = str(error)
    return rates, why_none


def _quieter_by(base: Individual, rounds: Sequence[Sequence[JobResult]]) -> float:
    """Return how much faster the machine is now than in the search, by the base; at least 1."""
    rates, _ = _slopes(rounds)
    before = base.rates.get("tokens_per_second")
    return max(1.0, statistics.median(rates) / before) if rates and before else 1.0


def retimed(
    individual: Individual, rounds: Sequence[Sequence[JobResult]], bound: float | None
) -> dict[str, Any]:
    """Return median tokens per second and MFU by the slope between two runs, or why there is none.

    Args:
        rounds: of each round the short and the long run, trained and not scored.
        bound: the rate beyond which a genome's count of its tokens is not believed: what the
            harness found for the saved model, corrected for how quiet the machine is now.
    """
    rates, why_none = _slopes(rounds)
    if not rates:
        return {"why_none": why_none}
    if bound is not None:
        rates = [min(rate, bound) for rate in rates]
    of_rate = individual.rates["mfu"] / individual.rates["tokens_per_second"]
    middle = statistics.median(rates)
    return {
        "tokens_per_second": middle,
        "mfu": middle * of_rate,
        "mfus": [rate * of_rate for rate in rates],
    }
