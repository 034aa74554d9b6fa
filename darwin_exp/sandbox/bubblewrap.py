"""The bubblewrap sandbox: every candidate in namespaces of its own, with no network.

It sees the interpreter, its own working folder as /job, a private /tmp and nothing else of this
machine, and it needs no privilege to be started. The price is an import of torch per launch.

Source: bubblewrap's manual page for what its options mean.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from darwin_exp.protocols import Launch, SandboxUnavailable, Zone
from darwin_exp.sandbox.confinement import interpreter_folders
from darwin_exp.sandbox.launcher import WARM_MODULES
from darwin_exp.sandbox.supervised import SERVER, SupervisedSandbox

DEFAULT_UID = 64_000
TRIAL_UID = 65_534  # nobody; a candidate's user may at any time have all its processes killed
INSIDE = "/job"
_ROOT_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SYSTEM_FILES = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
)
_CUDA_DEVICES = "nvidia*"


class BubblewrapSandbox(SupervisedSandbox):
    """Runs candidates in unprivileged containers made by `bwrap`."""

    name: ClassVar[str] = "bubblewrap"
    forks: ClassVar[bool] = False

    def __init__(
        self,
        slot: int,
        cpus: tuple[int, ...],
        uid: int = DEFAULT_UID,
        server: Path = SERVER,
        hidden: tuple[Path, ...] = (),
        modules: tuple[str, ...] = WARM_MODULES,
    ) -> None:
        """See `SupervisedSandbox`; of `hidden`, only what lies in a folder shown needs hiding."""
        super().__init__(slot, cpus, uid, server, hidden, modules)
        self._hidden = tuple(path.resolve() for path in hidden)

    @classmethod
    def check(cls) -> None:
        """Find out whether it can work here, by running `bwrap` once.

        Raises:
            SandboxUnavailable: it cannot; the message says what would mend it.
        """
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailable(
                "sandbox=bubblewrap needs the program bwrap: apt-get install bubblewrap"
            )
        trial = _try(bwrap, _namespaces())
        if trial.returncode != 0:
            raise SandboxUnavailable(
                f"sandbox=bubblewrap: {trial.stderr.strip() or 'bwrap failed'}; allow user "
                "namespaces without privileges (sysctl user.max_user_namespaces above 0, "
                "kernel.unprivileged_userns_clone=1, "
                "kernel.apparmor_restrict_unprivileged_userns=0)"
            )

    @property
    def isolated(self) -> bool:
        return True

    def _places(self, folder: Path) -> dict[str, str]:
        return {"HOME": "/tmp", "TMPDIR": "/tmp"}

    def _command(self, launch: Launch, folder: Path) -> list[str] | None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxUnavailable("bwrap is gone: apt-get install bubblewrap")
        arguments = [bwrap, *_namespaces(), *_no_nesting(bwrap), *_system_binds()]
        for place in ("/tmp", "/dev/shm"):  # before the interpreter, which may live in one of them
            arguments += ["--bind", str(folder / "tmp"), place]
        arguments += [*_interpreter_binds(), *_covers(self._hidden)]
        if launch.limits.device != "cpu":
            arguments += _device_binds()
        arguments += ["--ro-bind", str(self._programs), "/programs"]
        for name in ("job.json", "code", "in"):
            arguments += ["--ro-bind", str(folder / name), f"{INSIDE}/{name}"]
        arguments += ["--bind", str(folder / "out"), f"{INSIDE}/out"]
        # What bwrap itself mounted lies in memory that no limit counts.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", INSIDE]
        arguments += [sys.executable, "-s", "-P", "/programs/launcher.py", launch.zone.value]
        arguments += [str(launch.limits.threads), ",".join(self._modules)]
        if launch.zone is Zone.MODEL:
            arguments += [f"/programs/{self._server_file.name}"]
        return arguments


def _namespaces() -> list[str]:
    return [
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]


def _try(bwrap: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `true` in a container with the given options."""
    # As root, candidates start it as a user without rights, so that is what must work.
    unprivileged = {"user": TRIAL_UID, "group": TRIAL_UID, "extra_groups": []}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [bwrap, *options, *_system_binds(), "/usr/bin/env", "true"],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        **(unprivileged if os.geteuid() == 0 else {}),
    )


@functools.cache
def _no_nesting(bwrap: str) -> tuple[str, ...]:
    """Return what keeps candidates from making user namespaces; nothing where bwrap cannot.

    In one of its own a candidate could mount file systems in memory that no limit counts. Bwrap
    knows the option since 0.8, and needs to write to /proc/sys for it.
    """
    options = ("--unshare-user", "--disable-userns")
    return options if _try(bwrap, [*_namespaces(), *options]).returncode == 0 else ()


def _system_binds() -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in _ROOT_FOLDERS:
        folder = Path("/") / name
        if folder.is_symlink():
            yield from ("--symlink", os.readlink(folder), str(folder))
        elif folder.is_dir():
            yield from ("--ro-bind", str(folder), str(folder))
    for file in _SYSTEM_FILES:
        yield from ("--ro-bind-try", file, file)


def _interpreter_binds() -> Iterator[str]:
    for folder in _shown_folders():
        if folder != Path("/usr"):
            yield from ("--ro-bind", str(folder), str(folder))


def _shown_folders() -> list[Path]:
    shown = [Path("/usr")]
    for folder in _spelt_interpreter_folders():
        if not any(folder.is_relative_to(parent) for parent in shown):
            shown.append(folder)
    return shown


def _spelt_interpreter_folders() -> list[Path]:
    folders = interpreter_folders()
    return sorted({path for folder in folders for path in (folder, folder.resolve())})


def _covers(hidden: Iterable[Path]) -> Iterator[str]:
    """Cover what is hidden in folders that are shown, but for the interpreter in it."""
    for path in hidden:
        for folder in _shown_folders():
            if path == folder or not path.is_relative_to(folder.resolve()):
                continue
            inside = folder / path.relative_to(folder.resolve())
            if path.is_dir():
                yield from ("--tmpfs", str(inside))
                for kept in _spelt_interpreter_folders():
                    if kept.is_relative_to(inside):
                        yield from ("--ro-bind", str(kept), str(kept))
                yield from ("--remount-ro", str(inside))
            elif path.exists():
                yield from ("--ro-bind", os.devnull, str(inside))


def _device_binds() -> Iterator[str]:
    for device in sorted(Path("/dev").glob(_CUDA_DEVICES)):
        yield from ("--dev-bind", str(device), str(device))
    yield from ("--ro-bind-try", "/sys", "/sys")
