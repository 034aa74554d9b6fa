"""Who owns a container, and what becomes of those whose owner is gone.

Every container and volume carries its owner's name from the moment the engine knows of it: the
engine's own record is the ledger, and no kill of the harness falls between making and noting.

Reads: labels in the engine, /proc, the folder for temporary files.
Writes: nothing; removes containers, volumes and working folders of dead owners.
Never: touches what a living process owns, or what it cannot tell to be dead before it is long
past its deadline.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from darwin_exp.sandbox.engine import Engine
from darwin_exp.sandbox.engine_calls import EngineFailure
from darwin_exp.sandbox.workfolder import remove_tree

OWNER_LABEL, SANDBOX_LABEL, DEADLINE_LABEL = "darwin.owner", "darwin.sandbox", "darwin.deadline"
OWNER_FILE = "owner"  # in the root of working folders, which no label would lead to
REMOVE_SECONDS = 10.0
LONG_PAST_SECONDS = 6 * 3600.0
PROC = Path("/proc")

_living: set[str] = set()  # the sandboxes of this process, by token
_mutex = threading.Lock()


def owner() -> str:
    """Return a name of this process that no other ever has, on this machine or after a reboot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{boot}:{namespace}:{os.getpid()}:{_started(os.getpid())}"


def ownership(token: str, lifetime_seconds: float) -> dict[str, str]:
    """Return the labels of what this process makes and means to remove.

    Args:
        token: of what it is made for; see `alive`.
        lifetime_seconds: how long it is needed at most.
    """
    return {
        OWNER_LABEL: owner(),
        SANDBOX_LABEL: token,
        DEADLINE_LABEL: f"{time.time() + lifetime_seconds:.0f}",
    }


@contextlib.contextmanager
def alive(token: str) -> Iterator[None]:
    """Keep what carries a token from being reaped within this context."""
    register(token)
    try:
        yield
    finally:
        unregister(token)


def register(token: str) -> None:
    """Note that a sandbox of this process lives, by its token."""
    with _mutex:
        _living.add(token)


def unregister(token: str) -> None:
    """Note that a sandbox is gone: whatever still carries its token may be reaped."""
    with _mutex:
        _living.discard(token)


def reap(engine: Engine) -> list[str]:
    """Remove what dead owners left; return the names of containers and volumes removed.

    What resists is left to the next who tries.
    """
    reaped = []
    found = engine.labelled(OWNER_LABEL)
    # A container and its volume have one name.
    for name in {each.name for each in found if is_orphan(each.labels, time.time())}:
        with contextlib.suppress(EngineFailure):
            engine.purge(name, REMOVE_SECONDS)
            reaped.append(name)
    _remove_folders()
    return reaped


def is_orphan(labels: Mapping[str, str], now: float) -> bool:
    """Say whether the owner of a container or volume is gone.

    Args:
        now: in seconds since 1970.
    """
    name = labels.get(OWNER_LABEL, "")
    if name == owner():
        with _mutex:
            return labels.get(SANDBOX_LABEL, "") not in _living
    dead = is_dead(name)
    if dead is not None:
        return dead
    try:
        deadline = float(labels.get(DEADLINE_LABEL, ""))
    except ValueError:
        return False
    return now > deadline + LONG_PAST_SECONDS


def is_dead(name: str) -> bool | None:
    """Say whether an owner is gone; None where nobody here can tell.

    An engine that sees our files runs on our machine, and so did whoever used it before: an owner
    of another boot did not survive it. One in another process namespace may be alive, and so may
    one that /proc hides from us.
    """
    ours, parts = owner().split(":"), name.split(":")
    if len(parts) != len(ours):
        return None
    boot, namespace, pid, started = parts
    if boot != ours[0]:
        return True
    if namespace != ours[1] or not pid.isdecimal():
        return None
    found = _started(int(pid))
    return None if found is None else found != started


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; "" if it has ended, None if hidden.

    Where /proc is mounted with hidepid, those of other users are.
    """
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            pass
        return None
    # The name stands in parentheses and may itself hold anything, parentheses included.
    fields = text[text.rindex(b")") + 2 :].split()
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _remove_folders() -> None:
    """Remove the working folders of sandboxes whose harness was killed outright."""
    for note in Path(tempfile.gettempdir()).glob(f"candidates-*/{OWNER_FILE}"):
        with contextlib.suppress(OSError):
            ours = note.lstat().st_uid == os.geteuid() and not note.parent.is_symlink()
            if ours and is_dead(note.read_text()):
                remove_tree(note.parent)
