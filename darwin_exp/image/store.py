"""The engine's store of images, as this package uses it, and all that it says to docker-py.

Reads and writes: images of the container engine; containers that it removes again.
Never: pulls anything but in `Store.pull`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from darwin_exp.image.recipe import ImageError

Announce = Callable[[str], None]
TIMEOUT_SECONDS = 600.0  # of one answer; a builder is silent while it compiles all of torch
PROGRAM_SECONDS = 120.0
CHUNK_BYTES = 1 << 20
# The builder takes these without their being declared, and leaves them out of images.
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True)
class Image:
    """One image of the engine.

    Attributes:
        id: the digest that names its content.
        created: seconds since 1970; 0 where it was looked up by name.
    """

    id: str
    tags: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0


@contextmanager
def open_store() -> Iterator[Store]:
    """Connect to the engine that DOCKER_HOST names, or to the one of this machine.

    Raises:
        SandboxUnavailable: none answers, or not to us.
        ImageError: it failed at what it was asked to do.
    """
    from docker.errors import APIError, DockerException
    from urllib3.exceptions import HTTPError

    try:
        with closing(_connect()) as api:
            yield Store(api)
    except APIError as error:
        raise ImageError(f"the container engine refused: {_reason(error)}") from error
    except (DockerException, HTTPError, OSError) as error:  # a lost connection, or a full disk
        raise ImageError(f"{one_line(error)}; mend that (engine, disk), then try again") from error


class Store:
    """What is asked of an engine about images."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def find(self, name: str) -> Image | None:
        """Return the image of a name, tag or id that is here; None where there is none."""
        from docker.errors import APIError

        try:
            found = self._api.inspect_image(name)
        except APIError as error:
            if not error.is_client_error():
                raise
            return None  # not here, or no name that any image could have
        labels = (found.get("Config") or {}).get("Labels") or {}
        return Image(found["Id"], tuple(found.get("RepoTags") or ()), labels)

    def labelled(self, label: str, value: str) -> list[Image]:
        """Return the images that carry a label, the newest first."""
        found = [
            Image(
                one["Id"],
                tuple(one.get("RepoTags") or ()),
                one.get("Labels") or {},
                int(one.get("Created") or 0),
            )
            for one in self._api.images(filters={"label": f"{label}={value}"})
        ]
        return sorted(found, key=lambda image: image.created, reverse=True)

    def pull(self, name: str) -> Image:
        """Fetch an image from its registry.

        Raises:
            ImageError: the registry does not answer, or has no such image.
        """
        from docker.errors import APIError

        try:
            # Read to its end, or its connection stays open.
            messages = list(self._api.pull(name, stream=True, decode=True))
        except APIError as error:
            raise ImageError(_reason(error)) from error
        for message in messages:
            if "error" in message:
                raise ImageError(one_line(message["error"]))
        found = self.find(name)
        if found is None:
            raise ImageError("its registry answered, and the image is not here")
        return found

    def take_in(self, tree: Iterator[bytes], name: str) -> Image:
        """Make an image of a file tree that arrives as a tar stream.

        Raises:
            ImageError: the engine did not accept it.
        """
        repository, _, tag = name.partition(":")
        said = self._api.import_image_from_stream(tree, repository=repository, tag=tag)
        found = self.find(name)
        if found is None:
            raise ImageError(f"the container engine did not import {name}: {one_line(said)}")
        return found

    def build(
        self,
        context: Iterator[bytes],
        tag: str,
        target: str,
        arguments: Mapping[str, str],
        labels: Mapping[str, str],
        network: str,
        fresh: bool,
        announce: Announce,
    ) -> Image:
        """Build a Dockerfile's stage from a context that arrives as a tar stream.

        Args:
            network: "none" where no step needs one, else "default".
            fresh: take no step from the engine's cache.

        Raises:
            ImageError: a step failed; the end of what it printed has been announced.
        """
        proxies = {name: os.environ[name] for name in _PROXIES if name in os.environ}
        said: deque[str] = deque(maxlen=15)
        failure = ""
        for message in self._api.build(
            fileobj=context,
            custom_context=True,
            tag=tag,
            target=target,
            buildargs={**proxies, **arguments},
            labels=dict(labels),
            network_mode=network,
            nocache=fresh,
            rm=True,
            forcerm=True,
            decode=True,
        ):
            for line in str(message.get("stream", "")).splitlines():
                if line.startswith("Step "):
                    announce(f"  {one_line(line)}")
                elif line.strip():
                    said.append(line.rstrip())
            failure = failure or one_line(message.get("error", ""))
        if failure:
            for line in said:
                announce(f"  | {line}")
            raise ImageError(
                f"the image's stage {target}: {failure}; the end of what it printed stands "
                "above (a step that installs packages needs a network: docs/containers.md)"
            )
        found = self.find(tag)
        if found is None:
            raise ImageError(f"the container engine built no {tag}; try again with --force")
        return found

    def run(
        self, image_id: str, program: str, runtime: str | None = None, gpu: str | None = None
    ) -> str:
        """Run a Python program of ours in a container without a network; return what it printed.

        Raises:
            ImageError: it failed, or the engine could not start it.
        """
        from docker.types import DeviceRequest, LogConfig

        from darwin_exp.sandbox import reaping

        # As candidates are given theirs; see profile.py.
        abilities = [["gpu", "compute", "utility"]]
        device = None if gpu is None else DeviceRequest(device_ids=[gpu], capabilities=abilities)
        token = f"program-{secrets.token_hex(6)}"
        with reaping.alive(token):
            made = self._api.create_container(
                image_id,
                entrypoint=["python3"],
                command=["-c", program],
                use_config_proxy=False,
                labels=reaping.ownership(token, PROGRAM_SECONDS),
                host_config=self._api.create_host_config(
                    network_mode="none",
                    log_config=LogConfig(type=LogConfig.types.JSON),
                    runtime=runtime,
                    device_requests=[device] if device else None,
                ),
            )
            try:
                self._api.start(made["Id"])
                code = self._api.wait(made["Id"], timeout=PROGRAM_SECONDS)["StatusCode"]
                printed = self._api.logs(made["Id"]).decode(errors="replace")
            finally:
                self._api.remove_container(made["Id"], force=True)
        if code != 0:
            raise ImageError(f"a program in {image_id[:19]} ended with {code}: {one_line(printed)}")
        return str(printed).strip()


def packed(folder: Path, *options: str) -> Iterator[bytes]:
    """Yield a folder as a tar stream.

    Args:
        options: of GNU tar, such as --exclude=./tmp/*.

    Raises:
        ImageError: tar failed; it has said why itself.
    """
    command = ["tar", "--create", "--numeric-owner", f"--directory={folder}", *options, "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None
        while chunk := tar.stdout.read(CHUNK_BYTES):
            yield chunk
    if tar.returncode != 0:
        raise ImageError(f"tar failed at {folder}; what it said stands above")


def one_line(text: object, most: int = 240) -> str:
    """Return a message without line breaks and full stop, cut where it is very long."""
    line = " ".join(str(text).split()).rstrip(".")
    return line if len(line) <= most else f"{line[:most]}..."


def _reason(error: Any) -> str:
    return one_line(error.explanation or error)


def _connect() -> Any:
    from docker.api import APIClient

    from darwin_exp.sandbox.engine import DEFAULT_HOST, connect

    connect().close()  # which says in words why none answers
    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    return APIClient(base_url=host, version="auto", timeout=TIMEOUT_SECONDS)
