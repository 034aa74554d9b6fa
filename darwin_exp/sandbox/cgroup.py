"""The kernel's books on one container: its processes, the CPU time it used, who was killed in it.

They lie in the files of its control group, which exist as long as it runs, and only where the
engine runs containers under the kernel that we see (not in a virtual machine of its own).

Reads: /proc, the control group file systems.
Writes: nothing.
Never: believes a process id without having seen it in the container's own control group.

Source: the kernel's documentation of control groups, version 1 and 2.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

NEARLY_ALL = 0.98  # of its limit; the charge that failed is not counted


@dataclass(frozen=True)
class Books:
    """Where the books on a container are kept.

    Attributes:
        cpu: folder that counts CPU time and lists processes.
        memory: folder that counts memory.
    """

    cpu: Path
    memory: Path

    @property
    def open(self) -> bool:
        """Whether they can still be read: the container has a process."""
        return bool(self.pids())

    def pids(self) -> list[int]:
        """Return the process ids of the container, as we count them."""
        with contextlib.suppress(OSError, ValueError):
            return [int(line) for line in (self.cpu / "cgroup.procs").read_text().split()]
        return []

    def cpu_seconds(self) -> float:
        """Return the CPU time that the container used so far; 0 once the books are closed."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.cpu / "cpuacct.usage").read_text()) / 1e9
        return _numbers(self.cpu / "cpu.stat").get("usage_usec", 0) / 1e6

    @property
    def tells_why(self) -> bool:
        """Whether kills for its own limit are told from those for want of memory elsewhere.

        Version 2 does so, as long as the books are open.
        """
        return "oom" in _numbers(self.memory / "memory.events")

    def oom_kills(self) -> int:
        """Return how many of its processes the kernel killed for want of memory, whosever."""
        for name in ("memory.events", "memory.oom_control"):
            numbers = _numbers(self.memory / name)
            if "oom_kill" in numbers:
                return numbers["oom_kill"]
        return 0

    def reached_limit(self) -> bool:
        """Say whether the container itself ever held as much memory as it may."""
        # Where version 1 counts swap as well, that limit, equal to the other, is met before it.
        for name in ("memory.failcnt", "memory.memsw.failcnt"):
            with contextlib.suppress(OSError, ValueError):
                if int((self.memory / name).read_text()) > 0:
                    return True
        # Newer kernels no longer count there: then the most that it ever held must tell.
        with contextlib.suppress(OSError, ValueError):
            most = int((self.memory / "memory.max_usage_in_bytes").read_text())
            if most >= NEARLY_ALL * int((self.memory / "memory.limit_in_bytes").read_text()):
                return True
        return _numbers(self.memory / "memory.events").get("oom", 0) > 0


def find_books(pid: int, container_id: str) -> Books | None:
    """Return the books on a container, or None where they cannot be seen.

    Args:
        pid: of its first process, as the engine counts, which need not be as we do.
    """
    folders: dict[str, Path] = {}
    with contextlib.suppress(OSError, ValueError):
        mounts = _mounts()
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if container_id not in path:
                continue  # another process has this id here
            for controller in controllers.split(","):  # version 2 has one line without any
                if controller in mounts:
                    root, place = mounts[controller]
                    folder = Path(place, os.path.relpath(path, root))
                    if folder.is_dir():
                        folders[controller] = folder
    cpu = folders.get("cpuacct", folders.get(""))
    memory = folders.get("memory", folders.get(""))
    return None if cpu is None or memory is None else Books(cpu, memory)


def _mounts() -> dict[str, tuple[str, str]]:
    """Return, by controller ("" for version 2), what is mounted where."""
    found: dict[str, tuple[str, str]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, place = before.split()[3:5]
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            found.setdefault("", (root, place))
        elif kind == "cgroup":
            for controller in options.split(","):
                found.setdefault(controller, (root, place))
    return found


def _numbers(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        pairs = (line.split() for line in file.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    return {}
