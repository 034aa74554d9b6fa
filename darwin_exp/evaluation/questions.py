"""Chooses what two fresh model servers are asked, and in which order.

Reads: windows of held-out tokens, text that may be told, and a secret.
Writes: nothing.
Never: lets the first server be sent a token that follows a prefix before its answer is in.

The first server gets secret prefixes with false continuations and only then, all of them answered,
full windows; the second gets the full windows alone, in an order of its own. All requests have one
shape, and whatever is compared stands in the same row of its batch, so that an honest model's
arithmetic is the same to the last bit in most cases and rounding is not mistaken for anything else.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Fewer prefixes than these say little, so that few windows are cut several times each.
MIN_PREFIXES = 64
N_REPEATS = 4  # windows sent twice to the second server
# The first server is asked for so many windows in full, or half of the batches if these are fewer.
MIN_SECOND_PASS = 64
MAX_DONOR_TOKENS = 200_000  # searched for natural continuations

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Nats = NDArray[np.float64]


def secret_generator(secret: bytes, purpose: str) -> np.random.Generator:
    """Return random numbers that only the harness can foresee, one sequence per purpose."""
    digest = hmac.new(secret, purpose.encode(), hashlib.sha256).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


# --- full windows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Which window stands in which row of which batch of the full pass.

    Attributes:
        windows: window index by batch and row (n_batches, B); every window at least once.
        first: whether this answer is the one that is scored (n_batches, B); once per window.
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
        """Return the scored answer for every window (n_windows, T), in the order of windows."""
        windows, answers = self.windows[self.first], nats[self.first]
        ordered: Nats = answers[np.argsort(windows)]
        return ordered


def draw_second_pass(schedule: Schedule, share: float, rng: np.random.Generator) -> Ints:
    """Choose which of the full windows the first server is asked for too, and in which order.

    Every row of the full pass is shuffled by itself: windows come in another order and beside
    others, but in the row that they had. Where all fit into one batch, only the history differs.

    Args:
        share: of all batches, rounded up; more where that is below the minimum, and none if 0.

    Returns:
        By batch and row of the second pass, the batch of the full pass that is repeated there.
    """
    n_batches, B = schedule.windows.shape
    least = min(-(-MIN_SECOND_PASS // B), n_batches // 2)
    n = max(math.ceil(share * n_batches), least) if share > 0 else 0
    every = np.tile(np.arange(n_batches)[:, None], (1, B))
    shuffled: Ints = rng.permuted(every, axis=0)[:n]
    return shuffled


# --- prefixes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefixes:
    """What the first server is asked first.

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
    windows: Tokens,
    schedule: Schedule,
    n: int,
    vocab_size: int,
    rng: np.random.Generator,
    donors: Tokens | None = None,
    cuts_per_window: int = 1,
) -> Prefixes:
    """Choose windows, cut them, and put something else where the rest was.

    A window that is cut several times is asked for with its shorter prefixes first. A longer one
    tells what followed a shorter one, but only once that has been answered; and what follows the
    longer one was never sent. So one server may be asked for all of them.

    Args:
        windows: all scored windows, each with the token after it (n_windows, T + 1).
        n: about how many prefixes; whole batches are filled.
        donors: text of which no window holds a part, for continuations in natural language.
        cuts_per_window: how often a window may be used; all are used once before any twice. Where
            windows are few, they are used until there are `MIN_PREFIXES`, or all that is wanted.
    """
    T = windows.shape[1] - 1
    n_batches, B = schedule.windows.shape
    cuts_per_window = max(cuts_per_window, -(-min(n, MIN_PREFIXES) // len(windows)))
    n_passes = min(cuts_per_window * n_batches, -(-n // B)) if T > 1 else 0
    slots = np.zeros((n_passes, B), dtype=np.int64)
    used = np.zeros((n_passes, B), dtype=np.bool_)
    for row in range(B):
        known = np.flatnonzero(schedule.first[:, row])
        for start in range(0, n_passes, n_batches):  # once through all windows, and again
            turns = rng.permutation(known)[: n_passes - start]
            slots[start : start + len(turns), row] = turns
            used[start : start + len(turns), row] = True
    of = schedule.windows[slots, np.arange(B)]
    cuts = np.zeros((n_passes, B), dtype=np.int64)
    cuts[used] = _growing(_draw_cuts(T, int(used.sum()), rng), of[used])
    tokens = rng.integers(vocab_size, size=(n_passes, B, T), dtype=np.int32)
    for i, (batch, row) in enumerate(np.argwhere(used)):
        window, cut = windows[of[batch, row]], int(cuts[batch, row])
        tokens[batch, row, :cut] = window[:cut]
        suffix = tokens[batch, row, cut:]  # uniformly random so far
        if i % 3 == 1 and donors is not None and len(donors) > T:
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


def _growing(cuts: Ints, owners: Ints) -> Ints:
    """Return the cuts, put in order where several are of one window.

    Args:
        owners: whose cuts they are, in the order in which they will be asked for.
    """
    grown = np.empty_like(cuts)
    in_time = np.argsort(owners, kind="stable")  # by window, and then by time
    grown[in_time] = cuts[np.lexsort((cuts, owners))]  # by window, and then by length
    return grown


def _natural_suffix(known: Tokens, length: int, donors: Tokens, rng: np.random.Generator) -> Tokens:
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
    suffix: Tokens = donors[(start + np.arange(length)) % len(donors)]
    return suffix
