"""The warm interpreter: imports torch once and forks a supervisor for every launch.

It runs in a clean environment, as root where the harness is root, and stays single-threaded. No
genome byte ever runs in it; a candidate is the child of a child.

Reads: launch orders.
Writes: one message when its house is built, one when it is warm; in the end, removes all working
folders.
Never: runs a torch operation, which would start threads that do not survive a fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwin_exp.protocols import SandboxUnavailable
from darwin_exp.sandbox import confinement, launcher, supervision
from darwin_exp.sandbox.confinement import Order
from darwin_exp.sandbox.processes import descendants
from darwin_exp.sandbox.wire import Wire
from darwin_exp.sandbox.workfolder import remove_tree

REAP_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """What a fork server is told when it starts; travels as JSON.

    Attributes:
        modules: what to import before the first candidate is forked.
        uid: first unprivileged user id; None where the harness is not root.
        server: file of the program that answers for a model, to be loaded before as well.
        root: folder below which all working folders will lie.
        hidden: folders and files that no candidate shall see.
    """

    modules: list[str]
    uid: int | None
    server: str
    root: str
    hidden: list[str]


def main(control: Wire, settings: Settings) -> None:
    """Build the house, warm up and serve launches until the harness is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the harness's to act on
    os.umask(0o022)
    confinement.adopt_orphans()
    housed, obstacle = _settle_in(settings)
    control.send({"housed": housed, "obstacle": obstacle})
    if obstacle:
        return
    serve: launcher.Serve | None = None
    if settings.modules:
        launcher.warm_up(settings.modules)
    if Path(settings.server).is_file():
        serve = launcher.load_server(Path(settings.server))
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page that a fork shares
    control.send({"warm": True})

    def launch(order: Order) -> int:
        _forget_harness()
        return launcher.launch(order.zone, order.threads, serve)

    candidate = _serve(control, launch, Path(settings.root))
    if candidate is not None:
        launcher.end(candidate())


def _settle_in(settings: Settings) -> tuple[bool, str]:
    """Build the house; return whether there is one, and what makes launches impossible."""
    if settings.uid is None:
        return False, ""
    needed = [*confinement.interpreter_folders(), Path(settings.root)]
    hidden = [Path(path) for path in settings.hidden]
    try:
        housed = confinement.build_house(needed, hidden, settings.uid)
    except SandboxUnavailable as obstacle:
        return False, str(obstacle)
    for folder in confinement.interpreter_folders():
        if not confinement.can_enter(folder, settings.uid):
            return housed, (
                f"user {settings.uid} cannot read the interpreter's folder {folder}: install "
                "Python and the environment where every user may read them, or allow this "
                "process to make mount namespaces (CAP_SYS_ADMIN)"
            )
    return housed, ""


def _serve(control: Wire, launch: Callable[[Order], int], root: Path) -> Callable[[], int] | None:
    """Fork a supervisor per order; return, in a candidate, what it shall do."""
    supervisors: set[int] = set()
    poll = select.poll()
    poll.register(control.fileno(), select.POLLIN)
    while True:
        if poll.poll(REAP_SECONDS * 1000):
            try:
                message, descriptors = control.receive_with_descriptors()
            except (EOFError, OSError):
                break
            parent = os.getpid()
            # A fork that fails costs this launch alone: its descriptors close, and that tells.
            with contextlib.suppress(OSError):
                supervisor = os.fork()
                if supervisor == 0:
                    control.close()
                    return _become_supervisor(parent, message, descriptors, launch)
                supervisors.add(supervisor)
            for descriptor in descriptors:
                os.close(descriptor)
        _reap(supervisors)
    # The harness is gone, or wants us gone; a supervisor that is told to end kills its group.
    for supervisor in supervisors:
        os.kill(supervisor, signal.SIGTERM)
    while supervisors:
        _reap(supervisors, wait=True)
    with contextlib.suppress(OSError):
        remove_tree(root)  # a harness that was killed cannot do it
    return None


def _become_supervisor(
    parent: int, message: dict[str, Any], descriptors: list[int], launch: Callable[[Order], int]
) -> Callable[[], int] | None:
    # Not SIGKILL: a supervisor that is told to end kills its group first.
    confinement.die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
    end, *channel = descriptors
    wire = supervision.connect(end)
    try:
        candidate = supervision.supervise(Order(**message), wire, channel, launch)
    except Exception as error:
        with contextlib.suppress(OSError):
            wire.send({"event": "failed", "message": f"{type(error).__name__}: {error}"})
        os._exit(1)
    if candidate is None:
        os._exit(0)
    return candidate


def _reap(supervisors: set[int], wait: bool = False) -> None:
    """Wait for ended supervisors; should one have been killed, kill what it leaves behind."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
            if pid == 0:
                return
            if pid in supervisors:
                supervisors.discard(pid)
                if status != 0:
                    _kill_orphans(supervisors)
                if wait:
                    return


def _kill_orphans(supervisors: set[int]) -> None:
    """Kill every descendant that is neither a supervisor nor below one."""
    mine = descendants(os.getpid())
    guarded = set(supervisors)
    for process in mine:  # parents come before children
        if process.parent in guarded:
            guarded.add(process.pid)
    for process in mine:
        if process.pid not in guarded:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _forget_harness() -> None:
    """Let nothing of the harness's package be found by the genome that is to run next."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "darwin_exp"]:
        del sys.modules[name]


def start(control_descriptor: int, settings: Settings) -> None:
    """Run as a program of its own; `ForkServer` in supervised.py says how."""
    main(Wire(socket.socket(fileno=control_descriptor)), settings)
    os._exit(0)
