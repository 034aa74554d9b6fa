"""Models that read ahead are found, honest ones of every kind pass, and nobody is told too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.evaluation import integrity
from darwin_exp.evaluation.exchange import Refused
from darwin_exp.evaluation.integrity import (
    Schedule,
    check_causality,
    check_repeats,
    draw_prefixes,
    secret_generator,
)
from darwin_exp.individual import Evaluation, Reason, Status

Score = Callable[..., Evaluation]


def sharpen(model: Any) -> None:
    """Make the scores of attention so large that a finite mask is nothing beside them."""
    model.mixer.sharpness.fill_(1e6)


# --- real models, in the real sandbox -------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "attention",
        "rotary",
        "finite_mask",
        "convolution",
        "recurrent",
        "linear_attention",
        "running_mean",
    ],
)
def test_honest_architectures_pass(score: Score, kind: str) -> None:
    found = score(kind)
    assert (found.status, found.message) == (Status.OK, "")
    assert found.details["causality"]["n_positions"] > 48


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("unmasked", None, id="b7_mask_removed"),
        pytest.param("block_mean", None, id="b8_block_mean"),
        pytest.param("peek", None, id="b8_one_position_in_sixteen"),
        pytest.param("whisper", None, id="b8_a_little_of_the_next_token_everywhere"),
        pytest.param("peek_later", None, id="b20_honest_until_its_third_request"),
        pytest.param("circular", None, id="b9_circular_convolution"),
        pytest.param("reversed_convolution", None, id="b9_reversed_convolution"),
        pytest.param("finite_mask", sharpen, id="b10_learned_mask_bypass"),
        pytest.param("sequence_norm", None, id="b11_norm_over_time"),
        pytest.param("batch_mean", None, id="b11_mean_over_the_batch"),
    ],
)
def test_models_that_read_ahead_are_rejected(score: Score, kind: str, change: Any) -> None:
    found = score(kind, change)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.CAUSALITY)
    assert "reads ahead" in found.message
    assert "nats" in found.message
    assert not found.metrics


def test_b8_control_without_prefixes_the_leak_pays_and_passes(score: Score) -> None:
    """What rejects the leak above is the comparison with prefixes, and nothing else."""
    leaking = score("peek", evaluation={"n_prefixes": 0})
    honest = score("plain", evaluation={"n_prefixes": 0})
    assert leaking.status is Status.OK
    assert leaking.metrics["val_nats"] < honest.metrics["val_nats"] - 0.1


def test_b8_control_a_whisper_is_below_what_whole_prefixes_show(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the mean right before the cuts rejects it: neither the maximum nor the whole mean."""
    monkeypatch.setattr(integrity, "MEAN_TOLERANCE", 0.01)
    monkeypatch.setattr(integrity, "MIN_BAND_POSITIONS", 10**9)
    whispering, honest = score("whisper"), score("plain")
    assert whispering.status is Status.OK
    assert whispering.details["causality"]["max"] < integrity.MAX_TOLERANCE
    assert whispering.metrics["val_nats"] < honest.metrics["val_nats"] - 0.02


# --- laws -----------------------------------------------------------------------------------------


