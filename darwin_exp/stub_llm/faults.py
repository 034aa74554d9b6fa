"""What may go wrong on the wire, as a script for one call.

Reads: nothing.
Writes: nothing.
Never: decides when it happens; the server asks for every call by its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from darwin_exp.stub_llm.protocol import Body, error_body

Faults = Callable[[int], "Fault | None"]


@dataclass(frozen=True)
class Fault:
    """What happens to one call.

    Attributes:
        status: of the response; 200 with no `body` gives an answer.
        headers: sent beside the usual ones.
        body: sent in the place of an answer, which is then neither written nor paid for.
        content_type: of that body.
        delay_seconds: waited before anything is sent.
        cut_after: bytes of the body after which the connection is closed; None sends all of them.
        hangs_up: whether the connection is closed before anything is sent.
        change: makes another response body out of the one that was about to be sent.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = "application/json"
    delay_seconds: float = 0.0
    cut_after: int | None = None
    hangs_up: bool = False
    change: Callable[[Body], Body] | None = None

    @classmethod
    def error(
        cls, status: int, message: str = "", code: str | None = None, **headers: str
    ) -> Fault:
        """Return an error in the protocol's own shape; `Retry_After="1"` gives that header."""
        told = message or f"the stub was told to answer {status}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, named, json.dumps(error_body(status, told, code)).encode())

    @classmethod
    def html(cls, status: int = 200) -> Fault:
        """Return a page such as a proxy puts in the place of an answer."""
        page = b"<!doctype html>\n<html><title>Sign in</title><body>Please sign in.</body></html>\n"
        return cls(status, body=page, content_type="text/html; charset=utf-8")

    @classmethod
    def garbage(cls) -> Fault:
        """Return a body that says it is JSON, and is not."""
        return cls(body=b'{"id": "chatcmpl-stub", "choices": [{"index": 0, "mess')

    @classmethod
    def no_choices(cls) -> Fault:
        return cls(change=lambda body: {**body, "choices": []})

    @classmethod
    def cut(cls, after: int = 40) -> Fault:
        """Return a response that breaks off after so many bytes of its body."""
        return cls(cut_after=after)

    @classmethod
    def hang_up(cls) -> Fault:
        return cls(hangs_up=True)

    @classmethod
    def slow(cls, seconds: float) -> Fault:
        return cls(delay_seconds=seconds)

    @classmethod
    def ends(cls, finish_reason: str) -> Fault:
        """Return an answer that ends as "length" (with half of its text) or "content_filter"."""

        def change(body: Body) -> Body:
            text = body["choices"][0]["message"]["content"] or ""
            kept = text[: len(text) // 2] if finish_reason == "length" else None
            return _with_choice(body, finish_reason, content=kept, refusal=None)

        return cls(change=change)

    @classmethod
    def refuses(cls, words: str = "I'm sorry, but I can't help with that.") -> Fault:
        """Return a refusal in the message's own field for it."""
        return cls(change=lambda body: _with_choice(body, "stop", content=None, refusal=words))


NAMED_FAULTS: Mapping[str, Callable[[], Fault]] = {
    "429": lambda: Fault.error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After="1"),
    "500": lambda: Fault.error(500),
    "503": lambda: Fault.error(503, "The engine is currently overloaded"),
    "cut": Fault.cut,
    "hang_up": Fault.hang_up,
    "html": Fault.html,
    "garbage": Fault.garbage,
    "no_choices": Fault.no_choices,
    "length": lambda: Fault.ends("length"),
    "content_filter": lambda: Fault.ends("content_filter"),
    "refusal": Fault.refuses,
}


def every_so_often(script: str) -> Faults:
    """Return the faults of a script such as "429/10,cut/25": one 429 in ten, one cut in 25.

    Raises:
        ValueError: it names no fault, or no whole number from 1 on.
    """
    rates: list[tuple[str, int]] = []
    for part in script.split(","):
        name, _, rate = part.strip().partition("/")
        if name not in NAMED_FAULTS:
            raise ValueError(f"{name!r} is no fault; there are {', '.join(NAMED_FAULTS)}")
        if not rate.isdecimal() or int(rate) < 1:
            raise ValueError(f"{part.strip()!r} does not say in how many calls: {name}/10")
        rates.append((name, int(rate)))

    def fault_of(number: int) -> Fault | None:
        due = [name for name, rate in rates if number % rate == rate - 1]
        return NAMED_FAULTS[due[0]]() if due else None

    return fault_of


def _with_choice(body: Body, finish_reason: str, **message: str | None) -> Body:
    choice = body["choices"][0]
    said = {**choice["message"], **message}
    return {**body, "choices": [{**choice, "message": said, "finish_reason": finish_reason}]}
