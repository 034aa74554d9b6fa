"""What holds a candidate: resource limits, an unprivileged user, and a house of its own.

Reads: the order of one launch; mount points.
Writes: nothing but the state of the calling process and its mount namespace.
Never: runs a genome byte; everything here happens before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darwin_exp.protocols import SandboxUnavailable

PASSED_ON = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
MAX_OPEN_FILES = 4096
UID_STRIDE = 256  # launches that overlap, in this run or another, get uids this far apart
MAX_OVERLAPPING = 64

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, 0x8000, 1


@dataclass(frozen=True)
class Order:
    """One launch as the supervisor is told of it; travels as JSON.

    Attributes:
        folder: the working folder.
        zone: "train" or "model".
        command: what to execute inside; None to go on as the launcher in the forked interpreter.
        cpus: the CPUs of the slot.
        uid: first unprivileged user id to try; None where the harness is not root.
        environment: all that the candidate will find in its environment.
        private: whether to give it a house: no network, a read-only world, its own /tmp.
        threads: compute threads.
        address_space_bytes: limit of each process's address space; None for none (CUDA needs it).
    """

    folder: str
    zone: str
    command: Sequence[str] | None
    cpus: Sequence[int]
    uid: int | None
    environment: Mapping[str, str]
    private: bool
    threads: int
    memory_bytes: int
    address_space_bytes: int | None
    file_bytes: int
    max_processes: int
    log_bytes: int


def allowed_environment(threads: int) -> dict[str, str]:
    """Return what an interpreter on the untrusted side may know: an allowlist, never a key."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    # Equal seeds must give equal runs, and a set of strings has the order of its hashes.
    environment["PYTHONHASHSEED"] = "0"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


# --- ties between parent and child ------------------------------------------------------------


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel to signal this process when its parent ends.

    A change of credentials cancels the request, so it is made again afterwards.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, daemons included."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


# --- the unprivileged user --------------------------------------------------------------------


def claim_uid(first: int) -> tuple[int, socket.socket]:
    """Reserve a user id that no process runs as, and that no other launch has reserved.

    It makes "every process of this user" mean "every process of this group", which the kernel
    can stop, kill and count at one stroke. Hold the socket as long as the id is in use.

    Raises:
        OSError: every id that might be tried is taken.
    """
    for uid in range(first, first + UID_STRIDE * MAX_OVERLAPPING, UID_STRIDE):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0candidate-uid-{uid}")
        except OSError:
            claim.close()
            continue
        if not has_processes(uid):
            return uid, claim
        claim.close()
    raise OSError(f"no user id is free from {first} on in steps of {UID_STRIDE}")


def has_processes(uid: int) -> bool:
    """Say whether any process runs as a user, ended ones included that nobody waited for."""
    try:
        # The kernel looks through all processes for it, newcomers last, so that none can hide.
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def become(uid: int) -> None:
    """Give up root for good: no groups, no capabilities, nothing to come back with."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def become_signaller(uid: int) -> None:
    """Give up root for good, to reach every process of a user without being reached by any.

    Whom we may signal depends on our effective user; who may signal us, on the real and the
    saved one, which belong to nobody else. So the user's processes cannot stop us first.

    Source: the manual page kill(2).
    """
    shield = uid + UID_STRIDE // 2
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(shield, uid, shield)


def signal_user(uid: int, signal_number: int) -> None:
    """Signal every process of a user at one stroke, so that none can slip away by forking."""
    helper = os.fork()
    if helper == 0:
        try:
            become_signaller(uid)
            os.kill(-1, signal_number)
        except ProcessLookupError:
            pass
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


# --- the candidate's own process --------------------------------------------------------------


def confine(order: Order, uid: int | None, descriptors: Mapping[int, int], processes: int) -> None:
    """Turn the calling process, a fresh child of the supervisor, into a confined candidate.

    Args:
        uid: the claimed user id; None to stay who we are.
        descriptors: the descriptor to keep by the number it shall have; all others are closed.
        processes: tasks that the user already runs; they count against the same limit.
    """
    supervisor = os.getppid()
    os.setsid()
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.sched_setaffinity(0, order.cpus)
    # Where the whole machine runs out of memory, the candidate goes before anything of ours.
    Path("/proc/self/oom_score_adj").write_text("1000")
    if order.private:
        enter_private_house(Path(order.folder))
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _limit(resource.RLIMIT_FSIZE, order.file_bytes)
    _limit(resource.RLIMIT_NPROC, order.max_processes + processes)
    if order.address_space_bytes is not None:
        _limit(resource.RLIMIT_AS, order.address_space_bytes)
    _place_descriptors(descriptors)
    os.umask(0o077)
    os.chdir(order.folder)
    os.environ.clear()
    os.environ.update(order.environment)
    if uid is not None:
        become(uid)
        die_with_parent(signal.SIGKILL)
        # Else /proc/self would be root's, as after any change of user without an exec.
        _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if os.getppid() != supervisor:
        os._exit(1)  # it died before we asked to die with it


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _place_descriptors(descriptors: Mapping[int, int]) -> None:
    """Move descriptors to the numbers they shall have and close every other one."""
    above = max(descriptors) + 1
    parked = {
        number: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above)
        for number, descriptor in descriptors.items()
    }
    for number, descriptor in parked.items():
        os.dup2(descriptor, number, inheritable=True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in descriptors:
            # One of them is that through which the folder was listed, and closed by now.
            with contextlib.suppress(OSError):
                os.close(int(name))


# --- the house --------------------------------------------------------------------------------


def build_house(needed: Iterable[Path], hidden: Iterable[Path], uid: int) -> bool:
    """Give this process and its children a view of the file system made for candidates.

    Folders that `uid` cannot traverse hide what lies below even where that is public, as a
    private home does with an interpreter in it. Each is covered by an empty folder into which
    only what is needed is bound back. `hidden` folders are covered in the same way, and hidden
    files, as far as they exist by now, by an empty one.

    Args:
        needed: folders that candidates must be able to use; those below a covered folder stay
            writable for root only by their own modes.

    Returns:
        False where the kernel does not let us; then only file modes protect anything.

    Raises:
        SandboxUnavailable: the house was begun and cannot be finished.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        return False
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        _set_mount_attributes("/", bytes(32), recursive=False)  # fails before Linux 5.12
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            return False
        raise
    try:
        wanted = _both_spellings(needed)
        concealed = _outermost(path.resolve() for path in hidden)
        blocked = (folder for path in wanted for folder in _untraversable(path, uid))
        for cover in _outermost(blocked):
            _cover(cover, [path for path in wanted if cover in path.parents])
        for path in concealed:  # those that a cover has not taken away already
            if path.is_dir():
                _cover(path, [kept for kept in wanted if path in kept.parents])
            elif path.exists():
                _mount(os.devnull, str(path), None, _MS_BIND)
    except OSError as error:
        # To go on half-built would leave open what other mounts make look closed.
        raise SandboxUnavailable(f"the candidates' view of the files failed at {error}") from error
    return True


