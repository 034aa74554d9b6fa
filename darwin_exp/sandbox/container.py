"""One container as the harness sees it; `Sandboxed` in protocols.py is its contract.

It has no thread of its own: who waits for it reads, meanwhile, the one stream on which everything
comes that the container prints or answers. Nothing of it is lost, because the stream is attached
before the container is started.

Reads: that stream; what the engine says of the container; the kernel's books on it.
Writes: the destinations of `collect`.
Never: keeps more of the stream than a bounded amount, or takes a word from inside for more than the
candidate's own.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from darwin_exp.protocols import Exit, InfrastructureFailure, Zone
from darwin_exp.sandbox.cgroup import Books, find_books
from darwin_exp.sandbox.ending import SETTLE_SECONDS, Witnesses
from darwin_exp.sandbox.engine import Engine
from darwin_exp.sandbox.engine_calls import EngineFailure
from darwin_exp.sandbox.launcher import OUT_OF_MEMORY_CODE
from darwin_exp.sandbox.processes import Usage
from darwin_exp.sandbox.profile import Plan
from darwin_exp.sandbox.removal import Removals
from darwin_exp.sandbox.stream import Stream
from darwin_exp.sandbox.taking import take
from darwin_exp.sandbox.workfolder import WorkFolder

SAMPLE_SECONDS = 0.5
PAUSE_TRIES = 2
QUIET_SECONDS = 0.02  # of silence, after which all that was printed has arrived
DRAIN_SECONDS = 0.5
REMOVE_SECONDS = 10.0
UNREADY_CHARACTERS = 2000  # of what a launcher printed that ended too early


class Container:
    """One started container; `Sandboxed` in protocols.py is its contract."""

    def __init__(
        self, engine: Engine, name: str, plan: Plan, work: WorkFolder, removals: Removals
    ) -> None:
        self.name = name
        self.startup_seconds = 0.0
        self.ready_at = 0.0
        self._engine = engine
        self._plan = plan
        self._work = work
        self._removals = removals
        self._id = ""
        self._began = time.time()
        self._frozen = False
        self._killed = False
        self._exit: Exit | None = None
        self._sampled_at = 0.0
        self._books: Books | None = None
        self._usage = Usage(plan.cpus, self._cpu_seconds)
        # close() may come from another thread: it raises the interrupt, which ends every wait,
        # and only then takes the lock.
        self._interrupt = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._interrupting = threading.Lock()
        self._talking = threading.RLock()
        self._stream = Stream(plan.zone, plan.token, plan.log_bytes, self._interrupt)

    def start(self, started_at: float, deadline: float) -> None:
        """Create the container, attach to it, start it and wait for the ready signal.

        Whatever fails, all that was made so far is removed by `close`.

        Raises:
            InfrastructureFailure: any of it failed, or took too long.
        """
        stream = self._stream
        with self._talking:
            try:
                for step in (self._create, self._attach, self._run):
                    self._refuse_if_interrupted()
                    step()
                self._await(lambda: bool(stream.ready_at) or stream.over, deadline)
                if stream.ready_at > deadline:
                    raise TimeoutError("the deadline passed")
            except TimeoutError as error:
                raise InfrastructureFailure("the launcher gave no ready signal in time") from error
            except InterruptedError as error:
                raise InfrastructureFailure("the sandbox was closed") from error
            if not stream.ready_at:
                said = stream.log.text().strip()[-UNREADY_CHARACTERS:]
                raise InfrastructureFailure(f"the launcher ended unready: {said}")
            self.ready_at = stream.ready_at
            self.startup_seconds = self.ready_at - started_at
            state = self._engine.state(self.name)
            if state is not None and state.pid:
                self._books = find_books(state.pid, self._id)
            self._usage.begin(self._pids())

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the container's main process to end; return whether it did."""
        deadline = time.monotonic() + seconds
        with self._talking:
            try:
                self._await(self._has_ended, deadline)
            except TimeoutError:
                return False
            except InterruptedError:
                return True  # closed meanwhile
            return True

    def send(self, data: bytes, deadline: float) -> None:
        """Write to a MODEL program, and read what it answers meanwhile, lest both wait for ever.

        Raises:
            InfrastructureFailure: it has no channel.
            TimeoutError: it did not read all of it before the deadline.
            EOFError: it has ended.
        """
        with self._talking:
            stream = self._channel()
            left = memoryview(data)
            while left:
                if stream.over:
                    raise EOFError("the program ended")
                late = time.monotonic() >= deadline
                try:
                    told = self._pump(deadline, select.POLLIN | select.POLLOUT)
                    if told & ~select.POLLIN:
                        left = left[stream.write(left) :]
                except InterruptedError as error:
                    raise EOFError("the sandbox was closed") from error
                except ConnectionError as error:
                    raise EOFError("the program ended") from error
                if late and left:
                    raise TimeoutError("the deadline passed")

    def receive(self, n_bytes: int, deadline: float) -> bytes:
        """Read exactly so many bytes; no more is taken from the stream than that and a chunk.

        Raises:
            InfrastructureFailure: it has no channel.
            TimeoutError: they did not come before the deadline.
            EOFError: the program ended before.
        """
        with self._talking:
            stream = self._channel()
            try:
                self._await(lambda: stream.n_unread >= n_bytes or stream.over, deadline, n_bytes)
            except InterruptedError as error:
                raise EOFError("the sandbox was closed") from error
            if stream.n_unread < n_bytes:
                came = stream.n_unread
                raise EOFError(f"the program ended after {came} of {n_bytes} bytes")
            return stream.take(n_bytes)

    def freeze(self) -> None:
        """Stop every process of the container, so that nothing is written from here on.

        Raises:
            InfrastructureFailure: it could not be frozen, and so was killed; or the engine does
                not answer.
        """
        with self._talking:
            if self._frozen or self._exit is not None:
                return
            self._usage.end()
            try:
                self._pause()
            except EngineFailure as failure:
                self._killed = True
                with contextlib.suppress(EngineFailure):
                    self._engine.kill(self.name)
                raise InfrastructureFailure(
                    f"a container could not be frozen, and was killed: {failure}"
                ) from failure
            self._frozen = True
            self._sample()

    def collect(self, names: Iterable[str], destination: Path, max_bytes: int) -> dict[str, str]:
        """Freeze the container, then copy plain files out of `out/`; return what was refused, why.

        Raises:
            InfrastructureFailure: it cannot be frozen, is gone or was closed before, or a file
                cannot be kept here.
        """
        self.freeze()
        with self._talking:
            if self._exit is not None:
                raise InfrastructureFailure("the container is closed and its files are gone")
            try:
                return take(self._engine, self.name, names, destination, max_bytes)
            except OSError as error:
                raise InfrastructureFailure(f"what was left cannot be kept: {error}") from error

    def log(self) -> tuple[str, bool]:
        """Return the end of what was printed, and whether more was cut off."""
        with self._talking:
            with contextlib.suppress(InterruptedError):
                self._drain()
            return self._stream.log.text(), self._stream.log.truncated

    def close(self) -> Exit:
        """Kill the container, verify that nothing of it runs, remove its files. Idempotent.

        The engine's records of it may take a moment longer, for which the sandbox waits when it
        starts another or is closed. Where the engine did not say in time whether it had made one,
        and makes it later still, the sandbox removes it when that is closed, or else the next
        harness.

        Raises:
            InfrastructureFailure: it is still there, or nobody can tell.
        """
        with self._interrupting:
            if self._interrupt >= 0:
                os.eventfd_write(self._interrupt, 1)
        with self._talking:
            if self._exit is not None:
                return self._exit
            os.eventfd_read(self._interrupt)  # who waited has stopped; who comes finds it closed
            try:
                with contextlib.suppress(InterruptedError):  # a second who closes
                    self._drain()
                ending = self._ending()
            finally:
                self._exit = Exit(code=None)
                self._stream.close()  # for what nobody reads, the engine would wait for seconds
                try:
                    self._removals.remove(self.name, REMOVE_SECONDS)
                finally:
                    self._release()
            self._exit = ending
            return ending

    @property
    def closed(self) -> bool:
        return self._exit is not None

    # --- starting

    def _create(self) -> None:
        if self._plan.volume is not None:
            options, labels = self._plan.volume
            self._engine.create_volume(self.name, options, labels)
        self._id = self._engine.create(self.name, self._plan.config)

    def _attach(self) -> None:
        self._stream.attach(self._engine.attach(self.name))

    def _run(self) -> None:
        self._engine.start(self.name)

    def _refuse_if_interrupted(self) -> None:
        if self._exit is None:
            poll = select.poll()
            poll.register(self._interrupt, select.POLLIN)
            if not poll.poll(0):
                return
        raise InterruptedError("the sandbox was closed")

    # --- the stream

    def _channel(self) -> Stream:
        if self._exit is not None:
            raise EOFError("the container is closed")
        if self._plan.zone is not Zone.MODEL:
            raise InfrastructureFailure("only a MODEL program has a channel")
        return self._stream

    def _await(self, done: Callable[[], bool], deadline: float, wanted_bytes: int = 0) -> None:
        """Read until something is the case.

        Args:
            wanted_bytes: of answers, to be read even if they are many.

        Raises:
            TimeoutError: the deadline passed.
            InterruptedError: the container is being closed.
        """
        while not done():
            late = time.monotonic() >= deadline  # what has come by then counts
            self._pump(deadline, wanted_bytes=wanted_bytes)
            if late and not done():
                raise TimeoutError("the deadline passed")

    def _pump(self, deadline: float, events: int = select.POLLIN, wanted_bytes: int = 0) -> int:
        """See `Stream.pump`; meanwhile, look now and then at what the container uses."""
        until = min(deadline, self._sampled_at + SAMPLE_SECONDS)
        told = self._stream.pump(until, events, wanted_bytes)
        if self._stream.status is not None:
            self._usage.end()
        if time.monotonic() >= self._sampled_at + SAMPLE_SECONDS:
            self._sample()
        return told

    def _drain(self) -> None:
        """Read what was printed and is on its way."""
        if not self._stream.attached:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._stream.over and self._stream.status is None:
            quiet_at = time.monotonic() + QUIET_SECONDS
            told = self._pump(quiet_at)
            if time.monotonic() >= (deadline if told else min(deadline, quiet_at)):
                return

    # --- how it is, and how it ended

    def _has_ended(self) -> bool:
        if self._exit is not None or self._stream.status is not None or self._stream.over:
            return True
        # A program that floods its channel may have ended behind what nobody reads.
        return self._stream.is_full() and self._is_running() is False

    def _is_running(self) -> bool | None:
        """Return whether the container runs; None where the engine does not say."""
        try:
            state = self._engine.state(self.name)
        except EngineFailure:
            return None
        return state is not None and state.running

    def _pause(self) -> None:
        for tries_left in reversed(range(PAUSE_TRIES)):
            try:
                self._engine.pause(self.name)
                return
            except EngineFailure:
                if self._has_stopped():
                    return
                if not tries_left:
                    raise

    def _has_stopped(self) -> bool:
        """Say whether nothing in the container can run any more, waiting for news of it."""
        deadline = time.monotonic() + (SETTLE_SECONDS if self._stream.over else QUIET_SECONDS)
        while True:
            state = self._engine.state(self.name)
            if state is None or state.paused or not state.running:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(QUIET_SECONDS)

    def _ending(self) -> Exit:
        """Say how the container ended, as far as somebody knows."""
        self._sample()
        cpu_seconds, run_delay_seconds = self._usage.totals()
        witnesses = Witnesses(
            self._engine, self.name, self._id, self._began, self._stream, self._books, self._killed
        )
        code, starved = witnesses.verdict()
        return Exit(
            code=code,
            out_of_memory=starved or code == OUT_OF_MEMORY_CODE,
            cpu_seconds=cpu_seconds,
            run_delay_seconds=run_delay_seconds,
        )

    def _sample(self) -> None:
        self._sampled_at = time.monotonic()
        if self._books is not None:
            self._usage.sample(self._pids())

    def _pids(self) -> list[int]:
        return [] if self._books is None else self._books.pids()

    def _cpu_seconds(self, pids: list[int]) -> float:
        return 0.0 if self._books is None else self._books.cpu_seconds()

    def _release(self) -> None:
        """Give back what we hold ourselves."""
        self._stream.close()
        with self._interrupting:
            if self._interrupt >= 0:
                os.close(self._interrupt)
            self._interrupt = -1
        with contextlib.suppress(OSError):  # the sandbox tries again when it is closed
            self._work.remove()
