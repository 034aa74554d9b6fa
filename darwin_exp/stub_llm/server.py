"""The server: OpenAI's wire protocol for chat completions, and faults on demand.

Reads: HTTP requests.
Writes: HTTP responses, and counts of what was asked and paid for.
Never: looks up a name, logs unless it is asked to, or runs what it is sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from darwin_exp.stub_llm.choosing import MODELS, Author
from darwin_exp.stub_llm.faults import Fault, Faults
from darwin_exp.stub_llm.protocol import (
    FORMATS,
    Body,
    completion_body,
    error_body,
    form_of,
    format_of,
    model_body,
)


@dataclass(frozen=True)
class Received:
    """A request for a completion as it came in.

    Attributes:
        headers: by their names in lower case.
        body: the parsed JSON object; empty where it was none.
    """

    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass(frozen=True)
class _Response:
    """What is sent back.

    Attributes:
        answer: name of the answer; empty for an error, which costs nothing.
        charge: what it is paid for under: the same for a repeated idempotency key.
    """

    status: int
    body: Body
    answer: str = ""
    charge: str = ""


class StubServer:
    """Serves completions on a thread of its own while it is entered as a context.

    Args:
        port: 0 takes a free one.
        faults: what goes wrong with a call, by its number; the first call is number 0.
        delay_seconds: waited before each completion.
        key: that requests must bear; None takes any and none.
        formats: response formats that are accepted; others are refused with status 400.
        log: gets a line for each request; None is silent.

    Attributes:
        requests: every request for a completion, faults included, in the order they came in.

    Raises:
        OSError: the port cannot be listened on.
    """

    def __init__(
        self,
        author: Author | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        faults: Faults | None = None,
        delay_seconds: float = 0.0,
        key: str | None = None,
        formats: Collection[str] = FORMATS,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.requests: list[Received] = []
        self.faults = faults
        self.delay_seconds = delay_seconds
        self.log = log
        self._author = author or Author()
        self._key = key
        self._formats = formats
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._stored: dict[str, _Response] = {}  # by idempotency key
        self._charged: set[str] = set()
        self._by_answer: Counter[str] = Counter()
        self._wire = _Wire((host, port), self)
        # Seldom asked whether to end, and then at once: `shutdown` waits for one such question.
        self._thread = threading.Thread(
            target=self._wire.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> StubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._wire.shutdown()
        self._thread.join()
        self._wire.server_close()
        self._wire.hang_up()

    @property
    def base_url(self) -> str:
        return f"http://{self._wire.server_name}:{self._wire.server_port}/v1"

    @property
    def paid(self) -> int:
        """Return how many completions were paid for: sent in full, each key once."""
        with self._mutex:
            return len(self._charged)

    def ledger(self) -> Body:
        """Return counts of calls, of paid completions, and of those by the answer's name."""
        with self._mutex:
            return {
                "calls": len(self.requests),
                "paid": len(self._charged),
                "by_answer": dict(sorted(self._by_answer.items())),
            }

    def receive(self, received: Received) -> int:
        """Take note of a call and return its number."""
        with self._mutex:
            self.requests.append(received)
            return len(self.requests) - 1

    def wait(self, seconds: float) -> None:
        if seconds > 0:
            self._closing.wait(seconds)

    def admits(self, headers: Mapping[str, str]) -> bool:
        return self._key is None or headers.get("authorization") == f"Bearer {self._key}"

    def respond(self, received: Received, number: int) -> _Response:
        """Return what a call gets; the same again for an idempotency key seen before."""
        if not self.admits(received.headers):
            return _WRONG_KEY
        if refused := self._objection(received.body):
            return refused
        key = received.headers.get("idempotency-key")
        if key is None:
            return self._written(received.body, f"call {number}")
        with self._mutex:
            if key not in self._stored:
                self._stored[key] = self._written(received.body, f"key {key}")
            return self._stored[key]

    def charge(self, response: _Response) -> bool:
        """Count a completion as paid for, unless it was before; return whether it is now."""
        with self._mutex:
            if not response.answer or response.charge in self._charged:
                return False
            self._charged.add(response.charge)
            self._by_answer[response.answer] += 1
            return True

    def refund(self, response: _Response) -> None:
        """Take back a charge for what was not sent in full."""
        with self._mutex:
            self._charged.discard(response.charge)
            self._by_answer -= Counter([response.answer])

    def _objection(self, body: Mapping[str, Any]) -> _Response | None:
        """Return an error for a request that cannot be answered."""
        model, messages = body.get("model"), body.get("messages")
        if not isinstance(model, str) or not model:
            return _error(400, "you must provide a model parameter", param="model")
        if model not in MODELS:
            told = f"The model `{model}` does not exist or you do not have access to it."
            return _error(404, told, code="model_not_found")
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        ):
            return _error(400, "messages must be a list of turns with roles", param="messages")
        if body.get("stream"):
            return _error(400, "this stub does not stream", param="stream")
        if format_of(body) not in self._formats:
            told = f"response_format {format_of(body)!r} is not supported with this model"
            return _error(400, told, param="response_format")
        return None

    def _written(self, body: Mapping[str, Any], charge: str) -> _Response:
        model, messages = body["model"], body["messages"]
        completion = self._author.answer(model, messages, form_of(body))
        digest = hashlib.sha256(json.dumps([model, messages]).encode()).hexdigest()
        return _Response(200, completion_body(completion, body, digest), completion.answer, charge)


