"""A run's page, served for real on a free port, and a client that says exactly what it sends."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

from darwin_exp.hitl.inbox import FILE_NAME, Inbox
from darwin_exp.hitl.requests import Request, RequestType, ask
from darwin_exp.hitl.web import assemble, listen

FORM = "application/x-www-form-urlencoded"
PATCH = """individual g03-i01
parent g02-i00
genome abc

--- a/train.py
+++ b/train.py
@@ -1,3 +1,3 @@
 import torch
-rate = 0.001
+rate = 0.003
 steps = 10
"""


@dataclass(frozen=True)
class Answer:
    """What came back: its status, its headers by lower-case name, its body."""

    status: int
    headers: Mapping[str, str]
    text: str

    def fields(self, action: str, k: int = 0) -> dict[str, str]:
        """Return the hidden fields of the k-th form that is sent to an address."""
        forms = _Forms()
        forms.feed(self.text)
        found = [fields for where, fields in forms.found if where == action]
        assert len(found) > k, f"no form for {action} in {self.text[:2000]}"
        return dict(found[k])


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.found.append((told.get("action", ""), {}))
        if tag == "input" and told.get("type") == "hidden":
            self.found[-1][1][told["name"]] = told["value"]


class Served:
    """Serves a run's folder from another thread, until the block ends."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.inbox = Inbox(run_folder / FILE_NAME)
        self.cookie = ""

    def __enter__(self) -> Served:
        self._listener = listen("127.0.0.1", 0)
        self.port = int(self._listener.getsockname()[1])
        self.server, self.pages, self.door = assemble(self.run_folder, "127.0.0.1", self._listener)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )
        self._thread.start()
        wait_for(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        self.pages.live.close()
        assert not self._thread.is_alive()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    def enter(self) -> Served:
        """Use the link, as a browser would."""
        answer = self.send("GET", self.door.link.removeprefix(self.origin))
        assert answer.status == 200, answer
        self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return self

    def enter_again(self, cookie: str) -> Served:
        """Take up a session from the header that set its cookie."""
        self.cookie = cookie.partition(";")[0]
        return self

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> Answer:
        """Send one request; a header given as None is left out."""
        told: dict[str, str | None] = {"Host": self.host}
        if self.cookie:
            told["Cookie"] = self.cookie
        if body is not None:
            told |= {"Origin": self.origin, "Content-Type": FORM, "Content-Length": str(len(body))}
        told |= headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in told.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            found = connection.getresponse()
            text = found.read().decode("utf-8")
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, text)
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        """Look at a page."""
        return self.send("GET", path)

    def post(
        self,
        path: str,
        fields: Mapping[str, str],
        headers: Mapping[str, str | None] | None = None,
    ) -> Answer:
        """Send a form."""
        return self.send("POST", path, urlencode(fields).encode(), headers)

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return what comes back until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as line:
            line.sendall(data)
            found = b""
            while more := line.recv(1 << 16):
                found += more
            return found

    def ask(
        self,
        content: str = "wikitext-103, licence CC BY-SA 3.0, 500 MB",
        kind: RequestType = RequestType.DATASET,
        reason: str = "more text",
        asked_by: str = "g02-i01",
        run_id: str | None = None,
    ) -> Request:
        """Ask for something, as the run does."""
        request = Request(
            run_id or self.run_folder.name,
            kind,
            reason,
            "lower perplexity",
            content,
            asked_by,
            2,
            "g03-i01" if kind is RequestType.EDIT else None,
        )
        ask(self.inbox, request)
        return request


def wait_for(condition: object, seconds: float = 20.0) -> None:
    """Wait until a call returns something true."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
