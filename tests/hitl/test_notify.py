"""People are told that something waits, and a run neither waits for that nor fails by it."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from darwin_exp.hitl import notify
from darwin_exp.hitl.asked import Request, RequestType
from darwin_exp.hitl.notify import Notifier, NotifyError, notice

SECRET = "hook-secret-9f3a"
REQUEST = Request(
    "261122-1200-a1b2",
    RequestType.SCRIPT,
    "needs\x1b[2J\na script",
    "",
    "print('exact content')",
    "g01-i02",
    1,
)


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach this machine's own servers without anybody's proxy."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Server:
    """An HTTP server that keeps what it is sent."""

    status: int = 200
    location: str = ""
    bodies: list[bytes] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            server.kinds.append(self.headers["Content-Type"])
            self.send_response(server.status)
            if server.location:
                self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/{SECRET}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def told(command: str = "", url: str = "") -> list[str]:
    """Tell of one request, wait until that is done, and return what went wrong."""
    problems: list[str] = []
    notifier = Notifier(command, url, problems.append)
    notifier.tell(REQUEST)
    notifier.close(30)
    return problems


def python(code: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-c", code, *arguments])


def test_a_command_gets_the_notice_on_its_standard_input(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    assert told(python(code, str(tmp_path / "a b.json"))) == []
    assert (tmp_path / "a b.json").read_bytes() == notice(REQUEST)


def test_an_address_gets_the_notice_as_the_body_of_a_post() -> None:
    with serving(Server()) as server:
        assert told(url=server.url) == []
    assert server.bodies == [notice(REQUEST)]
    assert server.kinds == ["application/json"]


def test_a_notice_says_what_waits_and_where_to_read_it_and_not_the_content() -> None:
    said = json.loads(notice(REQUEST))
    assert said["request_id"] == REQUEST.request_id
    assert "a script" not in notice(REQUEST).decode()  # nor an agent's own words
    assert said["read_it"].endswith(f"--run {REQUEST.run_id} show {REQUEST.request_id}")
    assert "exact content" not in notice(REQUEST).decode()


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    code = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    hostile = ["$(touch owned)", "; touch owned", "`touch owned`", "*"]
    assert told(python(code, str(tmp_path / "argv"), *hostile)) == []
    assert json.loads((tmp_path / "argv").read_text()) == hostile


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (python("raise SystemExit(3)"), "ended with 3"),
        ("/nowhere/at-all --now", "No such file"),
    ],
)
def test_a_command_that_fails_is_a_sentence(command: str, why: str) -> None:
    (problem,) = told(command)
    assert problem.startswith("hitl.notify_command: people were not told")
    assert why in problem


def test_a_command_that_hangs_is_ended_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(notify, "SECONDS", 1.0)
    inner = "import time, sys; time.sleep(4); open(sys.argv[1], 'w')"
    outer = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.argv[1]])"
    )
    (problem,) = told(python(outer, str(tmp_path / "alive")))
    assert "longer than 1 s" in problem
    time.sleep(4)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("status", [302, 307, 404, 500])
def test_a_server_that_does_not_take_it_is_a_sentence_without_the_address(status: int) -> None:
    with serving(Server()) as elsewhere, serving(Server(status, elsewhere.url)) as server:
        (problem,) = told(url=server.url)
    assert (
        problem
        == f"hitl.notify_url: people were not told of a request: the server answered {status}"
    )
    assert elsewhere.bodies == []  # no redirect is followed


def test_a_server_that_is_not_there_is_a_sentence_without_the_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        (problem,) = told(url=f"http://127.0.0.1:{taken.getsockname()[1]}/{SECRET}")
    assert "not reached" in problem
    assert SECRET not in problem


def test_telling_returns_at_once_while_a_server_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "SECONDS", 1.0)
    problems: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        notifier = Notifier(
            url=f"http://127.0.0.1:{silent.getsockname()[1]}/", problem=problems.append
        )
        began = time.monotonic()
        for _ in range(notify.MOST_WAITING + 20):
            notifier.tell(REQUEST)
        assert time.monotonic() - began < 0.5
        notifier.close(0.1)
    assert "too many" in problems[0]


def test_one_way_that_fails_does_not_hinder_the_other() -> None:
    with serving(Server()) as server:
        (problem,) = told(python("raise SystemExit(1)"), server.url)
    assert "notify_command" in problem
    assert len(server.bodies) == 1


def test_whoever_is_told_of_a_problem_may_fail_too() -> None:
    def fail(_: str) -> None:
        raise RuntimeError

    notifier = Notifier("/nowhere/at-all", problem=fail)
    notifier.tell(REQUEST)
    notifier.tell(REQUEST)
    notifier.close(10)


def test_nothing_is_started_where_nobody_wants_to_know() -> None:
    before = threading.active_count()
    notifier = Notifier()
    notifier.tell(REQUEST)
    assert threading.active_count() == before
    notifier.close()


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://a.test/x", "javascript:alert(1)", "a.test/x", "//a.test"),
        *("http://", "https:///x", "http://a.test:port/", "http://[::1", "http://a.test/\nX: y"),
    ],
)
def test_an_address_is_of_http_or_https(url: str) -> None:
    with pytest.raises(NotifyError, match=r"hitl\.notify_url"):
        Notifier(url=url)


def test_an_open_quote_is_found_at_the_start() -> None:
    with pytest.raises(NotifyError, match=r"hitl\.notify_command.*quot"):
        Notifier("notify-send 'DARWIN")
