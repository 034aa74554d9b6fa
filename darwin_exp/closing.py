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
RETIMED = ("tokens_per_second", "mfu")
LONGEST_SECONDS = 20.0  # about what the long one may take, however long the search trained

# How many of the slower side's steps both are given at equal steps: fewer than all, or a machine
# that is slower now than in the search would keep a side from finishing, and what has not finished
# cannot be counted.
STEPS_SHARE = 0.8

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
        may_be_champion: told an individual, the base and the closing's key; whether people let it
            be what the run claims.
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
    may_be_champion: Callable[[Individual, Individual, str], bool] = lambda *_: True

    def close(self, archive: Mapping[str, Individual], base: Individual, last: int) -> None:
        """Select the best of the archive, re-time the best trade-offs and make the claim.

        Args:
            last: the last generation; a run that is continued makes a new claim after it.
        """
        key = f"after-g{last:02d}"
        if self.journal.find("claim", key) is not None:
            return  # closed before, perhaps by rules that have changed since
        ok = [one for one in archive.values() if one.fitness is not None]
        ok.sort(key=lambda one: (one.fitness, one is base), reverse=True)
        selected = self._first_allowed(ok, base, key)
        front = pareto_front(ok, ("val_perplexity", "mfu"))
        timed = {one.individual_id: one for one in (base, selected, *front)}
        found = self._retime(list(timed.values()), key, "retime")
        if self.n_timings > 1:
            # What was selected by these timings is timed once more: they were partly luck.
            selected = self._first_allowed(self._by_fitness(base, found), base, key)
            pair = list({one.individual_id: one for one in (base, selected)}.values())
            self._retime(pair, key, "retime-claim")
        self._claim(base, selected, last, key)

    # --- the claim -------------------------------------------------------------------------------

    def _claim(self, base: Individual, selected: Individual, last: int, key: str) -> None:
        """Train both afresh, read the test split, and write down what may be said of them."""
        read = {event.key.split("/")[1] for event in self.journal.of_kind("test_read")}
        looks = [  # also those that came to no claim
            event
            for event in self.journal.of_kind("claim")
            if _generation(event.key) < last and f"claim-{_generation(event.key):02d}-0" in read
        ]
        why_none = self._why_no_claim(base, selected)
        steps, why_no_steps = self._equal_steps(base, selected, why_none)
        readings = [] if why_none else self._by_the_clock(base, selected, last)
        readings += [] if steps is None else self._by_steps(base, selected, last, steps)
        scored = self.at_once([lambda one=one: self._read_test(one) for one in readings])  # type: ignore[misc]
        losses: dict[tuple[str, int | None], list[float]] = {}
        for reading, read in zip(readings, scored, strict=True):
            seen = losses.setdefault((reading.individual.individual_id, reading.max_steps), [])
            seen += [] if read.loss is None else [read.loss]
            if read.fault and reading.individual is selected:
                # Code that fails when it is unlucky would else be judged by its luck.
                why = f"a fresh training of the selected failed ({reading.name}: {read.fault})"
                if reading.max_steps is None:
                    why_none = why_none or why
                else:
                    why_no_steps = why_no_steps or why

        # Every look at the test split after the first is held to half the level of the one before,
        # so that all of them together stay below twice that of one.
        alpha = 0.05 / 2 ** len(looks)

        def claim(max_steps: int | None, why_none: str | None) -> dict[str, Any] | None:
            of_base = losses.get((base.individual_id, max_steps))
            of_selected = losses.get((selected.individual_id, max_steps))
            if why_none or of_base is None or of_selected is None:
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
            lambda: ({"claim": None if steps is None else claim(steps, why_no_steps)}, {}),
            given={**given, "n_steps": steps, "why_none": why_no_steps},
        )
        self.journal.once(
            "claim",
            key,
            lambda: ({"claim": claim(None, why_none)}, {}),
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

        It is most of what the slower side did under the clock, so that neither needs longer than it
        had.
        """
        if why_none is not None:
            return None, why_none
        if self.max_steps is not None:
            return None, f"every training of this run has {self.max_steps} steps already"
        if self.n_equal_steps == 0:
            return None, "promotion.n_equal_steps=0"
        fewest = math.floor(STEPS_SHARE * min(self._pace(one)[0] for one in (base, selected)))
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
            seconds[one.individual_id] = 1.0 + PATIENCE * took * steps / (STEPS_SHARE * searched)
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

    def _read_test(self, reading: _Reading) -> _Read:
        """Train afresh and return the loss on test, or what keeps it from counting."""
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
        outcome, scored = result.outcome, result.evaluation
        if outcome.status is Status.INFRA_LOST:
            return _Read()
        if outcome.status is not Status.OK or scored is None:
            return _Read(fault=outcome.status.value)
        if reading.max_steps is not None and result.training.stopped_at_budget:
            return _Read(fault="time ran out")
        if reading.max_steps not in (None, result.training.steps_claimed):
            return _Read(fault=f"{result.training.steps_claimed} steps instead of those asked for")
        return _Read(math.log(scored.metrics["test_perplexity"]))

    # --- rates -----------------------------------------------------------------------------------

    def _retime(
        self, individuals: Sequence[Individual], key: str, stage: str
    ) -> dict[str, Individual]:
        """Replace claimed rates by slopes between short and long runs, taken in turn.

        Args:
            key: of the closing; a run that is continued times everybody again, at one time.
            stage: the first part of the runs' names.

        Returns the individuals by name, with the rates that were found.
        """
        turns = [(one, k) for k in range(self.n_timings) for one in individuals]
        timed = self.at_once(
            [
                lambda one=one, k=k: self._time(one, f"{stage}-{key}-{k}", examined=k == 0)  # type: ignore[misc]
                for one, k in turns
            ]
        )
        rounds: dict[str, list[list[JobResult]]] = {}
        for (one, _), runs in zip(turns, timed, strict=True):
            rounds.setdefault(one.individual_id, []).extend([runs] if runs else [])
        after = {}
        for one in individuals:
            name, rates = one.individual_id, dict(one.rates)
            if rounds[name]:
                event = self.journal.once(
                    "retimed",
                    f"{name}/{stage}-{key}",
                    lambda one=one: ({}, retimed(rounds[one.individual_id])),  # type: ignore[misc]
                    given={"individual_id": name},
                )
                found = {name: event.measured.get(name, rates.get(name)) for name in RETIMED}
                rates = {k: v for k, v in {**rates, **found}.items() if v is not None}
            after[name] = replace(one, rates=rates)
        return after

    def _by_fitness(self, base: Individual, timed: Mapping[str, Individual]) -> list[Individual]:
        """Return those that were timed again, the fittest by what was found then first.

        A fitness that looks at rates would else choose whoever met the quietest machine.
        """
        again = timed[base.individual_id]

        def fitness(one: Individual) -> tuple[float, bool]:
            is_base = one is again
            value = self.fitness(one.metrics, one.rates, again, is_base=is_base)
            return (-math.inf if value is None else value, is_base)

        in_order = sorted(timed.values(), key=fitness, reverse=True)
        return [base if one is again else one for one in in_order]

    def _first_allowed(
        self, in_order: Sequence[Individual], base: Individual, key: str
    ) -> Individual:
        """Return the first that people let be the champion; the base always may be selected."""
        return next(one for one in in_order if one is base or self.may_be_champion(one, base, key))

    def _time(self, individual: Individual, stage: str, examined: bool) -> list[JobResult]:
        """Make the two runs of one timing; none where there is no rate to be replaced.

        Args:
            examined: whether the model of the long one is timed as well.
        """
        steps, seconds = self._pace(individual)
        if not steps or individual.measured("mfu") is None:
            return []
        most = round(LONGEST_SECONDS * steps / max(seconds, 1e-9))
        runs: list[JobResult] = []
        for what, share, fewest in RETIMINGS:
            before = [(run.training.tokens_claimed, run.training.training_seconds) for run in runs]
            name = f"{individual.individual_id}/{stage}-{what}"
            trial = Trial(
                name,
                individual.individual_id,
                Purpose.RETIME,
                individual.genome,
                "val" if examined and share == LONG_SHARE else None,
                f"individuals/{name}",
                max_steps=max(fewest, round(min(share * steps, share / LONG_SHARE * most))),
                shorter_run=next(((n, took) for n, took in before if n is not None), None),
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
        """Return the jobs that scored an individual in the search, in this environment."""
        return [
            event
            for event in self.journal.of_kind("job")
            if event.payload["individual_id"] == individual.individual_id
            and event.payload.get("environment", 0) == self.trials.environment
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


@dataclass(frozen=True)
class _Read:
    """What became of a reading: a loss in nats, or a fault of the code; neither if we lost it."""

    loss: float | None = None
    fault: str = ""


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


def retimed(rounds: Sequence[Sequence[JobResult]]) -> dict[str, Any]:
    """Return median tokens per second and MFU by the slope between two runs, or why there is none.

    None in their place says that the count of tokens is not believed; then neither are the search's
    rates any more.

    Args:
        rounds: of each round the short and the long run; the first long one was scored too, so that
            its model says what a token costs, and whether it can be trained as fast as is claimed.
    """
    from darwin_exp.evaluation.rate import believed_rate, why_unbelieved

    slopes, why_none = _slopes(rounds)
    if not slopes:
        return {"why_none": why_none}
    examined = rounds[0][-1]
    if examined.evaluation is None:
        return {"why_none": f"{examined.job_id}: {examined.training.status.value}"}
    told = examined.evaluation.details.get("speed", {})
    bound, flops, peak = (
        told.get(name) for name in ("tokens_per_second_bound", "flops_per_token", "peak_flops")
    )
    if not flops or not peak or (told.get("verified") and bound is None):
        return {"why_none": told.get("note") or examined.evaluation.message}
    if bound is not None and believed_rate(claimed := statistics.median(slopes), bound) is None:
        return {"why_none": why_unbelieved(claimed, bound), **dict.fromkeys(RETIMED)}
    rates = slopes if bound is None else [min(slope, bound) for slope in slopes]
    middle = statistics.median(rates)
    return {
        "tokens_per_second": middle,
        "mfu": middle * flops / peak,
        "mfus": [rate * flops / peak for rate in rates],
    }
