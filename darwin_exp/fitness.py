"""Fitness: the one number that selection compares, chosen among what the evaluator measured.

Reads: metrics and rates of an individual, and those of the base.
Writes: nothing.
Never: turns an unknown into a number. What was not measured, or is not a positive finite number,
gives None; higher is always better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from darwin_exp.individual import Individual

PERPLEXITY = "val_perplexity"
MFU = "mfu"


class Fitness(Protocol):
    """Weighs what was measured. Pure; never raises for what a candidate did."""

    def __call__(
        self,
        metrics: Mapping[str, float],
        rates: Mapping[str, float],
        base: Individual | None,
        is_base: bool = False,
    ) -> float | None:
        """Return a number (higher is better), or None where it is unknown.

        Args:
            base: what gains are measured against; None for its own first measurement.
            is_base: whether the base's own code was measured again, to which no condition applies.
        """
        ...


@dataclass(frozen=True)
class PerplexityFitness:
    """Is minus the logarithm of validation perplexity: equal steps are equal relative gains."""

    def __call__(
        self,
        metrics: Mapping[str, float],
        rates: Mapping[str, float],
        base: Individual | None,
        is_base: bool = False,
    ) -> float | None:
        """Return -log(val_perplexity), or None where it is unknown."""
        log_perplexity = _log(metrics, rates, PERPLEXITY)
        return None if log_perplexity is None else -log_perplexity


@dataclass(frozen=True)
class MfuFitness:
    """Is the model FLOPs utilisation, between 0 and 1, as long as perplexity is kept.

    Training that uses the machine to the full and learns nothing is easy to find. So code whose
    validation perplexity is further above the base's than the margin has a fitness below 0: minus
    what it is too high by, in nats. It then comes after all code that keeps to the margin, and the
    nearer to it the better.
    Source: the constraint domination of Deb et al. 2002, "NSGA-II".

    Attributes:
        margin_percent: how far above the base's the perplexity may be; None ignores perplexity.
    """

    margin_percent: float | None = 0.0

    def __call__(
        self,
        metrics: Mapping[str, float],
        rates: Mapping[str, float],
        base: Individual | None,
        is_base: bool = False,
    ) -> float | None:
        """Return mfu, or what is below 0 for too high a perplexity; None where one is unknown."""
        mfu = metrics.get(MFU, rates.get(MFU))
        if not _is_positive(mfu):
            return None
        if self.margin_percent is None or base is None or is_base:
            return mfu
        here = _log(metrics, rates, PERPLEXITY)
        there = _log(base.metrics, base.rates, PERPLEXITY)
        if here is None or there is None:
            return None
        excess = here - there - math.log1p(self.margin_percent / 100)
        return mfu if excess <= 0 else -excess


@dataclass(frozen=True)
class WeightedFitness:
    """Adds up relative gains over the base: a weight of 1 counts a gain of 1 % as about 0.01.

    Gains are differences of logarithms, so neither the unit nor the size of a metric matters. The
    base itself has fitness 0. A metric whose weight is 0 need not be measured.

    Attributes:
        perplexity_weight: of log(base perplexity) - log(perplexity).
        mfu_weight: of log(mfu) - log(base mfu).
    """

    perplexity_weight: float = 1.0
    mfu_weight: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.perplexity_weight, self.mfu_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(f"fitness weights must be finite and 0 or more, not {weights}")
        if not any(weights):
            raise ValueError("at least one of the fitness weights must be above 0")

    def __call__(
        self,
        metrics: Mapping[str, float],
        rates: Mapping[str, float],
        base: Individual | None,
        is_base: bool = False,
    ) -> float | None:
        """Return the weighted sum of gains, or None where any that counts is unknown."""
        of_base = (metrics, rates) if base is None else (base.metrics, base.rates)
        total = 0.0
        for name, weight in ((PERPLEXITY, -self.perplexity_weight), (MFU, self.mfu_weight)):
            if weight == 0:
                continue
            here, there = _log(metrics, rates, name), _log(*of_base, name)
            if here is None or there is None:
                return None
            total += weight * (here - there)
        return total if math.isfinite(total) else None


def _log(metrics: Mapping[str, float], rates: Mapping[str, float], name: str) -> float | None:
    value = metrics.get(name, rates.get(name))
    return math.log(value) if value is not None and _is_positive(value) else None


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
