"""Tells people that something waits: by a command of theirs, or by a POST to an address of theirs.

Reads: requests.
Never: blocks a run, fails it, starts a shell, follows a redirect, or sends what was asked for
itself; only that something waits, of what kind, and where it can be read.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import IO
from urllib.parse import urlsplit

from darwin_exp.hitl.asked import Request

SECONDS = 10.0  # that a command or a server may take
MOST_WAITING = 100


class NotifyError(ValueError):
    """The command or the address cannot be used; the message names the key and the cure."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as what it is: an answer that is no success."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


class Notifier:
    """Passes on what waits, one at a time, on a thread of its own.

    Args:
        command: a program and its arguments, as in a shell but without one; it gets a JSON object
            on its standard input. Empty for none.
        url: an http or https address that gets the same object as the body of a POST. Empty for
            none.
        problem: told, in a sentence, of what could not be delivered.

    Raises:
        NotifyError: the command cannot be read, or the address is not of http or https.
    """

    def __init__(
        self,
        command: str = "",
        url: str = "",
        problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._command = _words(command)
        self._url = _checked(url)
        self._problem = problem
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None

    def tell(self, request: Request) -> None:
        """Let people know that a request waits; returns at once and never raises."""
        if not self._command and not self._url:
            return
        with self._mutex:
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="notify", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait(notice(request))
        except queue.Full:
            self._say("people were not told of a request: too many are waiting to be delivered")

    def close(self, seconds: float = SECONDS) -> None:
        """Wait at most so long until everything is delivered. Idempotent."""
        with self._mutex:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        deadline = time.monotonic() + seconds
        with suppress(queue.Full):
            self._waiting.put(None, timeout=seconds)
        thread.join(max(0.0, deadline - time.monotonic()))

    def _deliver(self) -> None:
        while (body := self._waiting.get()) is not None:
            for name, way, is_wanted in (
                ("hitl.notify_command", self._run, bool(self._command)),
                ("hitl.notify_url", self._post, bool(self._url)),
            ):
                if not is_wanted:
                    continue
                try:
                    why = way(body)
                except Exception as failure:  # whatever it is, a run must not end for it
                    why = type(failure).__name__
                if why:
                    self._say(f"{name}: people were not told of a request: {why}")

    def _run(self, body: bytes) -> str:
        """Run the command; return what went wrong, or nothing."""
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return error.strerror or "the command could not be started"
        with process:
            try:
                process.communicate(body, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):  # with all that it has started
                    os.killpg(process.pid, signal.SIGKILL)
                return f"the command took longer than {SECONDS:g} s and was ended"
        return f"the command ended with {process.returncode}" if process.returncode else ""

    def _post(self, body: bytes) -> str:
        """Send the POST; return what went wrong, or nothing. The address may hold a secret."""
        opener = urllib.request.build_opener(_NoRedirects)
        post = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with opener.open(post, timeout=SECONDS):
                return ""
        except urllib.error.HTTPError as answer:
            answer.close()
            return f"the server answered {answer.code}"
        except (OSError, http.client.HTTPException) as error:
            return f"the server was not reached ({type(error).__name__})"

    def _say(self, sentence: str) -> None:
        with suppress(Exception):
            self._problem(sentence)


def notice(request: Request) -> bytes:
    """Return what people are told: that something waits, and where it can be read."""
    told = {
        "run_id": request.run_id,
        "request_id": request.request_id,
        "type": request.type.value,
        "asked_by": request.asked_by,
        "generation": request.generation,
        "read_it": f"python -m darwin_exp.hitl --run {request.run_id} show {request.request_id}",
    }
    return json.dumps(told, sort_keys=True).encode()


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise NotifyError(f"hitl.notify_command: {error}; close every quote") from error


def _checked(url: str) -> str:
    if not url:
        return ""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # which is read, and may be no number, only here
    except ValueError as error:
        raise NotifyError(f"hitl.notify_url: {error}") from error
    odd = any(letter.isspace() or not letter.isprintable() for letter in url)
    if parts.scheme not in ("http", "https") or not host or odd:
        raise NotifyError("hitl.notify_url must be an address that begins with http:// or https://")
    return url
