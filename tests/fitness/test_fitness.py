"""Fitness: higher is better, and unknown stays unknown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.fitness import Fitness, MfuFitness, PerplexityFitness, WeightedFitness
from darwin_exp.individual import Genome, Individual

VARIANTS: list[Fitness] = [PerplexityFitness(), MfuFitness(), WeightedFitness(1.0, 0.5)]
positive = st.floats(1e-6, 1e6)


def base(perplexity: float | None = 10.0, mfu: float | None = 0.2) -> Individual:
    return Individual(
        individual_id="base",
        generation=0,
        slot=0,
        genome=Genome(()),
        metrics={} if perplexity is None else {"val_perplexity": perplexity},
        rates={} if mfu is None else {"mfu": mfu},
    )


@pytest.mark.parametrize("fitness", VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_is_not_a_positive_finite_number_gives_none(fitness: Fitness, value: float) -> None:
    assert fitness({"val_perplexity": value}, {"mfu": value}, base()) is None


@pytest.mark.parametrize("fitness", VARIANTS)
def test_what_was_not_measured_gives_none(fitness: Fitness) -> None:
    assert fitness({}, {}, base()) is None
    assert fitness({}, {}, None) is None


@given(st.sampled_from(VARIANTS), positive, positive)
def test_measured_gives_a_finite_number(fitness: Fitness, perplexity: float, mfu: float) -> None:
    value = fitness({"val_perplexity": perplexity}, {"mfu": mfu}, base())
    assert value is not None
    assert math.isfinite(value)


@given(positive, st.floats(1.001, 1e3))
def test_lower_perplexity_is_fitter(perplexity: float, factor: float) -> None:
    better = {"val_perplexity": perplexity}
    worse = {"val_perplexity": perplexity * factor}
    for fitness in (PerplexityFitness(), WeightedFitness(1.0, 1.0)):
        high, low = (fitness(m, {"mfu": 0.3}, base()) for m in (better, worse))
        assert high is not None
        assert low is not None
        assert high > low


def test_perplexity_fitness_is_minus_its_logarithm() -> None:
    assert PerplexityFitness()({"val_perplexity": math.e**2}, {}, None) == pytest.approx(-2)


def test_mfu_fitness_is_mfu() -> None:
    assert MfuFitness()({}, {"mfu": 0.31}, None) == 0.31


@given(positive, positive, st.floats(1.001, 1e3), st.floats(0.0, 10.0))
def test_code_that_loses_perplexity_is_less_fit_than_any_that_keeps_it(
    slow: float, fast: float, loss: float, margin: float
) -> None:
    """However fast it is, and the more so the more it loses."""
    fitness = MfuFitness(margin)
    limit = 10.0 * (1 + margin / 100)
    kept = fitness({"val_perplexity": limit * 0.999}, {"mfu": slow}, base())
    lost = fitness({"val_perplexity": limit * loss}, {"mfu": fast}, base())
    worse = fitness({"val_perplexity": limit * loss * 1.1}, {"mfu": fast}, base())
    assert kept is not None
    assert lost is not None
    assert worse is not None
    assert kept > lost > worse


def test_a_repeat_of_the_base_meets_no_condition_and_none_is_met_where_the_margin_is_null() -> None:
    metrics, rates = {"val_perplexity": 12.0}, {"mfu": 0.31}
    assert MfuFitness()(metrics, rates, base(), is_base=True) == 0.31
    assert MfuFitness(None)(metrics, rates, base()) == 0.31
    below = MfuFitness()(metrics, rates, base())
    assert below == pytest.approx(-math.log(1.2))


def test_weighted_fitness_adds_relative_gains() -> None:
    value = WeightedFitness(2.0, 0.5)({"val_perplexity": 8.0}, {"mfu": 0.3}, base())
    assert value == pytest.approx(2 * math.log(10 / 8) + 0.5 * math.log(0.3 / 0.2))


def test_the_base_itself_has_weighted_fitness_zero() -> None:
    assert WeightedFitness(1.0, 1.0)({"val_perplexity": 10.0}, {"mfu": 0.2}, None) == 0.0


@pytest.mark.parametrize("of_base", [base(perplexity=None), base(mfu=None), base(mfu=0.0)])
def test_a_base_that_was_not_measured_leaves_weighted_fitness_unknown(of_base: Individual) -> None:
    assert WeightedFitness(1.0, 1.0)({"val_perplexity": 8.0}, {"mfu": 0.3}, of_base) is None


def test_a_metric_of_weight_zero_need_not_be_measured() -> None:
    only_perplexity = WeightedFitness(1.0, 0.0)
    value = only_perplexity({"val_perplexity": 5.0}, {}, base(mfu=None))
    assert value == pytest.approx(math.log(2))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_weights_that_make_no_sense_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="fitness weights"):
        WeightedFitness(*weights)