def enter_private_house(folder: Path) -> None:
    """Cut this process off: nothing to write to but its own folders, and nobody to talk to.

    The whole file system becomes read-only but for `out/` and `tmp/` of the working folder; the
    latter stands in for /tmp, /var/tmp and /dev/shm, where only the interpreter stays to be seen if
    it lives there. There is no network, not even loopback, no shared System V memory, and no
    process of another user to be seen.

    Raises:
        OSError: the kernel does not let us.
    """
    if _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    temp = os.open(folder / "tmp", os.O_PATH | os.O_DIRECTORY)
    _set_read_only("/", recursive=True)
    kept = [folder, *_both_spellings(interpreter_folders())]
    for public in (Path("/var/tmp"), Path("/dev/shm"), Path("/tmp")):
        if not public.is_dir() or public.is_symlink():
            continue
        within = _outermost(path for path in kept if public in path.parents)
        handles = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in within}
        _mount(f"/proc/self/fd/{temp}", str(public), None, _MS_BIND)
        _set_writable(str(public))
        for path, handle in handles.items():
            path.mkdir(parents=True, mode=0o755)  # a mount point, inside the private /tmp
            _mount(f"/proc/self/fd/{handle}", str(path), None, _MS_BIND | _MS_REC)
            _set_read_only(str(path), recursive=True)
            os.close(handle)
    for name in ("out", "tmp"):
        inside = str(folder / name)
        _mount(inside, inside, None, _MS_BIND)
        _set_writable(inside)
    os.close(temp)
    with contextlib.suppress(OSError):  # before Linux 5.8, names of other processes stay visible
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "hidepid=2")


def can_enter(path: Path, uid: int) -> bool:
    """Say whether a user without groups may traverse and list a folder, by trying it."""
    child = os.fork()
    if child == 0:
        try:
            become(uid)
            os.listdir(path)
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def interpreter_folders() -> list[Path]:
    """Return the folders that this interpreter and its packages live in."""
    prefixes = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    packages = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [Path(entry) for entry in dict.fromkeys([*prefixes, *packages]) if Path(entry).is_dir()]


def _both_spellings(paths: Iterable[Path]) -> list[Path]:
    """Return each folder as it is spelt and as it is after symlinks, parents first."""
    spelt = {spelling for path in paths for spelling in (path.absolute(), path.resolve())}
    return sorted(spelt)


def _untraversable(path: Path, uid: int) -> Iterator[Path]:
    for ancestor in reversed(path.parents):
        status = ancestor.stat()
        if not stat.S_IMODE(status.st_mode) & (0o100 if status.st_uid == uid else 0o001):
            yield ancestor.resolve()


def _outermost(paths: Iterable[Path]) -> list[Path]:
    chosen: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path == other or other in path.parents for other in chosen):
            chosen.append(path)
    return chosen


def _cover(cover: Path, kept: Sequence[Path]) -> None:
    """Mount an empty folder over `cover` and bind the kept folders below it back in."""
    tops = _outermost(kept)
    handles = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in tops}
    _mount("none", str(cover), "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    for path, handle in handles.items():
        path.mkdir(parents=True, mode=0o755)
        _mount(f"/proc/self/fd/{handle}", str(path), None, _MS_BIND | _MS_REC)
        os.close(handle)
    _set_read_only(str(cover))


# --- mounts -----------------------------------------------------------------------------------


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {target}")


def _set_read_only(target: str, recursive: bool = False) -> None:
    _set_mount_attributes(target, struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0), recursive)


def _set_writable(target: str) -> None:
    _set_mount_attributes(target, struct.pack("QQQQ", 0, _MOUNT_ATTR_RDONLY, 0, 0), False)


def _set_mount_attributes(target: str, attributes: bytes, recursive: bool) -> None:
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, -1, os.fsencode(target), flags, attributes, len(attributes)
    )
    _check(result, f"mount_setattr {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
