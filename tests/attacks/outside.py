"""What can be seen of candidates from outside: by the kernel, the disk and the container engine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN = f"attacks-{os.getpid()}"  # what this process's containers and volumes are known by


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def n_processes() -> int:
    """Return how many processes this machine runs, as far as we can see."""
    return sum(name.isdigit() for name in os.listdir("/proc"))


def named(name: str) -> list[int]:
    """Return the processes of this machine that go by a name."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{entry}/comm").read_text().strip() == name:
                found.append(int(entry))
        except OSError:
            continue
    return found


def resident_bytes() -> int:
    """Return how much memory this process holds, not how much it ever held."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


class Engine:
    """What the container engine says of us, asked over a connection that is not the sandbox's."""

    def __init__(self) -> None:
        from docker.api import APIClient
        from docker.utils import kwargs_from_env

        # Not from_env, which in newer versions may talk to another engine than the harness does.
        self._client: Any = APIClient(version="auto", **kwargs_from_env())
        self._ours = {"label": f"darwin.run={RUN}"}

    def listed(self) -> list[str]:
        """Return every container and volume of this process's jobs, ended ones included."""
        containers = self._client.containers(all=True, filters=self._ours)
        volumes = self._client.volumes(filters=self._ours)["Volumes"] or []
        found = [f"container {container['Id']}" for container in containers]
        return found + [f"volume {volume['Name']}" for volume in volumes]

    def inspected(self) -> list[Mapping[str, Any]]:
        """Return all that the engine knows of each of our containers."""
        containers = self._client.containers(all=True, filters=self._ours)
        return [self._client.inspect_container(one["Id"]) for one in containers]

    def n_created(self, since: float) -> int:
        """Return how many of our containers were created since a time of day in seconds."""
        filters = {**self._ours, "type": "container", "event": "create"}  # by whole seconds
        events = self._client.events(
            since=int(since), until=int(time.time()) + 1, filters=filters, decode=True
        )
        return sum(event["timeNano"] >= since * 1e9 for event in events)

    def images(self) -> list[str]:
        return sorted(self._client.images(quiet=True, all=True))

    def runtimes(self) -> set[str]:
        return set(self._client.info()["Runtimes"])

    def folder(self) -> Path:
        """Return where the engine keeps what containers write, as far as we can see it."""
        root = Path(self._client.info()["DockerRootDir"])
        return root if root.is_dir() else Path(tempfile.gettempdir())

    def close(self) -> None:
        self._client.close()
