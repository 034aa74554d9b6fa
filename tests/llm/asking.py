"""A scripted server on loopback that speaks the wire's protocol, and what asks it in tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from darwin_exp.individual import ModelSpec
from darwin_exp.journal import Journal
from darwin_exp.llm import Exchanges, Patience, Recording
from darwin_exp.llm.choosing import Own
from darwin_exp.llm.money import Money
from darwin_exp.llm.wire import Wire
from darwin_exp.protocols import Event, Message, Query, Reply

NAME = "tiny"
KEY = "g01-i01/0/0"
SCHEMA = {
    "title": "edits",
    "type": "object",
    "properties": {"summary": {"type": "string"}},
    "required": ["summary"],
    "additionalProperties": False,
}
# Five retries as by default, and no time lost.
FAST = Patience(first_seconds=0.001, longest_seconds=0.002, outage_seconds=0.02)


@dataclass(frozen=True)
class Say:
    """One answer of the server.

    Attributes:
        body: sent as JSON unless it is text.
        bytes_sent: of the body before the connection is cut; all where it is None.
        seconds: before it answers, unless the server is closed first.
        hangs_up: closes the connection without an answer.
        drips: sends a space now and then, for ever.
    """

    status: int = 200
    body: Any = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    bytes_sent: int | None = None
    seconds: float = 0.0
    hangs_up: bool = False
    drips: bool = False


def completion(text: str | None = "fine", finish: str = "stop", **message: Any) -> dict[str, Any]:
    """Return a chat completion of 10 tokens in and 5 out."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": NAME,
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def refusal(message: str, **more: Any) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": "invalid_request_error", **more}}


FINE = Say(body=completion())


@dataclass(frozen=True)
class Asked:
    """One request that the server got; names of headers are in small letters."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at: float  # time.time()

    @property
    def response_format(self) -> str | None:
        wanted = self.body.get("response_format")
        return None if wanted is None else str(wanted["type"])


class Server:
    """Answers from a script, whose last line is repeated, or as a function says.

    Attributes:
        asked: every question so far.
        models: what GET /models brings.
    """

    def __init__(
        self, script: Sequence[Say] | Callable[[Asked, int], Say] = (FINE,), port: int = 0
    ) -> None:
        self._script = script
        self._mutex = threading.Lock()
        self.closing = threading.Event()
        self.asked: list[Asked] = []
        self.models = Say(404, refusal("no such page"))
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                server.answer(self, server.note(self, body))

            def do_GET(self) -> None:
                server.answer(self, server.models)

            def log_message(self, *args: Any, **more: Any) -> None:
                """Say nothing."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any, **more: Any) -> None:
                """Say nothing of clients that have gone."""

        self._http = Quiet(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def note(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> Say:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._mutex:
            asked = Asked(handler.path, headers, body, time.time())
            self.asked.append(asked)
            n = len(self.asked) - 1
            if callable(self._script):
                return self._script(asked, n)
            return self._script[min(n, len(self._script) - 1)]

    def answer(self, handler: BaseHTTPRequestHandler, say: Say) -> None:
        self.closing.wait(say.seconds)
        handler.close_connection = True
        if say.hangs_up:
            return
        is_text = isinstance(say.body, str)
        body = (say.body if is_text else json.dumps(say.body)).encode()
        handler.send_response(say.status)
        handler.send_header("Content-Type", "text/html" if is_text else "application/json")
        if not say.drips:
            handler.send_header("Content-Length", str(len(body)))
        for name, value in say.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        while say.drips and not self.closing.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()
        handler.wfile.write(body[: say.bytes_sent])

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


class Run:
    """One process's part in a run: a journal, and exchanges that write into it.

    Attributes:
        said: what was announced to people.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        seconds: float = 20.0,
        money: Money | None = None,
        outage: str = "stop",
        recording: Recording | None = None,
        patience: Patience = FAST,
        temperature: float | None = None,
        key_env: str = "DARWIN_TEST_KEY",
    ) -> None:
        self.model = ModelSpec(NAME, url, temperature, key_env)
        self.journal = Journal(folder)
        self.money = money or Money(None, None, None, {})
        self.stopping = threading.Event()
        self.said: list[str] = []
        self.exchanges = Exchanges(
            self.journal,
            Wire(timeout_seconds=seconds),
            Own([(self.model, 1.0)]),
            self.money,
            count_words,
            self.stopping,
            self.said.append,
            outage,
            recording,
            patience,
        )

    def query(
        self,
        key: str = KEY,
        text: str = "Rewrite this.",
        *,
        schema: Mapping[str, Any] | None = SCHEMA,
        max_tokens: int = 50,
    ) -> Query:
        messages = (Message("system", "You write code."), Message("user", text))
        individual_id = key.partition("/")[0]
        return Query(key, individual_id, "draft", self.model, messages, schema, max_tokens)

    def ask(self, key: str = KEY, text: str = "Rewrite this.", **more: Any) -> Reply:
        return self.exchanges.ask(self.query(key, text, **more))

    def of_kind(self, kind: str) -> list[Event]:
        return self.journal.of_kind(kind)

    def failures(self) -> list[tuple[str, bool]]:
        """Return how each failed try failed, and whether its outcome is unknown."""
        failed = [event.payload for event in self.of_kind("llm_failed")]
        return [(payload["kind"], payload.get("unknown", False)) for payload in failed]

    def close(self) -> None:
        self.stopping.set()
        self.journal.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def count_words(text: str) -> int:
    """Count tokens as roughly as a test may."""
    return len(text.split())
