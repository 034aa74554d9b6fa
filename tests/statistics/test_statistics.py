"""Statistics agree with SciPy, keep their error rate, and say plainly when nothing was gained."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind

from darwin_exp.statistics import Claim, NoiseFloor, geometric_mean, welch, z_score

logs = st.lists(st.floats(-5, 15).map(lambda x: round(x, 6)), min_size=2, max_size=8)


@given(logs, logs)
@settings(deadline=None)  # the first call imports scipy.stats
def test_welch_agrees_with_scipy(base: list[float], challenger: list[float]) -> None:
    # SciPy warns where a side does not vary; that case has tests of its own below.
    assume(len(set(base)) > 1 and len(set(challenger)) > 1)
    claim = welch(base, challenger)
    expected = ttest_ind(challenger, base, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert claim.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert claim.degrees_of_freedom == pytest.approx(expected.df, rel=1e-6)
    assert claim.ci95 is not None
    for end, log_ratio in zip(claim.ci95, (interval.high, interval.low), strict=True):
        if log_ratio < 600:
            assert end == pytest.approx(100 * (1 - math.exp(log_ratio)), rel=1e-6, abs=1e-6)


@given(logs, logs)
def test_the_interval_holds_the_effect_and_excludes_zero_just_when_it_is_significant(
    base: list[float], challenger: list[float]
) -> None:
    claim = welch(base, challenger)
    assert claim.ci95 is not None
    assert claim.perplexity_percent is not None
    assert claim.p_value is not None
    low, high = claim.ci95
    assert low <= claim.perplexity_percent <= high
    if abs(claim.p_value - 0.05) > 1e-6:
        assert (low > 0 or high < 0) == claim.significant


@given(logs, logs)
def test_exchanging_the_sides_keeps_the_p_value(base: list[float], challenger: list[float]) -> None:
    assert welch(base, challenger).p_value == pytest.approx(
        welch(challenger, base).p_value, abs=1e-12
    )


def test_equal_code_is_called_different_about_as_often_as_alpha_says() -> None:
    random = Random(20)
    n_trials, n_false, n_covered = 1500, 0, 0
    for _ in range(n_trials):
        base = [random.gauss(2.3, 0.03) for _ in range(4)]
        same = [random.gauss(2.3, 0.01) for _ in range(6)]
        claim = welch(base, same)
        assert claim.ci95 is not None
        n_false += bool(claim.significant)
        n_covered += claim.ci95[0] <= 0 <= claim.ci95[1]
    # Three standard errors around 5 % at this many trials are 1.7 %.
    assert 0.033 < n_false / n_trials < 0.067
    assert 0.933 < n_covered / n_trials < 0.967


def test_the_interval_covers_a_true_gain_as_often_as_it_says() -> None:
    random = Random(21)
    true_percent = 100 * (1 - math.exp(-0.05))
    n_covered = 0
    for _ in range(1500):
        base = [random.gauss(2.30, 0.02) for _ in range(4)]
        better = [random.gauss(2.25, 0.02) for _ in range(4)]
        claim = welch(base, better)
        assert claim.ci95 is not None
        n_covered += claim.ci95[0] <= true_percent <= claim.ci95[1]
    assert 0.933 < n_covered / 1500 < 0.967


def test_a_quarter_less_perplexity_is_twenty_five_percent() -> None:
    base = [math.log(p) for p in (10.0, 10.1, 9.9, 10.0)]
    selected = [math.log(p) for p in (7.5, 7.55, 7.45, 7.5)]
    claim = welch(base, selected)
    assert claim.perplexity_percent == pytest.approx(25, abs=0.1)
    assert claim.progress
    assert claim.sentence().startswith("Significant progress: perplexity is 25.0")
    assert "4 runs of the base and 4 of the selected code" in claim.sentence()


def test_significantly_worse_is_significant_but_no_progress() -> None:
    claim = welch([2.0, 2.01, 1.99, 2.0], [2.3, 2.31, 2.29, 2.3])
    assert claim.significant
    assert not claim.progress
    assert claim.sentence().startswith("No progress: perplexity is significantly worse")


def test_no_significant_progress_is_said_plainly() -> None:
    claim = welch([2.30, 2.34, 2.27], [2.29, 2.33, 2.27])
    assert claim.significant is False
    assert claim.sentence().startswith("No significant progress")


def test_a_stricter_alpha_asks_for_more_and_leaves_the_interval() -> None:
    base, selected = [2.30, 2.32, 2.28, 2.31], [2.26, 2.28, 2.24, 2.27]
    usual, strict = welch(base, selected), welch(base, selected, alpha=0.001)
    assert usual.significant
    assert strict.significant is False
    assert usual.ci95 == strict.ci95


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_alpha_that_is_no_probability_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        welch([1.0, 2.0], [1.0, 2.0], alpha=alpha)


@pytest.mark.parametrize(
    ("base", "selected"),
    [([], []), ([2.0], [2.1, 2.2]), ([2.0, 2.1], [2.2]), ([2.0, math.nan], [2.0, 2.1])],
)
def test_too_few_runs_claim_nothing(base: list[float], selected: list[float]) -> None:
    claim = welch(base, selected)
    assert claim == Claim(len(base), len(selected))
    assert claim.p_value is None
    assert not claim.progress
    assert claim.sentence().startswith("No claim")


def test_sides_that_do_not_vary_and_are_equal_are_no_progress() -> None:
    claim = welch([0.1] * 3, [0.1] * 7)
    assert (claim.perplexity_percent, claim.ci95, claim.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert claim.significant is False
    assert math.copysign(1, claim.perplexity_percent or 0.0) == 1


def test_one_side_that_does_not_vary_leaves_the_other_to_judge_by() -> None:
    claim = welch([1.0] * 5, [1.1, 1.2, 1.3])
    assert claim.degrees_of_freedom == pytest.approx(2)
    # t = 0.2 / (0.1 / sqrt(3)) with two degrees of freedom: p = 1 - t / sqrt(2 + t²).
    t = 0.2 / (0.1 / math.sqrt(3))
    assert claim.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_sides_that_do_not_vary_and_differ_are_certain() -> None:
    claim = welch([2.0] * 3, [1.9] * 3)
    assert claim.p_value == 0.0
    assert claim.ci95 == (claim.perplexity_percent, claim.perplexity_percent)
    assert claim.degrees_of_freedom is None
    assert claim.progress


@pytest.mark.parametrize("spread", [1e-12, 1e-160, 500.0])
def test_extreme_spreads_give_finite_numbers(spread: float) -> None:
    claim = welch([0.0, spread], [0.0, -spread])
    assert claim.ci95 is not None
    assert claim.p_value is not None
    assert all(math.isfinite(number) for number in (*claim.ci95, claim.p_value))


def test_the_noise_floor_is_the_sample_deviation_of_repeats() -> None:
    noise = NoiseFloor.from_repeats([2.0, 2.1, 2.2])
    assert noise.sd_log_perplexity == pytest.approx(0.1)
    assert noise.n == 3


@pytest.mark.parametrize("repeats", [[], [2.0], [2.0, math.inf]])
def test_the_noise_floor_is_unknown_without_two_finite_repeats(repeats: list[float]) -> None:
    assert NoiseFloor.from_repeats(repeats) == NoiseFloor(None, len(repeats))


def test_a_z_score_is_in_deviations_of_a_difference() -> None:
    assert z_score(0.2, NoiseFloor(0.1, 5)) == pytest.approx(math.sqrt(2))
    assert z_score(-0.2, NoiseFloor(0.1, 5)) == pytest.approx(-math.sqrt(2))


def test_z_scores_of_equal_code_have_unit_spread() -> None:
    random = Random(22)
    noise = NoiseFloor(0.03, 1000)
    scores = [z_score(random.gauss(0, 0.03) - random.gauss(0, 0.03), noise) for _ in range(4000)]
    assert sum(z * z for z in scores if z is not None) / 4000 == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(
    ("effect", "noise"),
    [
        (None, NoiseFloor(0.1, 5)),
        (math.nan, NoiseFloor(0.1, 5)),
        (0.1, NoiseFloor(None, 1)),
        (0.1, NoiseFloor(0.0, 4)),
        (1e300, NoiseFloor(1e-300, 4)),
    ],
)
def test_a_z_score_without_a_scale_is_unknown(effect: float | None, noise: NoiseFloor) -> None:
    assert z_score(effect, noise) is None


def test_the_geometric_mean_multiplies() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [math.inf]])
def test_the_geometric_mean_of_what_is_not_positive_is_unknown(values: list[float]) -> None:
    assert geometric_mean(values) is None
