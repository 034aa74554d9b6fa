"""Money: what the run's calls have cost, and caps that hold however often it is resumed.

Reads: the journal's events of calls.
Never: lets a call begin that could pass a cap, or forgets one whose end nobody knows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from darwin_exp.individual import ModelSpec
from darwin_exp.llm.keys import is_loopback
from darwin_exp.protocols import Event, ModelsUnavailable, Stopped

MILLION = 1_000_000
_CAP = "llm.max_"  # what the caps' keys begin with
_ROUNDING = 1e-9  # three times 0.1 is not more than 0.3


@dataclass(frozen=True)
class Spend:
    """Dollars, tokens (in and out together) and calls: tries that reached a server."""

    usd: float = 0.0
    tokens: int = 0
    calls: int = 0

    def __add__(self, other: Spend) -> Spend:
        return Spend(self.usd + other.usd, self.tokens + other.tokens, self.calls + other.calls)


@dataclass(frozen=True)
class Estimate:
    """What a run's models may be asked and cost, if as little or as much is asked as can be.

    Attributes:
        usd: None where a model has no price.
    """

    calls: tuple[int, int]
    tokens: tuple[int, int]
    usd: tuple[float, float] | None

    def __str__(self) -> str:
        low, high = self.tokens
        told = (
            f"{self.calls[0]} to {self.calls[1]} calls, {low / MILLION:.2g} to "
            f"{high / MILLION:.2g} million tokens"
        )
        if self.usd is None:
            return f"{told}, price unknown (llm.prices)"
        if self.usd[1] == 0.0:
            return f"{told}, free of charge"
        return f"{told}, {self.usd[0]:.2f} to {self.usd[1]:.2f} USD"


class Money:
    """A fold over the journal's calls, with caps.

    A call is reserved at the most that it can cost before it is made, and settled at what it
    did cost. One whose end is not known, because the run was killed or the answer was cut off,
    stays counted at what was reserved.

    Args:
        max_usd: None for no cap; likewise the other two.
        prices: by a model's name, USD for a million tokens in and out.
    """

    def __init__(
        self,
        max_usd: float | None,
        max_tokens: int | None,
        max_calls: int | None,
        prices: Mapping[str, tuple[float, float]],
    ) -> None:
        self._configured: dict[str, float | None] = {
            "usd": max_usd,
            "tokens": max_tokens,
            "calls": max_calls,
        }
        self._caps = dict(self._configured)
        self._prices = dict(prices)
        self._mutex = threading.Lock()
        self._settled = Spend()
        self._reserved: dict[str, Spend] = {}  # by the try's key, while its end is not known
        self._last_try: dict[str, str] = {}  # by the query's key

    @property
    def spent(self) -> Spend:
        """Everything so far, calls that are under way and those without an end included."""
        with self._mutex:
            return self._spent()

    def reserve(self, key: str, tokens: int, usd: float | None) -> None:
        """Set aside what one try may cost at most.

        Raises:
            Stopped: with it, what is spent and set aside could pass a cap; nothing was set aside.
        """
        wanted = Spend(usd or 0.0, tokens, 1)
        with self._mutex:
            spent = self._spent()
            if usd is None and self._caps["usd"] is not None:  # a cap that was set while it ran
                raise Stopped(
                    f"llm.max_usd={_short(self._caps['usd'])} cannot be kept: a model has no "
                    "price; resume with llm.prices"
                )
            self._refuse_past_a_cap(spent, wanted)
            self._set_aside(key, wanted)

    def follow(self, event: Event) -> None:
        """Take in an event of the journal: a call, or a cap that a person has set."""
        payload = event.payload
        with self._mutex:
            if event.kind == "llm_reserved":
                reserved = Spend(payload["usd"] or 0.0, payload["tokens"], 1)
                self._set_aside(event.key, reserved)
            elif event.kind == "llm_failed" and not payload.get("unknown"):
                self._reserved.pop(event.key, None)
                if payload["status"] is not None:
                    self._settled += Spend(calls=1)
            elif event.kind == "llm_answered":
                self._reserved.pop(self._last_try.get(event.key, ""), None)
                tokens = payload["tokens_in"] + payload["tokens_out"]
                self._settled += Spend(payload["usd"] or 0.0, tokens, 1)
            elif event.kind == "budget" and payload["key"].startswith(_CAP):
                unit = payload["key"].removeprefix(_CAP)
                if payload["configured"] == self._configured[unit]:  # or that is newer
                    self._caps[unit] = payload["value"]

    def usd_of(self, model: ModelSpec, tokens_in: int, tokens_out: int) -> float | None:
        """Return what so many tokens cost; None where the model has no price."""
        price = self._price(model)
        if price is None:
            return None
        return (tokens_in * price[0] + tokens_out * price[1]) / MILLION

    def check_prices(self, models: Iterable[ModelSpec]) -> None:
        """Make sure that a cap in dollars can be kept.

        Raises:
            ModelsUnavailable: there is such a cap, and a model without a price.
        """
        if self._caps["usd"] is None:
            return
        unpriced = sorted({model.name for model in models if self._price(model) is None})
        if unpriced:
            example = ", ".join(f"{name}: [0.15, 0.6]" for name in unpriced)
            close = {near for name in unpriced for near in get_close_matches(name, self._prices, 1)}
            meant = f" (or is {', '.join(sorted(close))} meant?)" if close else ""
            raise ModelsUnavailable(
                f"llm.max_usd needs a price for {', '.join(unpriced)}{meant}; write it in USD for "
                f"a million tokens in and out, like this: 'llm.prices={{{example}}}'"
            )

    def estimate(
        self,
        n_individuals: int,
        max_drafts: int,
        max_repairs: int,
        prompt_tokens: int,
        answer_tokens: int,
        models: Sequence[ModelSpec],
        calls_per_rewrite: int = 1,
    ) -> Estimate:
        """Return what a run may ask and cost.

        The least is one draft for each individual, from the cheapest model; the most is every
        draft of it and of every repair, from the dearest.

        Args:
            prompt_tokens: of a prompt as it is to be expected; likewise `answer_tokens`.
            calls_per_rewrite: that the draft of a rewrite takes, as is to be expected. That of a
                repair takes one.
        """
        calls = (
            n_individuals * calls_per_rewrite,
            n_individuals * max_drafts * (calls_per_rewrite + max_repairs),
        )
        each = prompt_tokens + answer_tokens
        usd = [self.usd_of(model, prompt_tokens, answer_tokens) for model in models]
        priced = [one for one in usd if one is not None]
        known = bool(priced) and len(priced) == len(usd)
        return Estimate(
            calls,
            (calls[0] * each, calls[1] * each),
            (calls[0] * min(priced), calls[1] * max(priced)) if known else None,
        )

    def _price(self, model: ModelSpec) -> tuple[float, float] | None:
        free = (0.0, 0.0) if is_loopback(model.base_url) else None
        return self._prices.get(model.name, free)

    def _spent(self) -> Spend:
        return sum(self._reserved.values(), self._settled)

    def _set_aside(self, key: str, spend: Spend) -> None:
        self._reserved[key] = spend
        self._last_try[key.rpartition(".")[0]] = key

    def _refuse_past_a_cap(self, spent: Spend, wanted: Spend) -> None:
        for unit, shown in (("usd", "USD"), ("tokens", "tokens"), ("calls", "calls")):
            cap = self._caps[unit]
            before: float = getattr(spent, unit)
            more: float = getattr(wanted, unit)
            if cap is not None and before + more > cap * (1.0 + _ROUNDING):
                raise Stopped(
                    f"llm.max_{unit}={_short(cap)}: {_short(before)} {shown} are spent or set "
                    f"aside and the next call may need {_short(more)} more; resume with a higher "
                    f"llm.max_{unit}"
                )


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