@given(
    n_windows=st.integers(1, 300),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_every_window_is_scheduled_and_marked_once(n_windows: int, rows: int, seed: int) -> None:
    schedule = Schedule.draw(n_windows, rows, np.random.default_rng(seed))
    n_batches, B = schedule.windows.shape
    assert rows >= B
    assert sorted(schedule.windows[schedule.first]) == list(range(n_windows))
    assert np.isin(schedule.windows, np.arange(n_windows)).all()
    assert n_batches * B >= n_windows + min(4, n_windows)  # some are sent twice
    answers = schedule.windows[:, :, None] * np.ones(3)
    assert np.array_equal(schedule.by_window(answers)[:, 0], np.arange(n_windows))
    check_repeats(schedule, answers)


@given(
    n_windows=st.integers(1, 80),
    context_length=st.integers(1, 40),
    rows=st.integers(1, 20),
    n=st.integers(0, 100),
    seed=st.integers(0, 2**32),
)
def test_no_prefix_is_followed_by_its_true_continuation(
    n_windows: int, context_length: int, rows: int, n: int, seed: int
) -> None:
    T, V = context_length, 50
    rng = np.random.default_rng(seed)
    windows = rng.integers(V, size=(n_windows, T + 1), dtype=np.int32)
    schedule = Schedule.draw(n_windows, rows, rng)
    prefixes = draw_prefixes(windows, schedule, n, V, rng)
    used = prefixes.cuts > 0
    assert prefixes.tokens.shape[1:] == (schedule.windows.shape[1], T)
    assert ((prefixes.tokens >= 0) & (prefixes.tokens < V)).all()
    assert len(set(prefixes.windows[used])) == used.sum()  # each window is used once
    if T > 1:
        n_repeats = int((~schedule.first).sum())
        assert used.sum() >= min(n, n_windows) - n_repeats
    for batch, row in np.argwhere(used):
        cut, window = prefixes.cuts[batch, row], windows[prefixes.windows[batch, row]]
        assert 1 <= cut < T
        assert np.array_equal(prefixes.tokens[batch, row, :cut], window[:cut])
        assert prefixes.tokens[batch, row, cut] != window[cut]
        # It is compared with its own window, which stands in the same row.
        slot = prefixes.slots[batch, row]
        assert schedule.windows[slot, row] == prefixes.windows[batch, row]
        assert schedule.first[slot, row]


def test_cuts_visit_every_position_before_any_comes_twice() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(9, size=(400, 65), dtype=np.int32)
    schedule = Schedule.draw(400, 70, rng)
    prefixes = draw_prefixes(windows, schedule, 64, 9, rng)
    cuts = prefixes.cuts[prefixes.cuts > 0]
    assert {1, 2, 62, 63} <= set(cuts)
    assert set(cuts) == set(range(1, 64))


def test_natural_continuations_come_from_windows_without_a_prefix() -> None:
    """A server that remembers all it saw still knows nothing of what follows a prefix."""
    rng = np.random.default_rng(0)
    T, n_windows = 16, 200
    windows = np.arange(n_windows * (T + 1), dtype=np.int32).reshape(n_windows, T + 1)
    schedule = Schedule.draw(n_windows, 32, rng)
    prefixes = draw_prefixes(windows, schedule, 60, windows.size, rng)
    natural = 0
    for batch, row in np.argwhere(prefixes.cuts > 0):
        suffix = prefixes.tokens[batch, row, prefixes.cuts[batch, row] :]
        if len(suffix) > 2 and (np.diff(suffix) == 1).all():
            natural += 1
            assert suffix[0] // (T + 1) not in prefixes.windows[prefixes.cuts > 0]
    assert natural > 5


def test_secrets_differ_by_purpose_and_repeat_by_key() -> None:
    draws = [
        secret_generator(key, purpose).integers(2**60)
        for key, purpose in ((b"a", "order"), (b"a", "order"), (b"a", "cuts"), (b"b", "order"))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


@pytest.mark.parametrize(
    ("size", "positions", "caught"),
    [(0.06, 1, True), (0.04, 1, False), (0.004, 10_000, True), (0.0005, 10_000, False)],
)
def test_rounding_is_tolerated_and_more_is_not(size: float, positions: int, caught: bool) -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(50, size=(100, 65), dtype=np.int32)
    schedule = Schedule.draw(100, 32, rng)
    prefixes = draw_prefixes(windows, schedule, 64, 50, rng)
    full = rng.normal(3, 1, size=(*schedule.windows.shape, 64))
    of_prefixes = full[prefixes.slots, np.arange(full.shape[1])]
    # Behind the cut anything may differ: the tokens do.
    behind = np.arange(64) >= prefixes.cuts[:, :, None]
    of_prefixes[behind] += 100.0
    before = np.argwhere(~behind)[:positions]
    of_prefixes[tuple(before.T)] += size
    if caught:
        with pytest.raises(Refused) as refused:
            check_causality(prefixes, of_prefixes, full)
        assert refused.value.reason is Reason.CAUSALITY
    else:
        assert check_causality(prefixes, of_prefixes, full).max == pytest.approx(size)


@pytest.mark.parametrize(("distance", "caught"), [(1, True), (2, True), (3, True), (40, False)])
def test_b8_a_small_difference_is_caught_where_it_is_regular(distance: int, caught: bool) -> None:
    """0.045 nats at one distance before every cut are nothing beside whole prefixes of 2000."""
    T = 2000
    rng = np.random.default_rng(0)
    windows = rng.integers(50, size=(100, T + 1), dtype=np.int32)
    schedule = Schedule.draw(100, 32, rng)
    prefixes = draw_prefixes(windows, schedule, 64, 50, rng)
    full = rng.normal(3, 1, size=(*schedule.windows.shape, T))
    of_prefixes = full[prefixes.slots, np.arange(full.shape[1])]
    of_prefixes[np.arange(T) == prefixes.cuts[:, :, None] - distance] += 0.045
    if caught:
        with pytest.raises(Refused, match=f"from {1 << (distance.bit_length() - 1)} to a cut"):
            check_causality(prefixes, of_prefixes, full)
    else:
        found = check_causality(prefixes, of_prefixes, full)
        assert found.worst_band == 32
        assert 0 < found.worst_band_mean < integrity.MEAN_TOLERANCE
