"""The wire: one try to ask a language model over HTTP, in the Chat Completions protocol.

Reads: the key of the endpoint, from the environment.
Writes: one request to the endpoint.
Never: tries again, spends without being told to, or lets an exception of the SDK out.

The only module that imports openai. Whatever goes wrong is returned as a `Failure`.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import ModelSpec
from darwin_exp.llm import failures, keys
from darwin_exp.llm.completions import read_completion, read_names
from darwin_exp.llm.failures import Failure, Fault
from darwin_exp.protocols import Finish, Interrupted, Query

if TYPE_CHECKING:
    from openai import OpenAI

CONNECT_SECONDS = 10.0
_LOOK_SECONDS = 0.1  # how long a stop may go unnoticed while an answer is awaited
_FORMATS = ("json_schema", "json_object", "text")


@dataclass(frozen=True)
class Answer:
    """One try that brought an answer.

    Attributes:
        tokens_in: as the server counted; None where it did not say.
        tokens_out: likewise.
        response_format: "json_schema", "json_object" or "text", as it was asked for.
        seconds: from the question to the end of the answer.
    """

    text: str
    finish: Finish
    tokens_in: int | None
    tokens_out: int | None
    response_format: str
    seconds: float


@dataclass(frozen=True)
class Dialect:
    """How one model wants to be asked.

    Attributes:
        token_limit: name of the parameter that limits an answer. The older name comes first: a
            server that does not know it says so, while one that does not know the newer name may
            pass over it in silence and answer without end.
    """

    response_format: str = _FORMATS[0]
    token_limit: str = "max_tokens"
    takes_temperature: bool = True

    def without(self, refused: str) -> Dialect:
        """Return the dialect that avoids what was refused; itself where it does already."""
        if refused == self.response_format and refused != _FORMATS[-1]:
            following = _FORMATS[_FORMATS.index(refused) + 1]
            return replace(self, response_format=following)
        if refused == "max_tokens":
            return replace(self, token_limit="max_completion_tokens")
        if refused == "temperature":
            return replace(self, takes_temperature=False)
        return self


class Wire:
    """Asks endpoints, each through a client that is kept, each model in its own dialect.

    Args:
        timeout_seconds: longest wait for one answer.
    """

    def __init__(self, timeout_seconds: float = 180.0) -> None:
        self._seconds = timeout_seconds
        self._mutex = threading.Lock()
        self._clients: dict[tuple[str, str], OpenAI] = {}
        self._dialects: dict[tuple[str, str], Dialect] = {}

    def try_once(
        self, query: Query, idempotency_key: str, stopping: threading.Event
    ) -> Answer | Failure:
        """Ask once and return the answer, or why there is none.

        Args:
            idempotency_key: the same for two tries that the server shall charge for once.

        Raises:
            Interrupted: the run is stopping; what becomes of the question is not waited for.
        """
        dialect = self._dialect(query.model)
        request = _request(query, dialect)
        headers = {"Idempotency-Key": idempotency_key}
        began = time.monotonic()
        # In a thread of its own: a blocking read cannot be interrupted, and is left to its fate.
        outcomes: queue.SimpleQueue[_Body | Failure] = queue.SimpleQueue()

        def ask() -> None:
            outcomes.put(
                self._call(
                    query.model,
                    lambda client: client.chat.completions.with_raw_response.create(
                        **request, extra_headers=headers
                    ),
                )
            )

        threading.Thread(target=ask, name=f"asks-{query.key}", daemon=True).start()
        outcome = self._await(outcomes, began, stopping)
        if isinstance(outcome, Failure):
            return self._adapted(query.model, outcome, request, dialect)
        completion = read_completion(outcome.text, outcome.headers)
        if isinstance(completion, Failure):
            return completion
        return Answer(
            completion.text,
            completion.finish,
            completion.tokens_in,
            completion.tokens_out,
            "text" if query.schema is None else dialect.response_format,
            time.monotonic() - began,
        )

    def names(self, model: ModelSpec) -> tuple[str, ...] | Failure:
        """Return the names of the models that an endpoint lists, which costs nothing."""
        outcome = self._call(model, lambda client: client.models.with_raw_response.list())
        return outcome if isinstance(outcome, Failure) else read_names(outcome.text)

    def learn(self, model: ModelSpec, refused: str) -> None:
        """Take note that a model's endpoint does not know a part of what it was sent."""
        with self._mutex:
            known = self._dialects.get(_address(model), Dialect())
            self._dialects[_address(model)] = known.without(refused)

    def _dialect(self, model: ModelSpec) -> Dialect:
        with self._mutex:
            return self._dialects.get(_address(model), Dialect())

    def _adapted(
        self, model: ModelSpec, failure: Failure, request: dict[str, Any], dialect: Dialect
    ) -> Failure:
        """Learn from a refused part; final where there was no such part, or no way without it."""
        if failure.fault is not Fault.FORMAT_REFUSED:
            return failure
        refused = failure.refused
        if refused in request:
            if refused == "response_format":
                refused = dialect.response_format
            self.learn(model, refused)
            return replace(failure, refused=refused)
        return replace(failure, fault=Fault.FATAL, is_final=True, refused="")

    def _await(
        self,
        outcomes: queue.SimpleQueue[_Body | Failure],
        began: float,
        stopping: threading.Event,
    ) -> _Body | Failure:
        # A server that sends a byte now and then never trips the client's own limit. That one
        # comes first where both would, since it knows how far the question got.
        deadline = began + self._seconds + 1.0
        while time.monotonic() < deadline:
            try:
                return outcomes.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if stopping.is_set():
                    raise Interrupted from None
        return failures.too_slow()

    def _call(self, model: ModelSpec, request: Callable[[OpenAI], Any]) -> _Body | Failure:
        problem = keys.problem_with_key(model)
        if problem is not None:
            return Failure(Fault.FATAL, problem, is_final=True)
        try:
            import openai
        except Exception as error:  # or whoever waits for this thread would wait in vain
            told = f"the openai package cannot be loaded: {failures.one_line(str(error))}"
            return Failure(Fault.FATAL, told, is_final=True)
        try:
            response = request(self._client(model)).http_response
            return _Body(keys.scrubbed(response.text, model), dict(response.headers))
        except openai.APIConnectionError as error:
            found = failures.of_transport(error.__cause__ or error)
        except openai.APIStatusError as error:
            body = keys.scrubbed(error.response.text, model)
            return failures.of_status(error.status_code, error.response.headers, body)
        except Exception as error:  # such as an address that cannot be read
            told = f"{type(error).__name__}: {failures.one_line(str(error))}"
            found = Failure(Fault.FATAL, told, is_final=True)
        return replace(found, message=keys.scrubbed(found.message, model))

    def _client(self, model: ModelSpec) -> OpenAI:
        import openai

        with self._mutex:
            address = (model.base_url, model.key_env)
            if address not in self._clients:
                # At INFO it would write a line for every request into the run's log.
                logging.getLogger("httpx2").setLevel(logging.WARNING)
                self._clients[address] = openai.OpenAI(
                    api_key=keys.key_of(model),
                    base_url=model.base_url,
                    timeout=openai.Timeout(
                        self._seconds, connect=min(CONNECT_SECONDS, self._seconds)
                    ),
                    max_retries=0,
                    # A kept connection may be closed by the server as the next question is sent,
                    # and nobody would know whether that one is charged for.
                    default_headers={"Connection": "close"},
                    # The environment's proxy cannot reach this machine's own servers.
                    http_client=openai.DefaultHttpxClient(
                        trust_env=not keys.is_loopback(model.base_url)
                    ),
                )
            return self._clients[address]


