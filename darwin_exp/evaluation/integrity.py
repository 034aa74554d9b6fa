"""Checks that a model neither reads ahead nor answers differently when it is asked again.

Reads: what two fresh model servers' answers cost, and what they were asked (`questions`).
Writes: nothing.
Never: takes silence for an answer: a check that compared nothing is not passed.

Whatever a model predicts before a cut must cost the same whether what follows was sent or not; and
a whole window the same whatever was asked before it and stands beside it. A model may well find out
that it is being tested: it still cannot know the true continuation of a prefix, and so has to
answer the full window as if it did not know it either.

Should the second server learn what the first was asked, it loses less where that was not probed.

This is evidence, not proof: a leak at very few positions, or in very few windows, can lie between
the cuts, and one below the tolerances is taken for rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from darwin_exp.evaluation.exchange import Refused
from darwin_exp.evaluation.questions import Ints, Nats, Prefixes, Schedule
from darwin_exp.individual import Reason, Status
from darwin_exp.protocols import InfrastructureFailure

# How far two answers to the same question may be apart, in nats.
MEAN_TOLERANCE = 0.002
MAX_TOLERANCE = 0.05
# A band of distances with fewer losses is not judged by its mean: one difference that the maximum
# lets pass must not be enough to refuse a model.
MIN_BAND_POSITIONS = 25
# How many standard errors what nobody probed may cost less than what was probed. Cuts are drawn at
# random, so that an honest model gets there once in a thousand million evaluations.
MAX_Z = 6.0
N_SHUFFLES = 256  # of the cuts, which tell how large the standard error is
# A batch of one takes other kernels, and bfloat16 models round visibly there.
ALONE_MEAN_TOLERANCE = 0.02
ALONE_MAX_TOLERANCE = 0.5


@dataclass(frozen=True)
class Agreement:
    """How far apart two answers to the same questions were, in nats.

    Attributes:
        position: where in its window the largest difference was.
        cut: how many true tokens the first server had there; None where nothing was cut.
        worst_band: the shortest distance to the cut in the band that differs most.
        worst_band_mean: the mean of that band alone.
    """

    n_positions: int = 0
    mean: float = 0.0
    max: float = 0.0
    position: int = 0
    cut: int | None = None
    worst_band: int | None = None
    worst_band_mean: float = 0.0

    def within(self, mean: float, maximum: float) -> bool:
        return max(self.mean, self.worst_band_mean) < mean and self.max < maximum


def check_causality(prefixes: Prefixes, prefix_nats: Nats, full_nats: Nats) -> Agreement:
    """Compare every loss before a cut with the loss at the same place of the full window.

    Means are taken over all positions, and over bands of like distance to the cut: a model that
    leans a little on the next token alone differs only right before the cut, where a mean over
    whole prefixes would not show it.

    Args:
        prefix_nats: what the first server's answers cost (n_batches, B, T).
        full_nats: what the second server's did, by the schedule (n_batches', B, T).

    Raises:
        Refused: CAUSALITY if they differ by more than rounding.
    """
    rows = np.arange(prefixes.cuts.shape[1])
    difference = np.abs(prefix_nats - full_nats[prefixes.slots, rows])  # (n_batches, B, T)
    distance = prefixes.cuts[:, :, None] - np.arange(difference.shape[2])
    before = distance > 0
    if not before.any():
        return Agreement()
    band, band_mean = _worst_band(distance[before], difference[before])
    batch, row, position = np.unravel_index(
        int(np.argmax(np.where(before, difference, -1.0))), difference.shape
    )
    found = Agreement(
        n_positions=int(before.sum()),
        mean=float(difference[before].mean()),
        max=float(difference[batch, row, position]),
        position=int(position),
        cut=int(prefixes.cuts[batch, row]),
        worst_band=band,
        worst_band_mean=band_mean,
    )
    if not found.within(MEAN_TOLERANCE, MAX_TOLERANCE):
        raise Refused(
            Status.REJECTED,
            Reason.CAUSALITY,
            f"the model reads ahead: once what follows token {found.cut} of a window was "
            f"replaced, its loss at position {found.position} changed by {found.max:.3g} nats "
            f"(mean {found.mean:.3g} over {found.n_positions} positions before the cuts, "
            f"{band_mean:.3g} at distances from {band} to a cut; rounding explains "
            f"{MAX_TOLERANCE} and {MEAN_TOLERANCE})",
        )
    return found


@dataclass(frozen=True)
class Unprobed:
    """How much less was lost where the first server was not probed, in nats.

    Attributes:
        n_positions: how many losses lie before a cut.
        less: mean loss before the cuts minus mean loss elsewhere, place in the window by place.
        z: the same in standard errors.
    """

    n_positions: int = 0
    less: float = 0.0
    z: float = 0.0


def check_unprobed(
    prefixes: Prefixes, told: Ints, nats: Nats, rng: np.random.Generator
) -> Unprobed:
    """Compare the losses before the cuts with all others, as the second server gave them.

    The first server's answers hold the second to honesty before the cuts. If it learned from the
    first, in whatever way, where these were, it could read ahead everywhere else. But cuts are
    drawn at random: before them, an honest model loses neither more nor less than elsewhere.

    Args:
        told: windows that the first server got in full later, in any shape. They are left out: the
            second server would have to be honest all over them.
        nats: what every target cost (n_windows, T).
        rng: shuffles the cuts over the windows, by which chance is told from knowledge.

    Raises:
        Refused: CAUSALITY if so much less was lost elsewhere that chance does not explain it.
    """
    used = prefixes.cuts > 0
    cuts = np.zeros(len(nats), dtype=np.int64)  # of each window the longest; 0 for none
    np.maximum.at(cuts, prefixes.windows[used], prefixes.cuts[used])
    untold = np.setdiff1d(np.arange(len(nats)), told)
    nats, cuts = nats[untold], cuts[untold]
    n_windows, T = nats.shape
    n, n_others = int(cuts.sum()), nats.size - int(cuts.sum())
    if not n or not n_others:
        return Unprobed()
    # What is lost late in a window is less than what is lost early: that is no knowledge.
    sums = np.zeros((n_windows, T + 1))
    np.cumsum(nats - nats.mean(axis=0), axis=1, out=sums[:, 1:])
    every = np.arange(n_windows)
    chance = [sums[every, rng.permutation(cuts)].sum() for _ in range(N_SHUFFLES)]
    excess = float(sums[every, cuts].sum())  # before the cuts; elsewhere it is as much below zero
    spread = float(np.std(chance))
    found = Unprobed(
        n_positions=n,
        less=excess / n + excess / n_others,
        z=(excess - float(np.mean(chance))) / spread if spread > 0 else 0.0,
    )
    if found.z > MAX_Z:
        raise Refused(
            Status.REJECTED,
            Reason.CAUSALITY,
            f"the model reads ahead where it was not probed: there it lost {found.less:.3g} nats "
            f"less than before the {np.count_nonzero(cuts)} secret cuts, which is {found.z:.1f} "
            "standard errors; it must have learned where they were",
        )
    return found


def _worst_band(distance: Ints, difference: Nats) -> tuple[int | None, float]:
    """Return where the mean difference is largest among distances 1, 2-3, 4-7 and so on.

    Returns:
        The band's shortest distance and its mean; None and 0 where no band holds enough.
    """
    bands = np.frexp(distance)[1] - 1  # the binary logarithm, rounded down
    n = np.bincount(bands)
    means = np.bincount(bands, weights=difference) / np.maximum(n, 1)
    means[n < MIN_BAND_POSITIONS] = 0.0
    worst = int(np.argmax(means))
    return (1 << worst, float(means[worst])) if n[worst] >= MIN_BAND_POSITIONS else (None, 0.0)


def check_order(slots: Ints, first_nats: Nats, full_nats: Nats) -> Agreement:
    """Compare whole windows as both servers answered them, each in an order of its own.

    Args:
        slots: by batch and row of the first server's pass, the batch of the second's in which the
            same window stands (n_batches, B).
        first_nats: what the first server's answers cost (n_batches, B, T).
        full_nats: what the second server's did (n_batches', B, T).

    Raises:
        Refused: NONDETERMINISM if they differ by more than rounding.
    """
    found = _agreement(full_nats[slots, np.arange(slots.shape[1])], first_nats)
    if not found.within(MEAN_TOLERANCE, MAX_TOLERANCE):
        raise Refused(
            Status.REJECTED,
            Reason.NONDETERMINISM,
            f"the same windows, asked for in another order and beside others, cost {found.max:.3g} "
            f"nats more or less at position {found.position} (mean {found.mean:.3g} over "
            f"{found.n_positions} positions): the model draws random numbers, remembers what it "
            "was asked or mixes the sequences of a batch",
        )
    return found


def check_repeats(schedule: Schedule, nats: Nats) -> Agreement:
    """Compare the answers to windows that the second server was sent twice.

    The server has then seen the whole of the window before: what it knows by heart shows.

    Raises:
        Refused: NONDETERMINISM if they differ by more than rounding.
    """
    again = ~schedule.first
    if not again.any():
        return Agreement()
    first = schedule.by_window(nats)[schedule.windows[again]]
    found = _agreement(first, nats[again])
    if not found.within(MEAN_TOLERANCE, MAX_TOLERANCE):
        raise Refused(
            Status.REJECTED,
            Reason.NONDETERMINISM,
            f"the same window sent twice differs by {found.max:.3g} nats at position "
            f"{found.position}: the model draws random numbers or remembers what it was asked",
        )
    return found


def check_alone(in_batch: Nats, alone: Nats) -> Agreement:
    """Compare windows (n, T) answered within a batch with the same sent alone.

    Raises:
        Refused: NONDETERMINISM if the rest of the batch makes a difference.
    """
    found = _agreement(in_batch, alone)
    if not found.within(ALONE_MEAN_TOLERANCE, ALONE_MAX_TOLERANCE):
        raise Refused(
            Status.REJECTED,
            Reason.NONDETERMINISM,
            f"a window sent alone differs by {found.max:.3g} nats at position {found.position} "
            "from the same window in a batch: the model mixes the sequences of a batch",
        )
    return found


def require_evidence(details: Mapping[str, Any], due: Collection[str], nats: Nats) -> None:
    """Make sure that every target was scored and every check that is due compared something.

    Args:
        details: what each check found, by its name, as fields of an `Agreement`.
        due: the names of the checks without which no score counts.
        nats: what every target cost.

    Raises:
        InfrastructureFailure: something is missing, which no candidate can bring about.
    """
    if not nats.size or not np.isfinite(nats).all():
        raise InfrastructureFailure("not every target was scored")
    for name in due:
        if not details.get(name, {}).get("n_positions"):
            raise InfrastructureFailure(f"the check {name!r} compared nothing: no score without it")


def _agreement(one: Nats, other: Nats) -> Agreement:
    difference = np.abs(one - other)
    if not difference.size:
        return Agreement()
    position = int(np.argmax(difference)) % difference.shape[-1]
    return Agreement(difference.size, float(difference.mean()), float(difference.max()), position)