def _error(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> _Response:
    return _Response(status, error_body(status, message, code, param))


_WRONG_KEY = _error(401, "Incorrect API key provided.", code="invalid_api_key")


class _Wire(ThreadingHTTPServer):
    """Listens, with a thread for every connection, all of which end with the server."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], stub: StubServer) -> None:
        self.stub = stub
        self._mutex = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The parent's would ask the resolver for the host's full name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._mutex:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._mutex:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep alive, whose threads wait for more."""
        with self._mutex:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is what some tests are about.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"  # connections are kept alive
    server_version = "darwin-stub"
    sys_version = ""
    disable_nagle_algorithm = True  # head and body leave in two packets
    server: _Wire

    def do_GET(self) -> None:
        stub, path = self.server.stub, self.path.partition("?")[0]
        if path == "/stub/ledger":
            self._send(200, stub.ledger())
        elif not stub.admits(self._lower_headers()):
            self._send(_WRONG_KEY.status, _WRONG_KEY.body)
        elif path == "/v1/models":
            self._send(200, {"object": "list", "data": [model_body(name) for name in MODELS]})
        elif (name := path.removeprefix("/v1/models/")) in MODELS:
            self._send(200, model_body(name))
        else:
            self._send(404, error_body(404, f"Unknown request URL: GET {path}."))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        raw = self.rfile.read(int(length)) if length.isdecimal() else b""
        path = self.path.partition("?")[0]
        if path == "/v1/chat/completions":
            self._complete(raw)
        else:
            self._send(404, error_body(404, f"Unknown request URL: POST {path}."))

    def _complete(self, raw: bytes) -> None:
        stub = self.server.stub
        body = _parsed(raw)
        received = Received(self._lower_headers(), body if body is not None else {})
        number = stub.receive(received)
        fault = (stub.faults(number) if stub.faults is not None else None) or Fault()
        stub.wait(stub.delay_seconds + fault.delay_seconds)
        if fault.hangs_up:
            self.close_connection = True
            return
        if fault.body is not None:
            self._send_bytes(fault.status, fault.body, fault)
            return
        if body is None:
            told = "We could not parse the JSON body of your request."
            self._send(400, error_body(400, told))
            return
        response = stub.respond(received, number)
        content = response.body
        if fault.change is not None and response.answer:
            content = fault.change(content)
        # Charged first: a client that has the answer may look into the ledger at once.
        is_new = stub.charge(response)
        sent = False
        try:
            sent = self._send(response.status, content, fault)
        finally:
            if is_new and not sent:
                stub.refund(response)

    def _lower_headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def _send(self, status: int, body: Body, fault: Fault | None = None) -> bool:
        return self._send_bytes(status, json.dumps(body).encode(), fault or Fault())

    def _send_bytes(self, status: int, body: bytes, fault: Fault) -> bool:
        """Send a response as far as a fault lets it; return whether all of it was sent."""
        self.send_response(status)
        self.send_header("Content-Type", fault.content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        part = body[: fault.cut_after]
        self.wfile.write(part)
        if len(part) < len(body):
            self.close_connection = True
            return False
        return True

    def log_message(self, format: str, *args: Any) -> None:
        if self.server.stub.log is not None:
            self.server.stub.log(f"{self.address_string()} {format % args}")

    def address_string(self) -> str:
        return str(self.client_address[0])  # without asking for its name


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None
