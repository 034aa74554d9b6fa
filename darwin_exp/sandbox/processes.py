"""Processes as /proc tells of them: who descends from whom, what they use, what they wait for.

Reads: /proc.
Writes: nothing.
Never: signals anyone.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat.

    Attributes:
        state: R, S, D, T (stopped), t (traced), Z (ended, not yet waited for) or X.
        cpu_seconds: used by it and by those of its children that it waited for.
    """

    pid: int
    parent: int
    state: str
    cpu_seconds: float

    @classmethod
    def read(cls, pid: int) -> Process | None:
        """Return what /proc says of a process, or None if it is gone."""
        try:
            text = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name stands in parentheses and may itself hold anything, parentheses included.
        fields = text[text.rindex(b")") + 2 :].split()
        ticks = sum(map(int, fields[11:15]))
        return cls(pid, int(fields[1]), fields[0].decode(), ticks / _TICKS_PER_SECOND)


def all_processes() -> dict[int, Process]:
    """Return every process of the machine that we can see, by id."""
    found = (Process.read(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {process.pid: process for process in found if process is not None}


def descendants(root: int) -> list[Process]:
    """Return every process below `root`, parents before children."""
    children: dict[int, list[Process]] = {}
    for process in all_processes().values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    pending = deque([root])
    while pending:
        below = children.get(pending.popleft(), [])
        found += below
        pending += [process.pid for process in below]
    return found


def count_tasks(uid: int) -> int:
    """Return how many tasks, threads included, a user runs."""
    total = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{name}/status").read_text(errors="replace")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            if int(fields["Uid"].split()[0]) == uid and "Threads" in fields:
                total += int(fields["Threads"])
    return total


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, shared memory included; 0 if it is gone.

    Pages of mapped files do not count: the kernel can drop them, and training data is mapped.
    """
    kilobytes = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                kilobytes += int(line.split()[1])
    return kilobytes << 10


def run_delays(pid: int) -> dict[int, float]:
    """Return, by task, the seconds that it stood runnable without a CPU."""
    delays: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()
                delays[int(task)] = int(fields[1]) / 1e9
    return delays


def kernel_oom_kills() -> int:
    """Return how many processes the kernel has killed so far for want of memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def busy_seconds(cpus: Collection[int]) -> float:
    """Return how long some CPUs have worked, for whomever, since the machine started."""
    ticks = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
                ticks += user + nice + system + irq + softirq
    return ticks / _TICKS_PER_SECOND


def owed_seconds(
    longest_wait: float,
    wall_seconds: float,
    n_cpus: int,
    cpu_seconds: float,
    busy_seconds: float = math.inf,
) -> float:
    """Return the run delay that others caused a group in a span of time.

    It is the longest that any one task stood runnable without a CPU, but never more than what
    the group left unused of its slot's CPUs, nor than what others used of them: a group that
    over-subscribes them makes its tasks wait for one another, and nobody else is to blame.

    Args:
        busy_seconds: how long the slot's CPUs worked in that time, for whomever.
    """
    of_others = min(wall_seconds * n_cpus, busy_seconds) - cpu_seconds
    return max(0.0, min(longest_wait, of_others))


def cpu_of_children(pids: list[int]) -> float:
    """Return the CPU seconds of the living, and of every child that we waited for."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = (process.cpu_seconds for pid in pids if (process := Process.read(pid)))
    return dead.ru_utime + dead.ru_stime + sum(alive)


class Usage:
    """What a group has used since its ready signal."""

    def __init__(
        self,
        cpus: Collection[int],
        cpu_of: Callable[[list[int]], float] = cpu_of_children,
        busy: Callable[[Collection[int]], float] = busy_seconds,
    ) -> None:
        """Begin with nothing used.

        Args:
            cpus: the CPUs that the group has.
            cpu_of: says how many CPU seconds the group has used so far, given the ids of those of
                its processes that are alive.
            busy: says how many CPU seconds its CPUs have worked so far, for whomever.
        """
        self._cpus = cpus
        self._cpu_of = cpu_of
        self._busy_of = busy
        self._ended_at: float | None = None
        self._cpu_before = 0.0
        self.begin([])

    def begin(self, pids: list[int]) -> None:
        """Count from now on: the ready signal was given."""
        self._sampled_at = time.monotonic()
        self._cpu = self._cpu_before = self._cpu_of(pids)
        self._busy = self._busy_of(self._cpus)
        self._delay: dict[int, float] = {}
        for pid in pids:
            self._delay.update(run_delays(pid))
        self._owed = 0.0
        self._overdrawn = 0.0

    def sample(self, pids: list[int]) -> None:
        """Take the present figures of the living; of the dead the last sample stands.

        What is owed is settled per sample, so that a group cannot wait for itself at one time
        and have it taken for others' doing because it was idle at another.
        """
        now = self._ended_at or time.monotonic()
        cpu = max(self._cpu, self._cpu_of(pids))
        busy = self._busy_of(self._cpus)
        delays: dict[int, float] = {}
        for pid in pids:
            delays.update(run_delays(pid))
        longest = max((d - self._delay.get(task, 0.0) for task, d in delays.items()), default=0.0)
        # CPU time comes in coarse ticks, and late of processes not seen before; what then exceeds
        # the span since the last sample was used, and is charged, in another.
        used = cpu - self._cpu + self._overdrawn
        wall, n_cpus = now - self._sampled_at, len(self._cpus)
        self._owed += owed_seconds(longest, wall, n_cpus, used, busy - self._busy)
        self._overdrawn = max(0.0, used - wall * n_cpus)
        self._sampled_at, self._cpu, self._busy = now, cpu, busy
        self._delay.update(delays)

    def end(self) -> None:
        """Stop the clock: the group was frozen or its main process ended."""
        self._ended_at = self._ended_at or time.monotonic()

    def totals(self) -> tuple[float, float]:
        """Return CPU seconds and run delay in seconds; exact once every process is waited for."""
        self._cpu = max(self._cpu, self._cpu_of([]))
        return max(0.0, self._cpu - self._cpu_before), self._owed
