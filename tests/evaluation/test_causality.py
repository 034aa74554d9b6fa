"""Models that read ahead are found, and nobody is told too much; test_zoo.py has many more."""

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
    check_causality,
    check_order,
    check_repeats,
    check_unprobed,
)
from darwin_exp.evaluation.questions import (
    MIN_PREFIXES,
    Prefixes,
    Schedule,
    draw_prefixes,
    draw_second_pass,
    secret_generator,
)
from darwin_exp.individual import Evaluation, Reason, Status

Score = Callable[..., Evaluation]


def sharpen(model: Any) -> None:
    """Make the scores of attention so large that a finite mask is nothing beside them."""
    model.mixer.sharpness.fill_(1e6)


# --- real models, in the real sandbox -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param("unmasked", None, id="b7_mask_removed"),
        pytest.param("block_mean", None, id="b8_block_mean"),
        pytest.param("peek", None, id="b8_one_position_in_sixteen"),
        pytest.param("whisper", None, id="b8_a_little_of_the_next_token_everywhere"),
        pytest.param("circular", None, id="b9_circular_convolution"),
        pytest.param("reversed_convolution", None, id="b9_reversed_convolution"),
        pytest.param("finite_mask", sharpen, id="b10_learned_mask_bypass"),
        pytest.param("sequence_norm", None, id="b11_norm_over_time"),
    ],
)
def test_models_that_read_ahead_are_rejected(score: Score, kind: str, change: Any) -> None:
    found = score(kind, change)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.CAUSALITY)
    assert "reads ahead" in found.message
    assert "nats" in found.message
    assert not found.metrics


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("dropout", id="b14_random_numbers"),
        pytest.param("memory", id="b14_memory_of_what_was_asked"),
        pytest.param("peek_later", id="b20_honest_until_its_third_request"),
        pytest.param("batch_mean", id="b11_mean_over_the_batch"),
    ],
)
def test_what_answers_differently_is_not_said_to_read_ahead(score: Score, kind: str) -> None:
    found = score(kind)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.NONDETERMINISM)
    assert "in another order and beside others" in found.message
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
    cuts_per_window=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_no_prefix_is_followed_by_its_true_continuation(
    n_windows: int, context_length: int, rows: int, n: int, cuts_per_window: int, seed: int
) -> None:
    T, V = context_length, 50
    rng = np.random.default_rng(seed)
    windows = rng.integers(V, size=(n_windows, T + 1), dtype=np.int32)
    schedule = Schedule.draw(n_windows, rows, rng)
    donors = rng.integers(V, size=500, dtype=np.int32)
    prefixes = draw_prefixes(windows, schedule, n, V, rng, donors, cuts_per_window)
    used = prefixes.cuts > 0
    assert prefixes.tokens.shape[1:] == (schedule.windows.shape[1], T)
    assert ((prefixes.tokens >= 0) & (prefixes.tokens < V)).all()
    times_used = np.bincount(prefixes.windows[used], minlength=n_windows)
    assert times_used.max() <= max(cuts_per_window, -(-min(n, MIN_PREFIXES) // n_windows))
    if T > 1:
        n_repeats = int((~schedule.first).sum())
        assert used.sum() >= min(n, n_windows) - n_repeats
        if n_repeats == 0:
            assert used.sum() >= min(n, MIN_PREFIXES)
    for batch, row in np.argwhere(used):
        cut, window = prefixes.cuts[batch, row], windows[prefixes.windows[batch, row]]
        assert 1 <= cut < T
        assert np.array_equal(prefixes.tokens[batch, row, :cut], window[:cut])
        assert prefixes.tokens[batch, row, cut] != window[cut]
        # It is compared with its own window, which stands in the same row.
        slot = prefixes.slots[batch, row]
        assert schedule.windows[slot, row] == prefixes.windows[batch, row]
        assert schedule.first[slot, row]


@given(
    n_windows=st.integers(1, 60),
    context_length=st.integers(2, 24),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_what_follows_a_prefix_was_never_sent_before_it_is_answered(
    n_windows: int, context_length: int, rows: int, seed: int
) -> None:
    """Where a window is cut again, a longer prefix tells what followed a shorter one."""
    T = context_length
    rng = np.random.default_rng(seed)
    # No token stands in two places, so that each that was sent is known by itself.
    windows = np.arange(n_windows * (T + 1), dtype=np.int32).reshape(n_windows, T + 1)
    schedule = Schedule.draw(n_windows, rows, rng)
    prefixes = draw_prefixes(windows, schedule, 10**6, 1, rng, cuts_per_window=5)
    sent: set[int] = set()
    for tokens, owners, cuts in zip(prefixes.tokens, prefixes.windows, prefixes.cuts, strict=True):
        sent.update(tokens[cuts > 0].ravel().tolist())
        for window, cut in zip(owners[cuts > 0], cuts[cuts > 0], strict=True):
            assert sent.isdisjoint(windows[window, cut:].tolist())
    n_cuts = np.bincount(prefixes.windows[prefixes.cuts > 0], minlength=n_windows)
    assert (n_cuts == max(5, -(-MIN_PREFIXES // n_windows))).all()


def test_few_windows_are_cut_so_often_that_leaks_have_no_room() -> None:
    """As where a model of long contexts and many tokens leaves room for ten windows."""
    rng = np.random.default_rng(0)
    windows = rng.integers(50, size=(10, 1025), dtype=np.int32)
    schedule = Schedule.draw(10, 1, rng)
    prefixes = draw_prefixes(windows, schedule, 256, 50, rng)
    assert prefixes.n >= MIN_PREFIXES
    assert len(set(prefixes.cuts[prefixes.cuts > 0])) > 50


def test_cuts_visit_every_position_before_any_comes_twice() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(9, size=(400, 65), dtype=np.int32)
    schedule = Schedule.draw(400, 70, rng)
    prefixes = draw_prefixes(windows, schedule, 64, 9, rng)
    cuts = prefixes.cuts[prefixes.cuts > 0]
    assert {1, 2, 62, 63} <= set(cuts)
    assert set(cuts) == set(range(1, 64))


def test_a_window_is_cut_twice_only_when_all_were_cut_once() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(9, size=(96, 65), dtype=np.int32)
    schedule = Schedule.draw(96, 50, rng)  # two batches of 50 rows
    for n, most in ((50, 1), (100, 1), (150, 2), (10**6, 3)):
        prefixes = draw_prefixes(windows, schedule, n, 9, rng, cuts_per_window=3)
        n_cuts = np.bincount(prefixes.windows[prefixes.cuts > 0], minlength=96)
        assert n_cuts.max() == most
        if n >= 100:
            assert n_cuts.min() >= 1


def test_natural_continuations_come_from_the_text_that_everybody_was_shown() -> None:
    """A server that remembers all it saw still knows nothing of what follows a prefix."""
    rng = np.random.default_rng(0)
    T, n_windows = 16, 200
    windows = np.arange(n_windows * (T + 1), dtype=np.int32).reshape(n_windows, T + 1)
    donors = windows.size + np.arange(1_000, dtype=np.int32)
    schedule = Schedule.draw(n_windows, 32, rng)
    prefixes = draw_prefixes(windows, schedule, 60, 10**6, rng, donors)
    natural = 0
    for batch, row in np.argwhere(prefixes.cuts > 0):
        suffix = prefixes.tokens[batch, row, prefixes.cuts[batch, row] :]
        if len(suffix) > 2 and np.isin(np.diff(suffix), (1, -999)).all():
            natural += 1
            assert np.isin(suffix, donors).all()
    assert natural > 5


def test_a_continuation_in_natural_language_begins_as_the_text_does_elsewhere() -> None:
    """It follows the same two tokens, where these stand, and is another one than here."""
    rng = np.random.default_rng(0)
    donors = np.tile(np.array([1, 2, 3, 1, 2, 4], dtype=np.int32), 50)
    windows = np.tile(np.array([1, 2, 3, 1, 2, 3, 1, 2, 3], dtype=np.int32), (30, 1))
    schedule = Schedule.draw(30, 10, rng)
    prefixes = draw_prefixes(windows, schedule, 10**6, 10**6, rng, donors, cuts_per_window=5)
    firsts = np.concatenate([prefixes.tokens[prefixes.cuts == cut, cut] for cut in (2, 5)])
    assert 3 not in firsts
    assert 4 in firsts


# --- what nobody probed ---------------------------------------------------------------------------


NONE = np.empty((0, 4), dtype=np.int64)


def probed(n_windows: int, rng: np.random.Generator) -> tuple[Prefixes, np.ndarray[Any, Any]]:
    """Return prefixes, and losses as text has them: some windows are harder, and early places."""
    T = 64
    windows = rng.integers(50, size=(n_windows, T + 1), dtype=np.int32)
    prefixes = draw_prefixes(windows, Schedule.draw(n_windows, 32, rng), 256, 50, rng)
    hard = rng.normal(0.0, 0.3, size=(n_windows, 1))
    early = 2.0 / (1.0 + np.arange(T))
    return prefixes, 2.0 + hard + early + rng.exponential(1.0, size=(n_windows, T))


@pytest.mark.parametrize("n_windows", [300, 1_000])
def test_an_honest_model_loses_as_much_where_nobody_looked(n_windows: int) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prefixes, nats = probed(n_windows, rng)
        found = check_unprobed(prefixes, NONE, nats, rng)
        assert abs(found.z) < 4.5
        assert abs(found.less) < 0.2
        assert found.n_positions > 5_000


def test_b14_whoever_knows_where_it_was_probed_gives_itself_away() -> None:
    rng = np.random.default_rng(0)
    prefixes, nats = probed(400, rng)
    cuts = np.zeros(len(nats), dtype=int)
    used = prefixes.cuts > 0
    cuts[prefixes.windows[used]] = prefixes.cuts[used]
    elsewhere = np.arange(nats.shape[1]) >= cuts[:, None]
    with pytest.raises(Refused, match="where it was not probed") as refused:
        check_unprobed(prefixes, NONE, nats - 0.4 * elsewhere, rng)
    assert refused.value.reason is Reason.CAUSALITY
    found = check_unprobed(prefixes, NONE, nats - 0.4, rng)  # the control: it is better everywhere
    assert abs(found.z) < 4.5


def test_windows_that_the_first_server_knows_in_full_tell_nothing() -> None:
    """Whoever cheats is honest in those, which would hide what it does elsewhere."""
    rng = np.random.default_rng(0)
    prefixes, nats = probed(400, rng)
    told = rng.permutation(400)[:200].reshape(2, 100)
    cuts = np.zeros(len(nats), dtype=int)
    used = prefixes.cuts > 0
    cuts[prefixes.windows[used]] = prefixes.cuts[used]
    elsewhere = np.arange(nats.shape[1]) >= cuts[:, None]
    elsewhere[told.ravel()] = False
    leaking = nats - 0.5 * elsewhere
    assert check_unprobed(prefixes, told, nats, rng).n_positions > 0
    with pytest.raises(Refused, match="where it was not probed"):
        check_unprobed(prefixes, told, leaking, rng)
    assert check_unprobed(prefixes, np.arange(400), nats, rng).n_positions == 0


def test_where_nothing_was_probed_there_is_nothing_to_compare() -> None:
    rng = np.random.default_rng(0)
    prefixes, nats = probed(300, rng)
    none = Prefixes(prefixes.tokens, prefixes.windows, 0 * prefixes.cuts, prefixes.slots)
    assert check_unprobed(none, NONE, nats, rng).n_positions == 0


# --- two passes -----------------------------------------------------------------------------------


@given(
    n_windows=st.integers(1, 300),
    rows=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.01, 0.25, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_a_second_pass_sends_each_window_once_more_in_its_own_row(
    n_windows: int, rows: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    schedule = Schedule.draw(n_windows, rows, rng)
    n_batches, B = schedule.windows.shape
    slots = draw_second_pass(schedule, share, rng)
    assert slots.shape[1] == B
    assert len(slots) <= n_batches
    if share == 0:
        assert len(slots) == 0
    else:
        assert slots.size >= min(64, n_batches // 2 * B)
        assert len(slots) >= share * n_batches
    for row in range(B):
        assert len(set(slots[:, row])) == len(slots)
    nats = rng.normal(size=(n_batches, B, 3))
    assert check_order(slots, nats[slots, np.arange(B)], nats).max == 0.0


def test_a_second_pass_has_another_order_and_other_neighbours() -> None:
    rng = np.random.default_rng(0)
    schedule = Schedule.draw(200, 16, rng)
    slots = draw_second_pass(schedule, 1.0, rng)
    assert all(len(set(batch)) > 4 for batch in slots)
    assert (slots != np.arange(len(slots))[:, None]).mean() > 0.8


@pytest.mark.parametrize(("size", "positions", "caught"), [(0.06, 1, True), (0.04, 1, False)])
def test_b14_one_answer_that_changed_between_two_passes_is_caught(
    size: float, positions: int, caught: bool
) -> None:
    rng = np.random.default_rng(0)
    schedule = Schedule.draw(100, 16, rng)
    slots = draw_second_pass(schedule, 1.0, rng)
    full = rng.normal(3, 1, size=(*schedule.windows.shape, 64))
    again = full[slots, np.arange(slots.shape[1])].copy()
    again[0, 0, :positions] += size
    if caught:
        with pytest.raises(Refused, match="in another order") as refused:
            check_order(slots, again, full)
        assert refused.value.reason is Reason.NONDETERMINISM
    else:
        assert check_order(slots, again, full).max == pytest.approx(size)


# --- tolerances -----------------------------------------------------------------------------------


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
