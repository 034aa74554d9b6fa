"""The supervisor: the trusted parent of one candidate, forked for one launch.

It adopts every process that the candidate leaves behind, so that "the group" is simply its own
descendants; it watches their memory, stops them, kills them, and does the latter by itself as
soon as the harness is gone. No genome byte runs in it.

Reads: /proc, the candidate's output, commands of the harness.
Writes: messages to the harness.
Never: touches the candidate's files beyond handing them to its user.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from darwin_exp.sandbox import confinement
from darwin_exp.sandbox.confinement import Order
from darwin_exp.sandbox.launcher import OUT_OF_MEMORY_CODE
from darwin_exp.sandbox.processes import (
    Process,
    Usage,
    count_tasks,
    descendants,
    kernel_oom_kills,
    resident_bytes,
)
from darwin_exp.sandbox.wire import Wire
from darwin_exp.sandbox.workfolder import remove_left_behind

POLL_SECONDS = 0.2
SCAN_SECONDS = 1.0  # a full scan of /proc costs milliseconds, so known processes are polled more
SETTLE_SECONDS = 10.0  # how long stopping or killing a whole group may take
READY = b"R"
SHARED_FOLDERS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
SIGNALLED_CODES = range(129, 160)  # what a container's first process makes of a signal


class Log:
    """The last bytes that a group printed."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._chunks: deque[bytes] = deque()
        self._kept_bytes = 0
        self.truncated = False

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._kept_bytes += len(chunk)
        while self._kept_bytes - len(self._chunks[0]) >= self._max_bytes:
            self._kept_bytes -= len(self._chunks.popleft())
            self.truncated = True

    def text(self) -> str:
        kept = b"".join(self._chunks)
        self.truncated = self.truncated or len(kept) > self._max_bytes
        return kept[max(0, len(kept) - self._max_bytes) :].decode("utf-8", errors="replace")


def supervise(
    order: Order, wire: Wire, channel: list[int], launch: Callable[[Order], int]
) -> Callable[[], int] | None:
    """Fork a candidate and watch it until the harness closes it or is gone.

    Args:
        channel: the candidate's ends of its two pipes to the harness; empty if it has none.
        launch: what a forked candidate goes on to do when it is confined.

    Returns:
        In the candidate, what it shall now do; in the supervisor, when all is over, None.
    """
    os.sched_setaffinity(0, order.cpus)  # a flood of output is to cost no neighbour's time
    confinement.adopt_orphans()
    uid, claim, own_tasks = None, None, 0
    if order.uid is None:
        own_tasks = count_tasks(os.getuid())
    else:
        uid, claim = confinement.claim_uid(order.uid)
        _hand_over(Path(order.folder), uid)
    ready, ready_end = os.pipe()
    log, log_end = os.pipe()
    main = os.fork()
    if main == 0:
        wire.close()
        if claim is not None:
            claim.close()
        nothing = os.open(os.devnull, os.O_RDONLY)
        # In this order they get the numbers 0, 1, 2 and those under which launcher.py knows them.
        wanted = [nothing, log_end, log_end, ready_end, *channel]
        try:
            confinement.confine(order, uid, dict(enumerate(wanted)), own_tasks)
            if order.command is not None:
                os.execve(order.command[0], list(order.command), dict(order.environment))
        except BaseException as error:
            os.write(log_end, f"the candidate could not be confined: {error!r}\n".encode())
            os._exit(1)
        return lambda: launch(order)
    for descriptor in (ready_end, log_end, *channel):
        os.close(descriptor)
    Supervisor(order, wire, uid, main, ready, log).run()
    if claim is not None:
        claim.close()
    return None


def _hand_over(folder: Path, uid: int) -> None:
    """Let a user into its working folder, and let it write to `out/` and `tmp/` only."""
    os.chown(folder, 0, uid)
    folder.chmod(0o550)
    for name in ("out", "tmp"):
        os.chown(folder / name, uid, uid)


