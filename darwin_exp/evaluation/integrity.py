"""Checks that a model neither reads ahead nor answers differently when it is asked again.

Reads: windows of held-out tokens, a secret, and what two fresh model servers answered.
Writes: nothing.
Never: shows the first server a token that follows a prefix it is asked about.

A first server gets secret prefixes at full length whose true continuation is never sent; only
then a second, freshly started one gets the full windows. Whatever a model predicts before a cut
must be the same in both. Both work on batches of the same shape, and a prefix stands in the row
where its full window will stand, so that an honest model's arithmetic is the same to the last bit
in most cases and rounding is not mistaken for reading ahead.

This is evidence, not proof: a leak at very few positions can lie between the cuts.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.exchange import Refused
from darwin_exp.individual import Reason, Status

# How far two answers to the same question may be apart, in nats.
MEAN_TOLERANCE = 0.002
MAX_TOLERANCE = 0.05
# A band of distances with fewer losses is not judged by its mean: one difference that the maximum
# lets pass must not be enough to refuse a model.
MIN_BAND_POSITIONS = 25
# A batch of one takes other kernels, and bfloat16 models round visibly there.
ALONE_MEAN_TOLERANCE = 0.02
ALONE_MAX_TOLERANCE = 0.5

N_REPEATS = 4  # windows sent twice
MAX_DONOR_TOKENS = 1_000_000  # searched for natural continuations

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Nats = NDArray[np.float64]


def secret_generator(secret: bytes, purpose: str) -> np.random.Generator:
    """Return random numbers that only the harness can foresee, one sequence per purpose."""
    digest = hmac.new(secret, purpose.encode(), hashlib.sha256).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Schedule:
    """Which window stands in which row of which batch of the full pass.

    Attributes:
        windows: window index by batch and row (n_batches, B); every window at least once.
        first: whether this is the first time that the window is sent (n_batches, B).
    """

    windows: Ints
    first: NDArray[np.bool_]

    @classmethod
    def draw(cls, n_windows: int, rows: int, rng: np.random.Generator) -> Schedule:
        """Shuffle windows into batches of at most `rows` rows, with some windows sent twice.

        A repeat stands in the row of its original but in another batch, where there is one.
        """
        n_slots = n_windows + min(N_REPEATS, n_windows)
        n_batches = -(-n_slots // rows)
        B = -(-n_slots // n_batches)
        windows = np.full(n_batches * B, -1, dtype=np.int64)
        slots = rng.permutation(n_batches * B)
        originals = np.sort(slots[:n_windows])
        windows[originals] = rng.permutation(n_windows)
        grid = windows.reshape(n_batches, B)
        first = grid >= 0
        for batch, row in np.argwhere(~first):
            known = np.flatnonzero(first[:, row])
            if len(known):
                grid[batch, row] = grid[rng.choice(known), row]
            else:
                grid[batch, row] = rng.integers(n_windows)
        return cls(grid, first)

    def by_window(self, nats: Nats) -> Nats:
        """Return the first answer for every window (n_windows, T), in the order of windows."""
        windows, answers = self.windows[self.first], nats[self.first]
        ordered: Nats = answers[np.argsort(windows)]
        return ordered


@dataclass(frozen=True)
class Prefixes:
    """What the first server is asked.

    Attributes:
        tokens: prefixes with false continuations (n_batches, B, T).
        windows: whose prefixes they are (n_batches, B).
        cuts: how many true tokens each holds; 0 where the row is filler (n_batches, B).
        slots: the batch of the full pass in which that window stands (n_batches, B).
    """

    tokens: NDArray[np.int32]
    windows: Ints
    cuts: Ints
    slots: Ints

    @property
    def n(self) -> int:
        return int(np.count_nonzero(self.cuts))


def draw_prefixes(
    windows: Tokens, schedule: Schedule, n: int, vocab_size: int, rng: np.random.Generator
) -> Prefixes:
    """Choose windows, cut them, and put something else where the rest was.

    Args:
        windows: all scored windows, each with the token after it (n_windows, T + 1).
        n: about how many prefixes; whole batches are filled, and no window is used twice.
    """
    T = windows.shape[1] - 1
    n_batches, B = schedule.windows.shape
    n_passes = min(n_batches, -(-n // B)) if T > 1 else 0
    chosen = np.full((n_passes, B), -1, dtype=np.int64)
    for row in range(B):
        known = rng.permutation(np.flatnonzero(schedule.first[:, row]))[:n_passes]
        chosen[: len(known), row] = known
    used = chosen >= 0
    slots = np.where(used, chosen, 0)
    of = schedule.windows[slots, np.arange(B)]
    cuts = np.zeros_like(chosen)
    cuts[used] = _draw_cuts(T, int(used.sum()), rng)
    # Continuations in natural language come from windows of which no prefix is sent.
    donors = np.delete(windows, of[used], axis=0)[:, :-1].ravel()[:MAX_DONOR_TOKENS]
    tokens = rng.integers(vocab_size, size=(n_passes, B, T), dtype=np.int32)
    for i, (batch, row) in enumerate(np.argwhere(used)):
        window, cut = windows[of[batch, row]], int(cuts[batch, row])
        tokens[batch, row, :cut] = window[:cut]
        suffix = tokens[batch, row, cut:]  # uniformly random so far
        if i % 3 == 1 and len(donors) > T:
            suffix[:] = _natural_suffix(window[: cut + 1], len(suffix), donors, rng)
        elif i % 3 == 2:
            suffix[:] = rng.integers(vocab_size)
        if suffix[0] == window[cut]:
            suffix[0] = (suffix[0] + 1) % vocab_size
    return Prefixes(tokens, of, cuts, slots)


def _draw_cuts(context_length: int, n: int, rng: np.random.Generator) -> Ints:
    """Draw cuts from 1 to T - 1: the ends first, then every other one once before any twice.

    Models that leak at some positions only, say the last of each sixteen, are caught by a cut just
    behind one of them: so cuts are spread over all positions and not drawn one by one.
    """
    T = context_length
    ends = [cut for cut in (1, T - 1, 2, T - 2) if 1 <= cut < T]
    cuts = np.array(list(dict.fromkeys(ends)), dtype=np.int64)
    rest = np.setdiff1d(np.arange(1, T), cuts)
    cuts = np.concatenate([cuts, rng.permutation(rest)])
    while len(cuts) < n:
        cuts = np.concatenate([cuts, 1 + rng.permutation(T - 1)])
    return rng.permutation(cuts[:n])


def _natural_suffix(
    known: Tokens, length: int, donors: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.int32]:
    """Return what follows the prefix's last tokens elsewhere in the text, and differs here.

    Args:
        known: the prefix and the one true token that follows it.
    """
    differs = donors[2:] != known[-1]
    same_last = donors[1:-1] == known[-2]
    matches = np.flatnonzero(same_last & differs)
    if len(known) > 2:
        closer = np.flatnonzero(same_last & differs & (donors[:-2] == known[-3]))
        matches = closer if len(closer) else matches
    start = 2 + int(rng.choice(matches)) if len(matches) else int(rng.integers(len(donors)))
    suffix: NDArray[np.int32] = donors[(start + np.arange(length)) % len(donors)]
    return suffix


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


def check_repeats(schedule: Schedule, nats: Nats) -> Agreement:
    """Compare the answers to windows that were sent twice.

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


def _agreement(one: Nats, other: Nats) -> Agreement:
    difference = np.abs(one - other)
    if not difference.size:
        return Agreement()
    position = int(np.argmax(difference)) % difference.shape[-1]
    return Agreement(difference.size, float(difference.mean()), float(difference.max()), position)