@dataclass(frozen=True)
class _Body:
    """A successful HTTP answer, without the key."""

    text: str
    headers: dict[str, str]


def _address(model: ModelSpec) -> tuple[str, str]:
    return model.base_url, model.name


def _request(query: Query, dialect: Dialect) -> dict[str, Any]:
    """Return what is sent: the question, put so that this model understands it."""
    messages = [{"role": message.role, "content": message.text} for message in query.messages]
    request: dict[str, Any] = {
        "model": query.model.name,
        "messages": messages,
        dialect.token_limit: query.max_tokens,
    }
    if query.model.temperature is not None and dialect.takes_temperature:
        request["temperature"] = query.model.temperature
    if query.schema is None:
        return request
    if dialect.response_format == "json_schema":
        request["response_format"] = {
            "type": "json_schema",
            "json_schema": {
                "name": str(query.schema.get("title", "answer")),
                "schema": dict(query.schema),
                "strict": True,
            },
        }
        return request
    if dialect.response_format == "json_object":
        request["response_format"] = {"type": "json_object"}
    told = (
        "Answer with one JSON object and nothing else. It keeps this JSON schema: "
        f"{json.dumps(query.schema)}"
    )
    # Into the first message where that is the system's: many chat templates allow only that one.
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{told}"
    else:
        messages.insert(0, {"role": "system", "content": told})
    return request