class Supervisor:
    """Watches one group of processes on behalf of the harness."""

    def __init__(
        self, order: Order, wire: Wire, uid: int | None, main: int, ready: int, log: int
    ) -> None:
        self._order = order
        self._wire = wire
        self._uid = uid
        self._main = main
        self._ready = ready
        self._log_end = log
        self._log = Log(order.log_bytes)
        self._usage = Usage(order.cpus)
        self._pids = [main]
        self._scanned_at = 0.0
        self._status: int | None = None
        self._killed = False
        self._out_of_memory = False
        self._sacrificed = False
        self._peak_bytes = 0
        self._frozen = False
        self._harness_gone = False
        self._closed = False
        self._kills_before = kernel_oom_kills()

    def run(self) -> None:
        """Serve the harness until it closes the group or ends; then leave no process behind."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_harness_gone", True))
        os.set_blocking(self._log_end, False)
        poll = select.poll()
        main = os.pidfd_open(self._main)
        handlers: dict[int, Callable[[], bool]] = {
            main: self._main_ended,
            self._ready: self._signalled_ready,
            self._log_end: self._printed,
            self._wire.fileno(): self._commanded,
        }
        for descriptor in handlers:
            poll.register(descriptor, select.POLLIN)
        next_sample = 0.0
        while not (self._closed or self._harness_gone):
            for descriptor, _ in poll.poll(POLL_SECONDS * 1000):
                if not handlers[descriptor]():
                    poll.unregister(descriptor)
            if time.monotonic() >= next_sample and not self._frozen:
                self._watch()
                next_sample = time.monotonic() + POLL_SECONDS
        if not self._closed:
            self._kill()

    # Each handler returns whether its descriptor is to be watched any longer.

    def _main_ended(self) -> bool:
        self._reap()
        self._usage.end()
        # The kernel may have chosen it, without any limit of ours, to save the machine.
        if self._status == -signal.SIGKILL and not self._killed:
            starved = kernel_oom_kills() > self._kills_before
            # Others may have filled the machine; then the kernel's choice is no fault of the group.
            self._out_of_memory = starved and self._peak_bytes > self._order.memory_bytes // 2
            self._sacrificed = starved and not self._out_of_memory
        self._tell({"event": "ended"})
        return False

    def _signalled_ready(self) -> bool:
        if os.read(self._ready, 1) == READY:
            ready_at = time.monotonic()
            self._scan()
            self._usage.begin(self._pids)
            mine = {"supervisor": os.getpid()}
            self._tell({"event": "ready", "at": ready_at, "owner": self._uid} | mine)
        else:
            self._tell({"event": "unready"})
        os.close(self._ready)
        return False

    def _printed(self) -> bool:
        try:
            chunk = os.read(self._log_end, 1 << 16)
        except BlockingIOError:
            return True
        if chunk:
            self._log.add(chunk)
        return bool(chunk)

    def _commanded(self) -> bool:
        try:
            command = self._wire.receive(time.monotonic() + SETTLE_SECONDS)["command"]
        except (EOFError, OSError):
            self._harness_gone = True
            return False
        if command == "freeze":
            self._tell({"event": "frozen", "ok": self._freeze()})
        elif command == "log":
            self._printed()  # a pipe holds no more than one read returns
            text = self._log.text()
            self._tell({"event": "log", "text": text, "truncated": self._log.truncated})
        elif command == "close":
            gone = self._kill()
            cpu_seconds, run_delay_seconds = self._usage.totals()
            exit_ = {
                "code": None if self._killed or self._sacrificed else self._status,
                "out_of_memory": self._out_of_memory or self._status == OUT_OF_MEMORY_CODE,
                "cpu_seconds": cpu_seconds,
                "run_delay_seconds": run_delay_seconds,
            }
            self._closed = True
            self._tell({"event": "closed", "gone": gone, "exit": exit_})
        return True

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._wire.send(message)
        except OSError:
            self._harness_gone = True

    # --- looking

    def _watch(self) -> None:
        """Sample what the group uses, and kill it if it holds more memory than it may."""
        if time.monotonic() - self._scanned_at >= SCAN_SECONDS:
            self._scan()
        self._reap()
        self._usage.sample(self._pids)
        used_bytes = sum(map(resident_bytes, self._pids))
        self._peak_bytes = max(self._peak_bytes, used_bytes)
        if used_bytes > self._order.memory_bytes:
            self._scan()  # a process may have handed its memory on and ended
            if sum(map(resident_bytes, self._pids)) > self._order.memory_bytes:
                self._out_of_memory = True
                self._kill()

    def _scan(self) -> None:
        self._scanned_at = time.monotonic()
        self._pids = [process.pid for process in descendants(os.getpid())]

    def _reap(self) -> None:
        """Wait for every child that has ended, adopted ones included."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == self._main:
                    self._status = os.waitstatus_to_exitcode(ended[1])
                    if self._order.command is not None and self._status in SIGNALLED_CODES:
                        self._status = 128 - self._status

    # --- acting

    def _freeze(self) -> bool:
        """Stop every process of the group; return whether nothing in it can run any more."""
        if not self._frozen:
            self._reap()
            if self._status is None:
                os.kill(self._main, signal.SIGSTOP)  # first who matters most, then everyone
            self._usage.end()
            if self._uid is not None and confinement.has_processes(self._uid):
                confinement.signal_user(self._uid, signal.SIGSTOP)
            self._scan()
            self._usage.sample(self._pids)
            self._frozen = self._settle(signal.SIGSTOP, "TtZX") or self._kill()
        return self._frozen

    def _kill(self) -> bool:
        """Kill every process of the group; return whether none is left."""
        self._usage.end()
        self._reap()
        self._killed = self._killed or self._status is None
        gone = self._settle(signal.SIGKILL, "")
        # Without a house of its own it could write to the machine's shared folders.
        homeless = not self._order.private and self._order.command is None
        if gone and homeless and self._uid is not None and self._uid != os.getuid():
            remove_left_behind(self._uid, SHARED_FOLDERS)
        return gone

    def _settle(self, signal_number: int, settled: str) -> bool:
        """Signal the group until every process is in one of the settled states.

        A process can fork between being listed and being signalled, or while the list is made,
        so this is repeated until two passes running find nothing to do. Processes that keep
        ahead of it are reached at one stroke, if they have a user of their own.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        passes = clean = 0
        while True:
            self._reap()
            pending = [p for p in descendants(os.getpid()) if p.state not in settled]
            hiding = not settled and self._uid is not None and confinement.has_processes(self._uid)
            clean = 0 if pending or hiding else clean + 1
            if clean == 2:
                return True
            if time.monotonic() > deadline:
                return False
            self._signal(pending, signal_number)
            if self._uid is not None and passes > 1 and not clean:
                confinement.signal_user(self._uid, signal_number)
            passes += 1
            time.sleep(0.002)

    @staticmethod
    def _signal(processes: list[Process], signal_number: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal_number)


def connect(descriptor: int) -> Wire:
    """Return the wire at the other end of which the harness is."""
    return Wire(socket.socket(fileno=descriptor))
