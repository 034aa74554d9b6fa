"""What the sandboxes share: a fork server of their own, and groups started through it.

Reads: launches.
Writes: working folders.
Never: lets an environment variable that is not on the allowlist reach the untrusted side.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from darwin_exp.protocols import InfrastructureFailure, Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox import launcher
from darwin_exp.sandbox.confinement import Order, allowed_environment
from darwin_exp.sandbox.forkserver import Settings
from darwin_exp.sandbox.group import ANSWER_SECONDS, Group
from darwin_exp.sandbox.launcher import WARM_MODULES
from darwin_exp.sandbox.wire import Wire
from darwin_exp.sandbox.workfolder import WorkRoot

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).resolve().parents[1] / "evaluation" / "logits_server.py"
WARM_UP_SECONDS = 120.0
ADDRESS_SPACE_SPARE_MB = 8192  # torch maps far more than it touches
_PROGRAM = (
    "import sys; root = sys.argv[1]; sys.path.insert(0, root); import json;"
    "from darwin_exp.sandbox import forkserver; sys.path.remove(root);"
    "forkserver.start(int(sys.argv[2]), forkserver.Settings(**json.loads(sys.argv[3])))"
)


class ForkServer:
    """A running fork server; see forkserver.py."""

    def __init__(self, settings: Settings, root: Path) -> None:
        ours, theirs = socket.socketpair()
        environment = allowed_environment(threads=1)
        environment |= {"HOME": str(root), "TMPDIR": str(root), "USER": "candidate"}
        arguments = [str(PACKAGE_ROOT), str(theirs.fileno()), json.dumps(asdict(settings))]
        self._errors = (root / "forkserver.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", _PROGRAM, *arguments],
            env=environment,
            pass_fds=(theirs.fileno(),),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,  # a terminal's Ctrl-C is for the harness alone
        )
        theirs.close()
        self._wire = Wire(ours)
        self._lock = threading.Lock()
        self._warm = False

    @property
    def pid(self) -> int:
        """Its process id; every process of every group descends from it."""
        return self._process.pid

    def build_house(self) -> bool:
        """Wait for its first message; return whether candidates get a house of their own.

        Raises:
            SandboxUnavailable: no candidate could run; the message says what would mend it.
        """
        try:
            message = self._wire.receive(time.monotonic() + WARM_UP_SECONDS)
        except (EOFError, OSError) as error:
            raise SandboxUnavailable(f"the fork server did not start: {self._report()}") from error
        if message["obstacle"]:
            raise SandboxUnavailable(message["obstacle"])
        return bool(message["housed"])

    def warm_up(self, interrupt: int) -> None:
        """Wait until it has imported what it imports.

        Raises:
            InfrastructureFailure: it ended, took too long, or the sandbox was closed.
        """
        with self._lock:
            if not self._warm:
                try:
                    self._wire.receive(time.monotonic() + WARM_UP_SECONDS, interrupt)
                except (EOFError, OSError) as error:
                    raise InfrastructureFailure(f"no warm fork server: {self._report()}") from error
                self._warm = True

    def launch(self, order: Order, descriptors: Sequence[int]) -> None:
        """Have a supervisor forked for an order; it answers on the first descriptor."""
        with self._lock:
            try:
                self._wire.send(asdict(order), descriptors)
            except OSError as error:
                raise InfrastructureFailure(f"the fork server ended: {self._report()}") from error

    def close(self) -> None:
        """End it and wait until it has seen all its supervisors end. Idempotent."""
        self._wire.close()
        if not self._warm:
            self._process.kill()  # it would notice only after its imports, and has no children yet
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _report(self) -> str:
        with contextlib.suppress(ValueError, OSError):
            self._errors.seek(0)
            return self._errors.read().decode(errors="replace").strip()[-2000:]
        return "it was closed"


class SupervisedSandbox(ABC):
    """What sandboxes have in common that start groups through a fork server of their own."""

    name: ClassVar[str]
    forks: ClassVar[bool]  # whether candidates are forked from the fork server's own interpreter

    def __init__(
        self,
        slot: int,
        cpus: tuple[int, ...],
        uid: int,
        server: Path = SERVER,
        hidden: tuple[Path, ...] = (),
        modules: tuple[str, ...] = WARM_MODULES,
    ) -> None:
        """Start the fork server; it warms up while the caller goes on.

        Args:
            slot: number of the slot that this sandbox serves.
            cpus: the CPUs that its candidates may use.
            uid: unprivileged user of slot 0 where the harness is root; slot k gets `uid + k`.
            server: program that answers for a model; see launcher.py.
            hidden: folders and files that candidates shall not even see, where the kernel lets us
                hide them; those that do not exist by now stay visible.
            modules: what is imported before the ready signal, as far as it is installed.

        Raises:
            SandboxUnavailable: it cannot work here; the message says what would mend it.
        """
        self.check()
        self._cpus = cpus
        self._modules = modules
        self._uid = uid + slot if os.geteuid() == 0 else None
        self._root = WorkRoot()
        self._groups: set[Group] = set()
        self._closing = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._programs = self._root.path / "programs"
        self._programs.mkdir(mode=0o755)
        for program in (Path(launcher.__file__), server):
            if program.is_file():
                shutil.copyfile(program, self._programs / program.name)
                (self._programs / program.name).chmod(0o444)
        self._server_file = self._programs / server.name
        settings = Settings(
            modules=list(modules) if self.forks else [],
            uid=self._uid,
            server=str(self._server_file) if self.forks else "",
            root=str(self._root.path),
            hidden=[str(folder) for folder in hidden],
        )
        self._fork_server = ForkServer(settings, self._root.path)
        weakref.finalize(self, os.close, self._closing)
        self._end = weakref.finalize(self, _end, self._groups, self._fork_server, self._root)
        try:
            self._housed = self._fork_server.build_house()
        except BaseException:
            self._end()
            raise

    @classmethod
    @abstractmethod
    def check(cls) -> None:
        """Find out whether it can work here; raises SandboxUnavailable with the cure."""

    @property
    def isolated(self) -> bool:
        """Whether candidates have no network and see a file system made for them.

        A sandbox of which this is False leaves the network open and relies on file modes alone.
        """
        return self._housed

    def warm_up(self) -> None:
        """Wait until the fork server has imported what candidates will need.

        Raises:
            InfrastructureFailure: it ended, took too long, or the sandbox was closed.
        """
        self._fork_server.warm_up(self._closing)

    def start(self, launch: Launch) -> Group:
        """Start a program and return once it has signalled ready.

        Raises:
            InfrastructureFailure: it was not ready in time, or the sandbox was closed.
        """
        self._fork_server.warm_up(self._closing)
        started_at = time.monotonic()
        if launch.zone is Zone.MODEL and not self._server_file.is_file():
            raise InfrastructureFailure("there is no program that could answer for a model")
        try:
            own_copies = launch.zone is Zone.MODEL
            work = self._root.new_folder(launch.genome, launch.inputs, launch.job, own_copies)
            ours, theirs = socket.socketpair()
            descriptors, channel = [theirs.fileno()], None
            if launch.zone is Zone.MODEL:
                their_read, our_write = os.pipe()
                our_read, their_write = os.pipe()
                descriptors += [their_read, their_write]
                channel = (our_read, our_write)
            group = Group(work, Wire(ours), channel)
        except (OSError, ValueError) as error:
            raise InfrastructureFailure(f"cannot prepare a launch: {error}") from error
        self._groups.difference_update([old for old in list(self._groups) if old.closed])
        self._groups.add(group)
        try:
            try:
                if self._closed.is_set():
                    raise InfrastructureFailure("the sandbox was closed")
                self._fork_server.launch(self._order(launch, work.path), descriptors)
            finally:
                theirs.close()
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
            group.await_ready(started_at, started_at + launch.limits.startup_seconds)
        except BaseException:
            group.close()
            raise
        return group

    def close(self) -> None:
        """End every group that is still alive and give back what the sandbox holds. Idempotent."""
        self._closed.set()
        os.eventfd_write(self._closing, 1)
        with self._ending:
            self._end()

    @abstractmethod
    def _command(self, launch: Launch, folder: Path) -> list[str] | None:
        """Return what to execute for a launch; None to fork the warm interpreter."""

    def _places(self, folder: Path) -> dict[str, str]:
        """Return the environment variables that name places."""
        temp = "/tmp" if self._housed else str(folder / "tmp")
        return {"HOME": temp, "TMPDIR": temp}

    def _order(self, launch: Launch, folder: Path) -> Order:
        limits = launch.limits
        environment = allowed_environment(limits.threads) | self._places(folder)
        environment |= {"USER": "candidate", "LOGNAME": "candidate"}
        command = self._command(launch, folder)
        return Order(
            folder=str(folder),
            zone=launch.zone.value,
            command=command,
            cpus=self._cpus,
            uid=self._uid,
            environment=environment,
            private=self._housed and command is None,
            threads=limits.threads,
            memory_bytes=limits.memory_mb << 20,
            address_space_bytes=_address_space_bytes(limits),
            file_bytes=limits.file_mb << 20,
            max_processes=limits.max_processes,
            log_bytes=limits.log_bytes,
        )


def _address_space_bytes(limits: Limits) -> int | None:
    # CUDA maps all of the device's memory and more, whatever is used of it.
    if limits.device != "cpu":
        return None
    return (limits.memory_mb + ADDRESS_SPACE_SPARE_MB) << 20


def _end(groups: set[Group], fork_server: ForkServer, root: WorkRoot) -> None:
    for group in list(groups):
        with contextlib.suppress(InfrastructureFailure, OSError):
            group.close()
    fork_server.close()
    with contextlib.suppress(OSError):
        root.remove()
