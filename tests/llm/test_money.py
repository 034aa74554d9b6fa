"""Caps on what models cost, prices, and the estimate before a run begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import ModelSpec
from darwin_exp.llm.money import Money, Spend
from darwin_exp.protocols import Event, ModelsUnavailable, Stopped

FAR = ModelSpec("big", "https://models.invalid/v1")
NEAR = ModelSpec("small", "http://localhost:8000/v1")
PRICES = {"big": (2.0, 8.0)}


def event(kind: str, key: str, **payload: object) -> Event:
    return Event(1, kind, key, payload)


CALLS = st.lists(
    st.tuples(
        st.integers(1, 1000),  # tokens that are reserved
        st.floats(0.0, 1.0),  # share of them that is used
        st.sampled_from(["answered", "failed", "refused", "unknown", "never ends"]),
        st.integers(0, 5),  # how many calls are begun before this one ends
    ),
    max_size=30,
)


@given(calls=CALLS, cap=st.integers(0, 5000), by_dollars=st.booleans())
def test_f10_no_interleaving_of_calls_passes_a_cap(
    calls: list[tuple[int, float, str, int]], cap: int, by_dollars: bool
) -> None:
    money = Money(cap * 1e-6, None, None, {}) if by_dollars else Money(None, cap, None, {})
    written: list[Event] = []
    billed = 0
    under_way: list[tuple[int, Event]] = []

    def end(later: int) -> None:
        nonlocal billed
        for when, ending in list(under_way):
            if when <= later:
                under_way.remove((when, ending))
                written.append(ending)
                money.follow(ending)

    for n, (reserved, share, how, delay) in enumerate(calls):
        end(n)
        key, usd = f"g01-i{n:02d}/0/0", reserved * 1e-6
        try:
            money.reserve(f"{key}.0", reserved, usd)
        except Stopped:
            continue
        written.append(event("llm_reserved", f"{key}.0", tokens=reserved, usd=usd))
        used = int(reserved * share)
        ending = {
            "answered": event("llm_answered", key, tokens_in=used, tokens_out=0, usd=used * 1e-6),
            "failed": event("llm_failed", f"{key}.0", status=503),
            "refused": event("llm_failed", f"{key}.0", status=None),
            "unknown": event("llm_failed", f"{key}.0", status=None, unknown=True),
        }.get(how)
        # A server may charge for whatever it was asked and has not refused.
        billed += used if how in ("answered", "unknown", "never ends") else 0
        if ending is not None:
            under_way.append((n + delay, ending))
        assert billed <= cap
        spent = money.spent.usd * 1e6 if by_dollars else money.spent.tokens
        assert spent <= cap * (1 + 1e-6)
    end(len(calls) + 10)
    again = Money(None, None, None, {})  # as a resumed run does
    for one in written:
        again.follow(one)
    assert again.spent.tokens == money.spent.tokens
    assert again.spent.calls == money.spent.calls
    assert again.spent.usd == pytest.approx(money.spent.usd)


def test_f10_a_failed_call_counts_as_one_only_if_it_reached_a_server() -> None:
    money = Money(None, None, None, {})
    for n, status in enumerate([None, 503]):
        money.reserve(f"a/0/0.{n}", 10, None)
        money.follow(event("llm_failed", f"a/0/0.{n}", status=status))
    assert money.spent == Spend(calls=1)


def test_f10_what_a_cap_stops_is_named_with_what_is_spent() -> None:
    money = Money(None, 1_000_000, None, {})
    money.reserve("a/0/0.0", 900_000, None)
    with pytest.raises(Stopped, match=r"llm\.max_tokens=1000000: 900000 tokens .* 200000 more"):
        money.reserve("b/0/0.0", 200_000, None)
    assert money.spent.tokens == 900_000


def test_a_call_that_exactly_reaches_a_cap_is_made() -> None:
    money = Money(0.3, None, None, {})
    for n in range(3):
        money.reserve(f"a/0/{n}.0", 1, 0.1)
    with pytest.raises(Stopped):
        money.reserve("a/0/3.0", 1, 0.1)


def test_f10_a_cap_that_a_person_sets_while_the_run_goes_on_holds_from_then_on() -> None:
    money = Money(None, None, 2, PRICES)
    money.reserve("a/0.0", 10, 0.1)
    money.follow(capped("llm.max_calls", 1, configured=2))
    with pytest.raises(Stopped, match=r"llm\.max_calls=1"):
        money.reserve("b/0.0", 10, 0.1)
    money.follow(capped("llm.max_calls", 3, configured=2))
    money.reserve("b/0.0", 10, 0.1)
    money.follow(capped("max_hours", 1))
    money.follow(capped("llm.max_usd", 5.0))
    with pytest.raises(Stopped, match="no price"):
        money.reserve("c/0.0", 10, None)


def test_a_cap_that_is_configured_anew_wins_over_one_that_a_person_set_before() -> None:
    money = Money(None, None, 5, PRICES)
    money.follow(capped("llm.max_calls", 1, configured=2))
    money.reserve("a/0.0", 10, 0.1)
    money.reserve("b/0.0", 10, 0.1)


def capped(key: str, value: float, configured: float | None = None) -> Event:
    return Event(1, "budget", "7", {"key": key, "value": value, "configured": configured})


def test_prices_are_for_a_million_tokens_and_this_machine_is_free() -> None:
    money = Money(None, None, None, PRICES)
    assert money.usd_of(FAR, 500_000, 250_000) == pytest.approx(1.0 + 2.0)
    assert money.usd_of(NEAR, 500_000, 250_000) == 0.0
    assert money.usd_of(ModelSpec("other", FAR.base_url), 1, 1) is None
    assert Money(None, None, None, {"small": (1.0, 1.0)}).usd_of(NEAR, 1_000_000, 0) == 1.0


def test_a_cap_in_dollars_needs_every_price() -> None:
    other = ModelSpec("other", FAR.base_url)
    Money(None, None, None, {}).check_prices([FAR, other])
    Money(1.0, None, None, PRICES).check_prices([FAR, NEAR])
    with pytest.raises(ModelsUnavailable, match=r"price for other;.*'llm.prices=\{other: \["):
        Money(1.0, None, None, PRICES).check_prices([FAR, NEAR, other])


def test_a_mistyped_model_is_not_only_asked_for_its_price() -> None:
    prices = {"gpt-5-mini": (0.25, 2.0), "gpt-4o-mini": (0.15, 0.6), "gpt-5": (1.25, 10.0)}
    with pytest.raises(ModelsUnavailable, match=r"price for gpt-4o-mni \(or is gpt-4o-mini meant"):
        Money(1.0, None, None, prices).check_prices([ModelSpec("gpt-4o-mni", FAR.base_url)])
    with pytest.raises(ModelsUnavailable) as error:
        Money(1.0, None, None, prices).check_prices([ModelSpec("claude", FAR.base_url)])
    assert "meant" not in str(error.value)


def test_an_estimate_reaches_from_one_call_each_to_every_draft_of_every_repair() -> None:
    money = Money(None, None, None, {**PRICES, "small": (1.0, 1.0)})
    estimate = money.estimate(
        20, max_drafts=2, max_repairs=3, prompt_tokens=1000, answer_tokens=500, models=[FAR, NEAR]
    )
    assert estimate.calls == (20, 160)
    assert estimate.tokens == (30_000, 240_000)
    assert estimate.usd == pytest.approx((20 * 0.0015, 160 * 0.006))
    assert str(estimate) == "20 to 160 calls, 0.03 to 0.24 million tokens, 0.03 to 0.96 USD"


def test_an_estimate_counts_each_call_that_a_rewrite_in_chunks_takes() -> None:
    money = Money(None, None, None, PRICES)
    estimate = money.estimate(
        20,
        max_drafts=2,
        max_repairs=3,
        prompt_tokens=1000,
        answer_tokens=500,
        models=[FAR],
        calls_per_rewrite=5,
    )
    assert estimate.calls == (100, 320)  # a repair is one call


def test_an_estimate_says_where_it_knows_no_price_and_where_nothing_costs() -> None:
    money = Money(None, None, None, {})
    assert str(money.estimate(1, 1, 0, 10, 10, [FAR])).endswith("price unknown (llm.prices)")
    assert str(money.estimate(1, 1, 0, 10, 10, [NEAR])).endswith("free of charge")
