"""One group of processes as the harness sees it; `Sandboxed` in protocols.py is its contract.

Reads: what its supervisor tells; `out/` of its working folder.
Writes: the destinations of `collect`.
Never: believes anything but the supervisor about how a group ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from darwin_exp.protocols import Exit, InfrastructureFailure
from darwin_exp.sandbox.supervision import SETTLE_SECONDS
from darwin_exp.sandbox.wire import Wire, wait_readable, wait_writable
from darwin_exp.sandbox.workfolder import WorkFolder

# Freezing may come down to killing, and each may take its time.
ANSWER_SECONDS = 2 * SETTLE_SECONDS + 5.0


class Group:
    """One started group of processes; `Sandboxed` in protocols.py is its contract."""

    def __init__(self, work: WorkFolder, wire: Wire, channel: tuple[int, int] | None) -> None:
        self.startup_seconds = 0.0
        self.ready_at = 0.0
        self._work = work
        self._wire = wire
        self._channel = channel  # (we read from it, we write to it)
        self._owner: int | None = None
        self._supervisor: int | None = None  # a descriptor of its process
        self._ended = False
        self._frozen = False
        self._exit: Exit | None = None
        self._log: tuple[str, bool] = ("", False)
        # close() may come from another thread: it raises the interrupt, which ends every wait,
        # and only then takes the locks.
        self._interrupt = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._interrupting = threading.Lock()
        self._talking = threading.RLock()
        self._channelling = threading.Lock()
        for descriptor in channel or ():
            os.set_blocking(descriptor, False)

    def await_ready(self, started_at: float, deadline: float) -> None:
        """Wait for the ready signal.

        Raises:
            InfrastructureFailure: it did not come in time or cannot come any more.
        """
        with self._talking:
            try:
                message = self._next("ready", "unready", "failed", deadline=deadline)
            except TimeoutError as error:
                raise InfrastructureFailure("the launcher gave no ready signal in time") from error
            except (EOFError, OSError) as error:
                raise InfrastructureFailure(f"the launch failed: {error}") from error
            if message["event"] == "failed":
                raise InfrastructureFailure(f"the launch failed: {message['message']}")
            if message["event"] == "unready":
                self.wait(1.0)
                raise InfrastructureFailure(f"the launcher ended unready: {self.log()[0].strip()}")
        self._owner = message["owner"]
        with contextlib.suppress(OSError):
            self._supervisor = os.pidfd_open(message["supervisor"])
        self.ready_at = message["at"]
        self.startup_seconds = self.ready_at - started_at

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the group's main process to end; return whether it did."""
        deadline = time.monotonic() + seconds
        with self._talking:
            try:
                if not self._ended and self._exit is None:
                    self._next("ended", deadline=deadline)
            except TimeoutError:
                return False
            except (EOFError, OSError):
                return True  # closed meanwhile, or its supervisor died and took it along
        return True

    def send(self, data: bytes, deadline: float) -> None:
        """Write to a MODEL program.

        Raises:
            InfrastructureFailure: it has no channel.
            TimeoutError: it did not read all of it before the deadline.
            EOFError: it has ended, or closed its end.
        """
        with self._channelling:
            _, descriptor = self._open_channel()
            left = memoryview(data)
            while left:
                try:
                    wait_writable(descriptor, deadline, self._interrupt)
                    left = left[os.write(descriptor, left[: 1 << 20]) :]
                except BlockingIOError:
                    continue
                except InterruptedError as error:
                    raise EOFError("the sandbox was closed") from error
                except BrokenPipeError as error:
                    raise EOFError("the program closed its channel") from error

    def receive(self, n_bytes: int, deadline: float) -> bytes:
        """Read exactly so many bytes.

        Raises:
            InfrastructureFailure: it has no channel.
            TimeoutError: they did not come before the deadline.
            EOFError: the program ended, or closed its end, before.
        """
        received = bytearray()
        with self._channelling:
            descriptor, _ = self._open_channel()
            while len(received) < n_bytes:
                try:
                    wait_readable(descriptor, deadline, self._interrupt)
                    chunk = os.read(descriptor, min(n_bytes - len(received), 1 << 20))
                except BlockingIOError:
                    continue
                except InterruptedError as error:
                    raise EOFError("the sandbox was closed") from error
                if not chunk:
                    raise EOFError(f"the program ended after {len(received)} of {n_bytes} bytes")
                received += chunk
        return bytes(received)

    def freeze(self) -> None:
        """Stop every process of the group, so that nothing is written from here on.

        Raises:
            InfrastructureFailure: a process could be neither stopped nor killed, or nobody
                answers for it.
        """
        with self._talking:
            if self._frozen or self._exit is not None:
                return
            try:
                answer = self._ask("freeze", "frozen")
            except TimeoutError as error:  # an OSError too, but nobody died
                raise InfrastructureFailure("the supervisor does not answer") from error
            except (EOFError, OSError):
                return  # its supervisor died, and the group with it
            if not answer["ok"]:
                raise InfrastructureFailure("a process could be neither stopped nor killed")
            self._frozen = True

    def collect(self, names: Iterable[str], destination: Path, max_bytes: int) -> dict[str, str]:
        """Freeze the group, then copy plain files out of `out/`; return what was refused and why.

        Raises:
            InfrastructureFailure: the group cannot be frozen, or was closed before.
        """
        self.freeze()
        with self._talking:
            if self._exit is not None:
                raise InfrastructureFailure("the group is closed and its files are gone")
            return self._work.collect(names, destination, max_bytes, self._owner)

    def log(self) -> tuple[str, bool]:
        """Return the end of what the group printed, and whether more was cut off."""
        with self._talking:
            if self._exit is None:
                with contextlib.suppress(EOFError, OSError):
                    answer = self._ask("log", "log")
                    self._log = (answer["text"], answer["truncated"])
            return self._log

    def close(self) -> Exit:
        """Kill the whole group, verify that it is gone, remove its folders. Idempotent.

        Raises:
            InfrastructureFailure: a process survived being killed, or may have.
        """
        with self._interrupting:
            if self._interrupt >= 0:
                os.eventfd_write(self._interrupt, 1)
        with self._talking, self._channelling:
            if self._exit is not None:
                return self._exit
            self.log()
            answer: dict[str, Any] = {"gone": True, "exit": {"code": None}}
            try:
                answer = self._ask("close", "closed")
            except TimeoutError:
                answer["gone"] = False
                self._kill_supervisor()
            except (EOFError, OSError):
                pass  # its supervisor died, and the group with it
            self._exit = Exit(**answer["exit"])
            self._wire.close()
            if self._supervisor is not None:
                os.close(self._supervisor)
            with self._interrupting:
                for descriptor in (*(self._channel or ()), self._interrupt):
                    os.close(descriptor)
                self._interrupt, self._channel = -1, None
            with contextlib.suppress(OSError):  # the sandbox tries again when it is closed
                self._work.remove()
            if not answer["gone"]:
                raise InfrastructureFailure("a process of the group survived being killed")
            return self._exit

    @property
    def closed(self) -> bool:
        return self._exit is not None

    def _kill_supervisor(self) -> None:
        """Kill who does not answer; the fork server then kills what it leaves behind."""
        if self._supervisor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._supervisor, signal.SIGKILL)

    def _open_channel(self) -> tuple[int, int]:
        if self._exit is not None:
            raise EOFError("the group is closed")
        if self._channel is None:
            raise InfrastructureFailure("only a MODEL program has a channel")
        return self._channel

    def _ask(self, command: str, event: str) -> dict[str, Any]:
        """Give the supervisor a command and return its answer, come what may in between."""
        self._wire.send({"command": command})
        return self._next(event, deadline=time.monotonic() + ANSWER_SECONDS, interruptible=False)

    def _next(self, *events: str, deadline: float, interruptible: bool = True) -> dict[str, Any]:
        interrupt = self._interrupt if interruptible else None
        while True:
            message = self._wire.receive(deadline, interrupt)
            self._ended = self._ended or message["event"] == "ended"
            if message["event"] in events:
                return message
