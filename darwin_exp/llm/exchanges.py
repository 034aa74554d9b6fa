"""Exchanges with language models: each question is asked once, and its answer is written down.

Reads: the journal's answers, reservations and failures; a recording, in replay.
Writes: the journal's "llm_reserved", "llm_failed" and "llm_answered" events.
Never: uses an answer before it is on disk, or asks before what it may cost is.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from darwin_exp.individual import ModelSpec
from darwin_exp.journal import Divergence, Journal
from darwin_exp.llm.choosing import Choosing
from darwin_exp.llm.failures import Failure, Fault, explained
from darwin_exp.llm.money import Money
from darwin_exp.llm.patience import Endpoint, Patience
from darwin_exp.llm.recording import Recording
from darwin_exp.llm.wire import Answer, Wire
from darwin_exp.protocols import (
    EditRequest,
    Event,
    Finish,
    Interrupted,
    ModelsUnavailable,
    Query,
    Reply,
    Stopped,
)

_TOKENS_AROUND_A_MESSAGE = 8  # its role, and where it begins and ends
_TOKENS_AROUND_A_SCHEMA = 32  # where it has to be told of in words
_OTHER_TOKENIZERS = 1.1  # may make so many times as many tokens of a prompt as ours
_HASH_SHOWN = 16


class Exchanges:
    """Asks language models within caps and remembers every answer; several slots may ask at once.

    Args:
        count_tokens: of a text; used for what is reserved, and where a server does not count.
        stopping: set once the run is to end.
        announce: tells people that an endpoint is down, and that it is back.
        outage: "stop" or "wait".
        recording: answers that take the place of the endpoints'; None asks live.
        deadline: of the run, in time.monotonic(); nobody waits for an endpoint past it.
    """

    def __init__(
        self,
        journal: Journal,
        wire: Wire,
        choosing: Choosing,
        money: Money,
        count_tokens: Callable[[str], int],
        stopping: threading.Event,
        announce: Callable[[str], None],
        outage: str,
        recording: Recording | None = None,
        patience: Patience | None = None,
        deadline: float = math.inf,
    ) -> None:
        self._deadline = deadline
        self._journal = journal
        self._wire = wire
        self._choosing = choosing
        self._money = money
        self._count = count_tokens
        self._stopping = stopping
        self._announce = announce
        self._waits = outage == "wait"
        self._recording = recording
        self._patience = patience or Patience()
        self._mutex = threading.Lock()
        self._endpoints: dict[str, Endpoint] = {}
        self._run = ""  # what tells it from all others
        for event in journal.events():
            money.follow(event)
            if event.kind == "llm_failed" and event.payload.get("refused"):
                reserved = journal.find("llm_reserved", event.key)
                if reserved is not None:
                    wire.learn(ModelSpec(**reserved.payload["model"]), event.payload["refused"])
        journal.listen(self._hear_of_budget, replay=False)

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the model that makes this edit, the same whenever it is asked again."""
        return self._choosing.choose(request)

    def ask(self, query: Query) -> Reply:
        """Return the answer, from the journal where the question was answered before.

        Raises:
            Stopped: a cap is reached, or the endpoint is down and the run shall not wait for it.
            ModelsUnavailable: the endpoint will not answer, however often it is asked.
            Interrupted: the run is stopping.
            Divergence: what was answered, here or in the recording, was another question.
        """
        prompt = prompt_sha256(query)
        obtain = self._live if self._recording is None else self._replay
        is_new = self._journal.find("llm_answered", query.key) is None
        event = self._journal.once(
            "llm_answered",
            query.key,
            lambda: obtain(query, prompt),
            given={"prompt_sha256": prompt, "model": asdict(query.model)},
        )
        if is_new:
            self._money.follow(event)
        told = event.payload
        return Reply(
            told["text"],
            Finish(told["finish"]),
            told["tokens_in"],
            told["tokens_out"],
            told["usd"],
        )

    def _hear_of_budget(self, event: Event) -> None:
        if event.kind == "budget":
            self._money.follow(event)

    # --- from a recording ------------------------------------------------------------------------

    def _replay(self, query: Query, prompt: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        assert self._recording is not None
        recorded = self._recording.answer(query.key)
        if recorded is None:
            raise Divergence(
                f"{self._recording.source}: no answer to {query.key} is recorded: this run has "
                "taken another course than the recorded one"
            )
        before = recorded.payload["prompt_sha256"]
        if before != prompt:
            raise Divergence(
                f"{self._recording.source}: {query.key} was recorded with another prompt "
                f"({before[:_HASH_SHOWN]}, and here {prompt[:_HASH_SHOWN]}); "
                f"{_first_difference(recorded.payload, query)}"
            )
        return recorded.payload, recorded.measured

    # --- from an endpoint ------------------------------------------------------------------------

    def _live(self, query: Query, prompt: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Ask until there is an answer, with patience; what cannot be mended raises."""
        question = _Question(query, prompt, self._tokens_in(query))
        endpoint = self._endpoint(query.model.base_url)
        n_tries = n_failed = n_pauses = 0
        is_prober = False  # the one slot that goes on trying while the endpoint is down
        try:
            while True:
                if not is_prober:
                    endpoint.wait_while_down(self._stopping)
                outcome = self._try(question)
                n_tries += 1
                if isinstance(outcome, Answer):
                    if is_prober:
                        self._announce(f"{query.model.base_url} answers again")
                    measured = {"seconds": outcome.seconds, "tries": n_tries}
                    return self._written(question, outcome), measured
                if outcome.fault is Fault.TURNED_DOWN:
                    self._announce(explained(outcome, query.model))
                    nothing = Answer("", Finish.REFUSED, 0, 0, "", 0.0)
                    return self._written(question, nothing), {"seconds": 0.0, "tries": n_tries}
                if outcome.is_final:
                    raise ModelsUnavailable(explained(outcome, query.model))
                if outcome.fault is Fault.FORMAT_REFUSED:
                    continue  # the wire has learned to do without
                n_failed += 1
                if not is_prober and self._patience.has_room_for(n_failed, outcome):
                    self._sleep(self._patience.pause(n_failed, outcome))
                    continue
                if outcome.fault is Fault.UNREADABLE:
                    raise ModelsUnavailable(explained(outcome, query.model))
                if not self._waits:
                    raise Stopped(
                        f"{explained(outcome, query.model)} (tries: {n_tries}); resume once it "
                        "is back, or with llm.outage=wait"
                    )
                if not is_prober:
                    is_prober = endpoint.begin_outage()
                    if not is_prober:
                        continue
                    self._announce(
                        f"{explained(outcome, query.model)}: waiting until it is back "
                        "(Ctrl-C stops the run, which can be resumed)"
                    )
                self._sleep(self._patience.outage_pause(n_pauses, outcome))
                n_pauses += 1
        finally:
            if is_prober:
                endpoint.end_outage()

    def _try(self, question: _Question) -> Answer | Failure:
        """Ask once: set aside what it may cost, write that down, ask, write down a failure."""
        if self._stopping.is_set():
            raise Interrupted
        query = question.query
        key, same = self._next_try(question)
        tokens = question.tokens_in + query.max_tokens
        usd = self._money.usd_of(query.model, question.tokens_in, query.max_tokens)
        self._money.reserve(key, tokens, usd)
        self._journal.append(
            "llm_reserved",
            key,
            {
                "individual_id": query.individual_id,
                "model": asdict(query.model),
                "prompt_sha256": question.prompt_sha256,
                "tokens": tokens,
                "usd": usd,
            },
        )
        began = time.monotonic()
        outcome = self._wire.try_once(query, self._idempotency_key(same), self._stopping)
        if isinstance(outcome, Failure):
            payload: dict[str, Any] = {
                "status": outcome.status,
                "kind": outcome.fault.value,
                "message": outcome.message,
            }
            if outcome.unknown:
                payload["unknown"] = True
            if outcome.refused:
                payload["refused"] = outcome.refused
            seconds = time.monotonic() - began
            event = self._journal.append("llm_failed", key, payload, {"seconds": seconds})
            self._money.follow(event)
        return outcome

    def _next_try(self, question: _Question) -> tuple[str, str]:
        """Return the key of the next try, numbered on through resumes, and what stays the same.

        Tries whose outcome nobody knows share an idempotency key with the one that follows them:
        a server that honours it charges for them once. After a failure that the server told of
        there is another, as such a server might repeat the failure.
        """
        name = question.query.key
        number = first_open = 0
        while self._journal.find("llm_reserved", f"{name}.{number}") is not None:
            failed = self._journal.find("llm_failed", f"{name}.{number}")
            number += 1
            if failed is not None and not (
                failed.payload.get("unknown") and failed.payload["status"] is None
            ):
                first_open = number
        return f"{name}.{number}", f"{name}.{first_open} {question.prompt_sha256}"

    def _idempotency_key(self, same: str) -> str:
        """Return a key that no other run uses, and every process of this one."""
        with self._mutex:
            if not self._run:
                first = self._journal.events()[0]  # a reservation at the latest
                self._run = f"{first.kind} {first.key} {first.written_at!r}"
        return hashlib.sha256(f"{self._run} {same}".encode()).hexdigest()

    def _written(self, question: _Question, answer: Answer) -> dict[str, Any]:
        """Return an answer as the journal keeps it."""
        query = question.query
        tokens_in, tokens_out = answer.tokens_in, answer.tokens_out
        if tokens_in is None:
            tokens_in = sum(self._count(message.text) for message in query.messages)
        if tokens_out is None:
            tokens_out = self._count(answer.text)
        return {
            "individual_id": query.individual_id,
            "purpose": query.purpose,
            "response_format": answer.response_format,
            "schema": None if query.schema is None else query.schema.get("title"),
            "messages": [[message.role, message.text] for message in query.messages],
            "max_tokens": query.max_tokens,
            "text": answer.text,
            "finish": answer.finish.value,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "usd": self._money.usd_of(query.model, tokens_in, tokens_out),
        }

    def _tokens_in(self, query: Query) -> int:
        """Return how many tokens a prompt has at most, whoever counts them."""
        n = sum(self._count(message.text) + _TOKENS_AROUND_A_MESSAGE for message in query.messages)
        if query.schema is not None:
            n += self._count(json.dumps(query.schema)) + _TOKENS_AROUND_A_SCHEMA
        return math.ceil(n * _OTHER_TOKENIZERS)

    def _endpoint(self, base_url: str) -> Endpoint:
        with self._mutex:
            return self._endpoints.setdefault(base_url, Endpoint())

    def _sleep(self, seconds: float) -> None:
        left = self._deadline - time.monotonic()
        if self._stopping.wait(max(0.0, min(seconds, left))):
            raise Interrupted
        if left <= seconds:
            raise Stopped("max_hours is reached, and an endpoint is waited for")


@dataclass(frozen=True)
class _Question:
    """A query, with what is worked out once for all its tries."""

    query: Query
    prompt_sha256: str
    tokens_in: int


def prompt_sha256(query: Query) -> str:
    """Return the hash over everything that an answer depends on."""
    asked = {
        "model": asdict(query.model),
        "messages": [[message.role, message.text] for message in query.messages],
        "schema": query.schema,
        "max_tokens": query.max_tokens,
    }
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _first_difference(recorded: Mapping[str, Any], query: Query) -> str:
    """Say in a few words where a recorded prompt and this one part."""
    for name, now in (("model", asdict(query.model)), ("max_tokens", query.max_tokens)):
        if recorded[name] != now:
            return f"the first difference: {name} {recorded[name]!r}, and here {now!r}"
    now_said = [[message.role, message.text] for message in query.messages]
    for number, (old, new) in enumerate(zip_longest(recorded["messages"], now_said), start=1):
        if old is None or new is None or old[0] != new[0]:
            return f"the first difference: message {number} is not in both, or of another role"
        lines = zip_longest(old[1].splitlines(), new[1].splitlines())
        for line, (before, here) in enumerate(lines, start=1):
            if before != here:
                return (
                    f"the first difference: message {number}, line {line}: {_quoted(before)}, "
                    f"and here {_quoted(here)}"
                )
    return "the messages are the same: the schema of the answer has changed, or a line's ending"


def _quoted(line: str | None) -> str:
    return "nothing" if line is None else repr(line if len(line) <= 80 else f"{line[:79]}…")
