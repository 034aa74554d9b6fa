"""The trial before the first candidate: can the engine here hold one as it shall?

Reads: what the engine says of itself and of the image; whether this machine has swap.
Writes: one container and one volume, which it removes again.
Never: settles for less than candidates need; what is missing is an error that names its cure.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from darwin_exp.individual import SandboxSpec
from darwin_exp.protocols import Limits, SandboxUnavailable
from darwin_exp.sandbox import reaping
from darwin_exp.sandbox.container import REMOVE_SECONDS
from darwin_exp.sandbox.engine import Engine
from darwin_exp.sandbox.engine_calls import EngineFailure, NotThere
from darwin_exp.sandbox.profile import (
    INSIDE,
    OUT,
    PROGRAMS,
    Housing,
    container_config,
    volume_options,
)
from darwin_exp.sandbox.reaping import OWNER_FILE

TRIAL_SECONDS = 10.0  # how long a container may take that does nothing
# What the engine can only ask the kernel for; where it cannot, it warns and goes on without.
_NEEDED_LIMITS = {
    "MemoryLimit": "memory",
    "PidsLimit": "processes",
    "CPUSet": "which CPUs are used",
}
_SWAPS = Path("/proc/swaps")  # a heading, and what there is
_OLD_CODE, _SHUT_CODE, _OPEN_CODE = 3, 4, 5
_TRIAL = f"""
import os, socket, sys
if sys.version_info < (3, 11):
    sys.exit({_OLD_CODE})
try:
    os.listdir("{PROGRAMS}")
    os.listdir("{INSIDE}")
    open("{OUT}/trial", "w").close()
except OSError:
    sys.exit({_SHUT_CODE})
if socket.socket(socket.AF_UNIX).connect_ex("\\0" + sys.argv[1]) == 0:
    sys.exit({_OPEN_CODE})
"""


def examine(engine: Engine, options: SandboxSpec) -> None:
    """Find out whether the engine can hold candidates as it shall.

    Raises:
        SandboxUnavailable: it cannot; the message says what would mend it.
        EngineFailure: it does not answer.
    """
    info = engine.info()
    _examine_image(engine, options.image)
    runtimes = info.get("Runtimes") or {}
    if options.runtime is not None and options.runtime not in runtimes:
        raise SandboxUnavailable(
            f"the container engine has no runtime {options.runtime!r}, only {_listed(runtimes)}; "
            "register it in /etc/docker/daemon.json and restart the engine"
        )
    unlimited = [what for key, what in _NEEDED_LIMITS.items() if not info.get(key)]
    if not info.get("SwapLimit") and _has_swap():
        raise SandboxUnavailable(
            "the container engine cannot limit swap on this machine, which has some; do without "
            "(swapoff -a), or boot with swapaccount=1 or control groups of version 2"
        )
    if unlimited:
        raise SandboxUnavailable(
            f"the container engine cannot limit {_listed(unlimited)} on this machine; run it as "
            "root, or on a kernel with control groups of version 2 delegated to its user"
        )
    filtered = any(
        "name=seccomp" in option and "profile=unconfined" not in option
        for option in info.get("SecurityOptions") or ()
    )
    if not filtered and options.runtime is None:
        raise SandboxUnavailable(
            "the container engine does not filter system calls; use one with seccomp, or a "
            "stronger sandbox.runtime"
        )
    _try_once(engine, options)


def _examine_image(engine: Engine, image: str) -> None:
    if not image:
        raise SandboxUnavailable("there is no training image; run `make image`")
    try:
        config = engine.image(image).get("Config") or {}
    except NotThere as missing:
        raise SandboxUnavailable(
            f"the container engine has no image {image}, and none is ever fetched for a run; run "
            "`make image`"
        ) from missing
    if config.get("Volumes"):
        raise SandboxUnavailable(
            f"the image {image} declares volumes ({_listed(config['Volumes'])}), and nothing would "
            "limit their size; use one without"
        )


def _try_once(engine: Engine, options: SandboxSpec) -> None:
    """Start a container as candidates get it, and remove it.

    It is given folders that were made just now, which the engine refuses where it does not see our
    files: in a virtual machine, or when we are ourselves in a container. That they can be read, and
    a volume written to, is tried from inside, because engines that map users may forbid it; and
    that it is in no network of ours, by a socket that can be reached from nowhere else.
    """
    token = f"trial-{secrets.token_hex(6)}"
    with (
        tempfile.TemporaryDirectory(prefix="candidates-trial-") as folder,
        reaping.alive(token),
        socket.socket(socket.AF_UNIX) as door,
    ):
        door.bind(f"\0{token}")
        door.listen()
        Path(folder, OWNER_FILE).write_text(reaping.owner())
        programs, job = Path(folder, "programs"), Path(folder, "job")
        for path in (programs, job, job / "out"):
            path.mkdir()
        for path in (Path(folder), programs, job):
            path.chmod(0o755)
        housing = Housing(
            image=options.image,
            runtime=options.runtime,
            gpu=options.gpus[0] if options.gpus else None,
            cpus=tuple(sorted(os.sched_getaffinity(0)))[:1],
            programs=programs,
            labels=reaping.ownership(token, 0.0),
        )
        command = ["-I", "-S", "-c", _TRIAL, token]
        try:
            engine.create_volume(token, volume_options(Limits()), housing.labels)
            engine.create(token, container_config(housing, command, Limits(), job, token))
            engine.start(token)
            _await_success(engine, token)
        except EngineFailure as failure:
            raise SandboxUnavailable(_cure(failure, folder, options)) from failure
        finally:
            with contextlib.suppress(EngineFailure):
                engine.purge(token, REMOVE_SECONDS)


def _await_success(engine: Engine, name: str) -> None:
    deadline = time.monotonic() + TRIAL_SECONDS
    while (state := engine.state(name)) is not None and state.running:
        if time.monotonic() > deadline:
            raise EngineFailure("a container that does nothing came to no end")
        time.sleep(0.02)
    if state is not None and state.exit_code == _SHUT_CODE:
        raise SandboxUnavailable(
            "a container cannot read the files that it is given, or not write to its volume; where "
            "SELinux is enforced, set TMPDIR to a folder labelled container_file_t"
        )
    if state is not None and state.exit_code == _OPEN_CODE:
        raise SandboxUnavailable(
            "a container is in the network of this machine; use an engine that gives each one of "
            "its own, such as Docker"
        )
    if state is None or state.exit_code != 0:
        raise SandboxUnavailable(
            "python3 of the image is older than 3.11, or does not run; run `make image`"
        )


def _cure(failure: EngineFailure, folder: str, options: SandboxSpec) -> str:
    said = str(failure)
    if folder in said:
        return (
            f"the container engine does not see our files ({said}); use one that runs on this "
            "very machine, or a TMPDIR that both see"
        )
    if options.gpus and "device driver" in said:
        return (
            f"the container engine has no GPUs to give ({said}); install nvidia-container-toolkit, "
            "or use sandbox.device=cpu"
        )
    if options.runtime is not None:
        return f"no container starts with the runtime {options.runtime!r}: {said}"
    return f"no container starts as candidates need it: {said}"


def _has_swap() -> bool:
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except OSError:
        return False


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
