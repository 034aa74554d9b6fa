"""Statistics: what is progress, and what is noise between runs of the same code.

Reads: natural logarithms of perplexities, one per run.
Writes: nothing.
Never: calls a difference progress that runs of the same code would also show, or guesses a spread
from fewer than two runs. Unknown is None.

Perplexity is compared on its logarithm (the mean loss in nats), where relative gains add up and
the spread between runs is near to normal; results are given back in percent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# exp() overflows just above 709: what lies beyond is no perplexity, and an interval that wide is
# as good as unbounded.
LARGEST_LOG = 700.0


@dataclass(frozen=True)
class NoiseFloor:
    """How far apart runs of the same code come out.

    Attributes:
        sd_log_perplexity: sample standard deviation in nats; None if fewer than two runs.
        n: runs that it rests on.
    """

    sd_log_perplexity: float | None = None
    n: int = 0

    @classmethod
    def from_repeats(cls, log_perplexities: Sequence[float]) -> NoiseFloor:
        """Measure the spread of repeated runs of the base, given as logs of perplexity.

        It is None where there are fewer than two, or where one is not finite.
        """
        n = len(log_perplexities)
        if not _enough(log_perplexities):
            return cls(None, n)
        return cls(math.sqrt(_mean_and_variance(log_perplexities)[1]), n)


def z_score(effect: float | None, noise: NoiseFloor) -> float | None:
    """Return an effect in standard deviations of the difference between two single runs.

    None where the effect or the spread is unknown, or where repeats did not differ at all: then
    the scale is unknown, not the effect infinite.
    """
    sd = noise.sd_log_perplexity
    if effect is None or not math.isfinite(effect) or not sd:
        return None
    score = effect / (sd * math.sqrt(2.0))
    return score if math.isfinite(score) else None


@dataclass(frozen=True)
class Claim:
    """What can be said of selected code against the base, both run afresh several times.

    Attributes:
        n_base: runs of the base.
        n_selected: runs of the selected code.
        perplexity_percent: how much lower its perplexity is, in percent; negative is worse.
        ci95: low and high end of the same, with 95 % confidence.
        p_value: two-sided, of Welch's t-test on log perplexity.
        significant: p_value < alpha, in either direction; `progress` asks for the good one.
        degrees_of_freedom: by Welch and Satterthwaite; None if neither side varied.
    """

    n_base: int
    n_selected: int
    perplexity_percent: float | None = None
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    significant: bool | None = None
    degrees_of_freedom: float | None = None
    alpha: float = 0.05

    @property
    def progress(self) -> bool:
        """Whether the selected code is significantly better."""
        return bool(self.significant) and (self.perplexity_percent or 0.0) > 0

    def sentence(self) -> str:
        """Say it in words, and plainly where there was no significant progress."""
        runs = f"{self.n_base} runs of the base and {self.n_selected} of the selected code"
        if self.perplexity_percent is None or self.ci95 is None or self.p_value is None:
            return (
                f"No claim: it takes two scored runs of each side at least, and there were {runs}."
            )
        better = self.perplexity_percent >= 0
        size = f"{abs(self.perplexity_percent):.2f} % {'lower' if better else 'higher'}"
        low, high = self.ci95
        p_value = "p < 0.0001" if self.p_value < 0.0001 else f"p = {self.p_value:.4f}"
        evidence = (
            f"(improvement with 95 % confidence between {low:+.2f} and {high:+.2f} %, "
            f"{p_value}, {runs})"
        )
        if self.progress:
            return f"Significant progress: perplexity is {size} than the base's {evidence}."
        if self.significant:
            return f"No progress: perplexity is significantly worse, {size} {evidence}."
        return (
            f"No significant progress: perplexity came out {size} than the base's, "
            f"and chance alone can explain that {evidence}."
        )


def welch(base: Sequence[float], challenger: Sequence[float], alpha: float = 0.05) -> Claim:
    """Compare two sets of log perplexities whose spreads may differ.

    The claim is empty (None) where a side has fewer than two values or one that is not finite.
    Where neither side varies there is nothing to estimate a spread from: equal values give p = 1,
    different ones p = 0, both with an interval that is the effect itself.
    Source: B. L. Welch 1947; degrees of freedom after F. E. Satterthwaite 1946.

    Args:
        base: natural log of perplexity, one per run of the base.
        challenger: the same of the code that is compared with it.
        alpha: probability of calling equal code different. The interval is always of 95 %.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    n_base, n_challenger = len(base), len(challenger)
    if not (_enough(base) and _enough(challenger)):
        return Claim(n_base, n_challenger, alpha=alpha)

    mean_base, variance_base = _mean_and_variance(base)
    mean_challenger, variance_challenger = _mean_and_variance(challenger)
    difference = mean_challenger - mean_base
    share_base = variance_base / n_base
    share_challenger = variance_challenger / n_challenger
    squared_error = share_base + share_challenger
    if squared_error == 0:
        percent = _percent_lower(difference)
        p_value, margin, freedom = (1.0 if difference == 0 else 0.0), 0.0, None
    else:
        # Student's t from scipy.special: scipy.stats holds the same, and takes seconds to import.
        from scipy.special import stdtr, stdtrit

        # By ratio, because squares of very small variances would underflow.
        ratio = share_base / squared_error
        freedom = 1 / (ratio**2 / (n_base - 1) + (1 - ratio) ** 2 / (n_challenger - 1))
        standard_error = math.sqrt(squared_error)
        percent = _percent_lower(difference)
        p_value = float(2 * stdtr(freedom, -abs(difference) / standard_error))
        margin = float(stdtrit(freedom, 0.975)) * standard_error
    return Claim(
        n_base,
        n_challenger,
        perplexity_percent=percent,
        ci95=(_percent_lower(difference + margin), _percent_lower(difference - margin)),
        p_value=p_value,
        significant=p_value < alpha,
        degrees_of_freedom=freedom,
        alpha=alpha,
    )


def geometric_mean(values: Sequence[float]) -> float | None:
    """Return the geometric mean; None where there is no value or one is not positive and finite."""
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _enough(values: Sequence[float]) -> bool:
    return len(values) >= 2 and all(abs(value) <= LARGEST_LOG for value in values)


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample variance, exactly 0 where all values are the same."""
    if min(values) == max(values):
        return values[0], 0.0
    mean = statistics.fmean(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _percent_lower(log_ratio: float) -> float:
    # The sum turns minus zero into zero.
    return -100.0 * math.expm1(min(log_ratio, LARGEST_LOG)) + 0.0
