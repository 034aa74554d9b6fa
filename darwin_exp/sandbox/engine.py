"""The container engine as a sandbox needs it; in this package, the one module that knows docker-py.

Reads: DOCKER_HOST; what the engine answers.
Writes: containers and volumes, and the files that are copied out of them.
Never: waits without a limit, pulls an image, or lets an exception of docker-py or of the HTTP
library below it reach a caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from docker.api import APIClient
from docker.errors import DockerException

from darwin_exp.protocols import InfrastructureFailure, SandboxUnavailable
from darwin_exp.sandbox import archive

DEFAULT_HOST = "unix:///var/run/docker.sock"
CALL_SECONDS = 20.0  # of silence, after which a call has failed
STOP_SECONDS = 5.0  # the same, where something is to be stopped, or was
KNOCK_SECONDS = 5.0
TRIES = 3  # of calls that may be repeated, where they fail at once
RETRY_SECONDS = 0.2
FAILED_AT_ONCE_SECONDS = 2.0
PURGE_PAUSE_SECONDS = 0.05
PURGE_CALL_SECONDS = 1.0  # that each call of it has at least
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


@dataclass(frozen=True)
class State:
    """What the engine says of a container.

    Attributes:
        running: it has a first process, frozen or not.
        pid: of that process, as the engine's machine counts.
        exit_code: of that process, 128 and more where a signal ended it.
        oom_killed: the kernel killed a process of it for the container's memory limit; of newer
            engines with version 2 of control groups, for want of memory, whosever.
    """

    running: bool
    paused: bool
    pid: int
    exit_code: int
    oom_killed: bool


@dataclass(frozen=True)
class Belonging:
    """A container or a volume, by the labels that it was given."""

    name: str
    labels: Mapping[str, str]


def connect() -> Engine:
    """Connect to the engine that DOCKER_HOST names, or to the usual one of this machine.

    Raises:
        EngineUnavailable: none answers, or not to us, or it is not on this machine.
    """
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    if not host.startswith("unix://"):
        raise EngineUnavailable(
            f"DOCKER_HOST={host}: candidates' files are handed to an engine of this machine, which "
            f"is reached through a socket file such as {DEFAULT_HOST}"
        )
    path = host.removeprefix("unix://")
    _knock(path)
    try:
        client = APIClient(base_url=host, version="auto", timeout=CALL_SECONDS)
    except (DockerException, OSError) as error:
        raise EngineUnavailable(
            f"what listens at {path} does not answer as a container engine of 20.10 or newer: "
            f"{error}"
        ) from error
    return Engine(client, path)


class Engine:
    """A connection to the engine. Containers and volumes go by names of our own choosing."""

    def __init__(self, client: Any, path: str) -> None:
        self._client = client
        self._path = path

    def close(self) -> None:
        """Close idle connections; what is called afterwards opens new ones. Idempotent."""
        self._client.close()

    def info(self) -> Mapping[str, Any]:
        """Return what the engine says of itself and of its machine."""
        answer: Mapping[str, Any] = self._ask("describe itself", self._client.info)
        return answer

    def image(self, image: str) -> Mapping[str, Any]:
        """Return what is recorded of an image.

        Raises:
            NotThere: the engine does not have it; it is not looked for elsewhere.
        """
        answer: Mapping[str, Any] = self._ask(
            f"look up the image {image}", lambda: self._client.inspect_image(image)
        )
        return answer

    # --- containers

    def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container, without starting it, and return the engine's id of it.

        Args:
            config: in the words of the engine's HTTP interface; see profile.py.
        """
        return self._once(
            "create a container",
            lambda: str(self._client.create_container_from_config(dict(config), name)["Id"]),
        )

    def attach(self, name: str) -> socket.socket:
        """Return a stream to and from a container: what is sent is its standard input.

        What comes are frames of output. Attached before the start, it misses nothing. docker-py
        would wait for it without a limit, and keep the socket for itself.

        Source: the engine's API reference, "Attach to a container".
        """
        query = urlencode({"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        path = f"/v{self._client.api_version}/containers/{quote(name)}/attach?{query}"
        request = (
            f"POST {path} HTTP/1.1\r\n"
            "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
        )
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.settimeout(CALL_SECONDS)
            stream.connect(self._path)
            stream.sendall(request.encode())
            first, _, _ = _read_head(stream).partition("\r\n")
            if first.split()[1:2] != ["101"]:
                raise EngineFailure(f"the container engine did not attach a stream: {first}")
            stream.setblocking(False)
        except OSError as error:
            stream.close()
            raise EngineFailure(f"the container engine did not attach a stream: {error}") from error
        except BaseException:
            stream.close()
            raise
        return stream

    def start(self, name: str) -> None:
        """Start what was created; where that fails, the container is still there."""
        self._once("start a container", lambda: self._client.start(name))

    def pause(self, name: str) -> None:
        """Stop every process of a container at one stroke, for good."""
        self._do("freeze a container", "POST", f"/containers/{quote(name)}/pause", STOP_SECONDS)

    def kill(self, name: str) -> None:
        """Kill every process of a container."""
        self._do("kill a container", "POST", f"/containers/{quote(name)}/kill", STOP_SECONDS)

    def state(self, name: str, seconds: float = CALL_SECONDS) -> State | None:
        """Return what a container is doing, or None if there is none."""
        path = f"/containers/{quote(name)}/json"
        try:
            found = self._ask(
                "look at a container",
                lambda: self._request("GET", path, seconds=seconds).json()["State"],
            )
        except NotThere:
            return None
        return State(
            running=bool(found["Running"]),
            paused=bool(found["Paused"]),
            pid=int(found["Pid"]),
            exit_code=int(found["ExitCode"]),
            oom_killed=bool(found["OOMKilled"]),
        )

    def happenings(self, container_id: str, since: float) -> frozenset[str]:
        """Return what the engine remembers to have happened to a container: "die", "kill", ...

        A process inside that kills another leaves no "kill" here; whoever asks the engine to does.
        It remembers the last few hundred, and none of before its own start.

        Args:
            since: in seconds since 1970.
        """
        parameters = {
            "since": f"{since:.6f}",
            "until": f"{time.time():.6f}",
            "filters": json.dumps({"container": [container_id], "type": ["container"]}),
        }

        def happened() -> frozenset[str]:
            lines = self._request("GET", "/events", parameters).content.splitlines()
            return frozenset(str(json.loads(line)["Action"]) for line in lines if line.strip())

        return self._ask("say what happened", happened)

    def copy_file(self, name: str, path: str, target: Path, max_bytes: int) -> int:
        """Copy a plain file out of a container, frozen or ended, and return its size.

        What it is and how long is known before its content is asked for: the hole of a sparse file
        counts as if it were written, and links are not followed in the last part of the path.

        Raises:
            NotThere: there is no such file, or no such container.
            ValueError: it is no plain file, or too long.
            OSError: the target cannot be written.
        """
        with self._archive(name, path) as (told, content):
            try:
                size = archive.announced_size(told, max_bytes)
                archive.unpack(content, os.path.basename(path), size, target)
            except archive.Surprise as error:
                raise EngineFailure(
                    "the container engine sent something else than the file it was asked for"
                ) from error
        return size

    def copy_folder(
        self, name: str, path: str, wanted: frozenset[str], destination: Path, max_bytes: int
    ) -> dict[str, int]:
        """Copy plain files that lie right in a folder, in one request, and return their sizes.

        To pack anything at all takes the engine a tenth of a second, so that three files take three
        times as long one by one. It tells nothing of why a file was not taken, and takes none where
        the folder holds much else: ask for those by `copy_file`.

        Args:
            wanted: names of the files.
            max_bytes: of all of them together, as in `copy_file`.

        Raises:
            NotThere: there is no such folder, or no such container.
            OSError: a file cannot be written to the destination.
        """
        with self._archive(name, path) as (told, content):
            try:
                if archive.is_folder(told):
                    folder = os.path.basename(path)
                    return archive.unpack_folder(content, folder, wanted, max_bytes, destination)
            except (archive.Surprise, archive.Untidy):
                pass
        return {}

    @contextlib.contextmanager
    def _archive(self, name: str, path: str) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Ask for what lies at a path; give what the engine says of it, and then the archive.

        What is not read when the context ends is not sent either.
        """
        place = f"/containers/{quote(name)}/archive"
        response = self._ask(
            "hand out a file",
            lambda: self._request("GET", place, {"path": path}, stream=True),
        )
        with contextlib.closing(response):
            told = response.headers.get("X-Docker-Container-Path-Stat", "")
            yield str(told), self._content(response)

    # --- volumes

    def create_volume(
        self, name: str, options: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        """Make a volume of the engine's local driver; see profile.py for its options."""
        self._once(
            "create a volume",
            lambda: self._client.create_volume(
                name, driver="local", driver_opts=dict(options), labels=dict(labels)
            ),
        )

    # --- what is left

    def labelled(self, label: str) -> list[Belonging]:
        """Return all containers, in whatever state, and all volumes that have a label.

        Args:
            label: its name, or NAME=VALUE.
        """
        filters = {"label": [label]}
        containers = self._ask(
            "list containers", lambda: self._client.containers(all=True, filters=filters)
        )
        volumes = self._ask(
            "list volumes", lambda: self._client.volumes(filters=filters).get("Volumes") or []
        )
        found = [
            Belonging(str(each["Names"][0]).lstrip("/"), each.get("Labels") or {})
            for each in containers
            if each.get("Names")  # one that is just being removed has none
        ]
        return found + [Belonging(str(each["Name"]), each.get("Labels") or {}) for each in volumes]

    def purge(self, name: str, seconds: float) -> None:
        """Kill and remove the container and the volume of a name, and verify that both are gone.

        A creation that the engine was too slow to answer may still come to be afterwards: what it
        makes has a label, by which it is found.

        Args:
            seconds: how long that may take; an engine that is silent costs little more.

        Raises:
            EngineFailure: one of them is still there after so long, or nobody can tell.
        """
        deadline = time.monotonic() + seconds
        container, volume = f"/containers/{quote(name)}", f"/volumes/{quote(name)}"
        for place, view, manner in (
            (container, f"{container}/json", {"v": "1", "force": "1"}),
            (volume, volume, None),
        ):
            while True:
                # It may refuse for a moment: a removal is under way, or a volume still in use.
                failure = EngineFailure(f"{name} is still there")
                try:
                    with contextlib.suppress(NotThere):
                        left = max(PURGE_CALL_SECONDS, deadline - time.monotonic())
                        self._do("remove what a candidate left", "DELETE", place, left, manner)
                    left = max(PURGE_CALL_SECONDS, deadline - time.monotonic())
                    self._do("look for what a candidate left", "GET", view, left)
                except NotThere:
                    break
                except EngineFailure as refusal:
                    failure = refusal
                if time.monotonic() > deadline:
                    raise failure
                time.sleep(PURGE_PAUSE_SECONDS)

    # --- calls

    def _once(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except (DockerException, OSError) as error:
            raise _failure(what, error) from error

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """Make a call that changes nothing, again where the engine stumbled over it."""
        for left in reversed(range(TRIES)):
            began = time.monotonic()
            try:
                return self._once(what, call)
            except EngineFailure as failure:
                may_pass = failure.status is None or failure.status >= 500
                at_once = time.monotonic() - began < FAILED_AT_ONCE_SECONDS
                if not (left and may_pass and at_once):
                    raise
            time.sleep(RETRY_SECONDS)
        raise AssertionError("the last try returned or raised")

    def _do(
        self,
        what: str,
        method: str,
        path: str,
        seconds: float,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        self._once(what, lambda: self._request(method, path, parameters, seconds))

    def _request(
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

    def _content(self, response: Any) -> Iterator[bytes]:
        try:
            yield from response.iter_content(archive.CHUNK_BYTES)
        except OSError as error:  # all that the HTTP library raises is one
            raise _failure("hand out a file", error) from error


def _failure(what: str, error: Exception) -> EngineFailure:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "explanation", None)
    if response is not None and not said:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
            said = response.json()["message"]
    message = f"the container engine could not {what}: {' '.join(str(said or error).split())}"
    return (NotThere if status == 404 else EngineFailure)(message, status)


def _knock(path: str) -> None:
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


def _read_head(stream: socket.socket) -> str:
    """Read the head of an HTTP answer and not a byte more: what follows is the container's."""
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        if not byte or len(head) > MAX_HEAD_BYTES:
            raise OSError("the engine closed the connection, or did not come to an end")
        head += byte
    return head.decode("latin-1")
