"""The container engine as a sandbox needs it; with engine_calls.py, all that knows docker-py here.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from docker.api import APIClient
from docker.errors import DockerException

from darwin_exp.sandbox import archive
from darwin_exp.sandbox.engine_calls import (
    CALL_SECONDS,
    Calls,
    EngineFailure,
    EngineUnavailable,
    NotThere,
    knock,
)

DEFAULT_HOST = "unix:///var/run/docker.sock"
STOP_SECONDS = 5.0  # the same, where something is to be stopped, or was
PURGE_PAUSE_SECONDS = 0.05
PURGE_CALL_SECONDS = 1.0  # that each call of it has at least


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
    knock(path)
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
        self._calls = Calls(client, path)

    def close(self) -> None:
        """Close idle connections; what is called afterwards opens new ones. Idempotent."""
        self._client.close()

    def info(self) -> Mapping[str, Any]:
        """Return what the engine says of itself and of its machine."""
        answer: Mapping[str, Any] = self._calls.ask("describe itself", self._client.info)
        return answer

    def image(self, image: str) -> Mapping[str, Any]:
        """Return what is recorded of an image.

        Raises:
            NotThere: the engine does not have it; it is not looked for elsewhere.
        """
        answer: Mapping[str, Any] = self._calls.ask(
            f"look up the image {image}", lambda: self._client.inspect_image(image)
        )
        return answer

    # --- containers

    def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container, without starting it, and return the engine's id of it.

        Args:
            config: in the words of the engine's HTTP interface; see profile.py.
        """
        return self._calls.once(
            "create a container",
            lambda: str(self._client.create_container_from_config(dict(config), name)["Id"]),
        )

    def attach(self, name: str) -> socket.socket:
        """Return a stream to and from a container: what is sent is its standard input.

        What comes are frames of output. Attached before the start, it misses nothing.

        Source: the engine's API reference, "Attach to a container".
        """
        query = urlencode({"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        return self._calls.stream("attach a stream", f"/containers/{quote(name)}/attach?{query}")

    def start(self, name: str) -> None:
        """Start what was created; where that fails, the container is still there."""
        self._calls.once("start a container", lambda: self._client.start(name))

    def pause(self, name: str) -> None:
        """Stop every process of a container at one stroke, for good."""
        place = f"/containers/{quote(name)}/pause"
        self._calls.do("freeze a container", "POST", place, STOP_SECONDS)

    def kill(self, name: str) -> None:
        """Kill every process of a container."""
        place = f"/containers/{quote(name)}/kill"
        self._calls.do("kill a container", "POST", place, STOP_SECONDS)

    def state(self, name: str, seconds: float = CALL_SECONDS) -> State | None:
        """Return what a container is doing, or None if there is none."""
        path = f"/containers/{quote(name)}/json"
        try:
            found = self._calls.ask(
                "look at a container",
                lambda: self._calls.request("GET", path, seconds=seconds).json()["State"],
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
            lines = self._calls.request("GET", "/events", parameters).content.splitlines()
            return frozenset(str(json.loads(line)["Action"]) for line in lines if line.strip())

        return self._calls.ask("say what happened", happened)

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
        response = self._calls.ask(
            "hand out a file",
            lambda: self._calls.request("GET", place, {"path": path}, stream=True),
        )
        with contextlib.closing(response):
            told = response.headers.get("X-Docker-Container-Path-Stat", "")
            yield str(told), self._calls.content(response)

    # --- volumes

    def create_volume(
        self, name: str, options: Mapping[str, str], labels: Mapping[str, str]
    ) -> None:
        """Make a volume of the engine's local driver; see profile.py for its options."""
        self._calls.once(
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
        containers = self._calls.ask(
            "list containers", lambda: self._client.containers(all=True, filters=filters)
        )
        volumes = self._calls.ask(
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
        do = self._calls.do
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
                        do("remove what a candidate left", "DELETE", place, left, manner)
                    left = max(PURGE_CALL_SECONDS, deadline - time.monotonic())
                    do("look for what a candidate left", "GET", view, left)
                except NotThere:
                    break
                except EngineFailure as refusal:
                    failure = refusal
                if time.monotonic() > deadline:
                    raise failure
                time.sleep(PURGE_PAUSE_SECONDS)
