"""How the engine is called: what silence and failure mean, in our own words, and what is repeated.

Reads: what the engine answers.
Writes: whatever the call that it is given does.
Never: waits without a limit, or lets an exception of docker-py or of the HTTP library below it
reach a caller.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from docker.errors import DockerException

from darwin_exp.protocols import InfrastructureFailure, SandboxUnavailable
from darwin_exp.sandbox import archive

CALL_SECONDS = 20.0  # of silence, after which a call has failed
KNOCK_SECONDS = 5.0
TRIES = 3  # of calls that may be repeated, where they fail at once
RETRY_SECONDS = 0.2
FAILED_AT_ONCE_SECONDS = 2.0
MAX_HEAD_BYTES = 1 << 14

T = TypeVar("T")


class EngineUnavailable(SandboxUnavailable):
    """No engine can be used here; the message names the cure."""


class EngineFailure(InfrastructureFailure):
    """The engine did not do what it was asked to.

    Attributes:
        status: of its HTTP answer; None where none came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class NotThere(EngineFailure):
    """The engine knows no such image, container, volume or file."""


def knock(path: str) -> None:
    """Find out why an engine cannot be reached, in words for those who can mend it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.settimeout(KNOCK_SECONDS)
        try:
            door.connect(path)
        except PermissionError as error:
            raise EngineUnavailable(
                f"no permission on the container engine's socket {path}; join its group (as root: "
                "usermod -aG docker USER), then log in again"
            ) from error
        except OSError as error:
            raise EngineUnavailable(
                f"no container engine answers at {path} ({error.strerror or error}); install one "
                "(apt-get install docker.io) and start it, or set DOCKER_HOST"
            ) from error


class Calls:
    """The calls to one engine, each with its limit."""

    def __init__(self, client: Any, path: str) -> None:
        """Keep what reaches it.

        Args:
            client: docker-py's.
            path: of the engine's socket.
        """
        self._client = client
        self._path = path

    def once(self, what: str, call: Callable[[], T]) -> T:
        """Make a call, and tell of its failure in our words.

        Raises:
            EngineFailure: it failed; NotThere where what it is about does not exist.
        """
        try:
            return call()
        except (DockerException, OSError) as error:
            raise _failure(what, error) from error

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Make a call that changes nothing, again where the engine stumbled over it."""
        for left in reversed(range(TRIES)):
            began = time.monotonic()
            try:
                return self.once(what, call)
            except EngineFailure as failure:
                may_pass = failure.status is None or failure.status >= 500
                at_once = time.monotonic() - began < FAILED_AT_ONCE_SECONDS
                if not (left and may_pass and at_once):
                    raise
            time.sleep(RETRY_SECONDS)
        raise AssertionError("the last try returned or raised")

    def do(
        self,
        what: str,
        method: str,
        path: str,
        seconds: float,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        """Make a request for what it does, and not for what it answers."""
        self.once(what, lambda: self.request(method, path, parameters, seconds))

    def request(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str] | None = None,
        seconds: float = CALL_SECONDS,
        stream: bool = False,
    ) -> Any:
        """Speak to the engine where docker-py's own method would wait for longer."""
        response = self._client.request(
            method,
            f"{self._client.base_url}/v{self._client.api_version}{path}",
            params=parameters,
            headers={"Accept-Encoding": "identity"},
            stream=stream,
            timeout=seconds,
        )
        response.raise_for_status()
        return response

    def content(self, response: Any) -> Iterator[bytes]:
        """Yield what a streamed request answers."""
        try:
            yield from response.iter_content(archive.CHUNK_BYTES)
        except OSError as error:  # all that the HTTP library raises is one
            raise _failure("hand out a file", error) from error

    def stream(self, what: str, path: str) -> socket.socket:
        """Make a call after which the connection is a stream to and from a container.

        docker-py would wait for it without a limit, and keep the socket for itself.
        """
        request = (
            f"POST /v{self._client.api_version}{path} HTTP/1.1\r\n"
            "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        )
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(CALL_SECONDS)
            stream.connect(self._path)
            stream.sendall(request.encode())
            first, _, _ = _read_head(stream).partition("\r\n")
            if first.split()[1:2] != ["101"]:
                raise EngineFailure(f"the container engine did not {what}: {first}")
            stream.setblocking(False)
        except OSError as error:
            stream.close()
            raise EngineFailure(f"the container engine did not {what}: {error}") from error
        except BaseException:
            stream.close()
            raise
        return stream


def _failure(what: str, error: Exception) -> EngineFailure:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "explanation", None)
    if response is not None and not said:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
            said = response.json()["message"]
    message = f"the container engine could not {what}: {' '.join(str(said or error).split())}"
    return (NotThere if status == 404 else EngineFailure)(message, status)


def _read_head(stream: socket.socket) -> str:
    """Read the head of an HTTP answer and not a byte more: what follows is the container's."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        if not byte or len(head) > MAX_HEAD_BYTES:
            raise OSError("the engine closed the connection, or did not come to an end")
        head += byte
    return head.decode("latin-1")
