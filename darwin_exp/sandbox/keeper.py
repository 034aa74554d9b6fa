"""The first process in a container: starts the launcher, and outlives it for the harness's sake.

A self-contained script (standard library only), mounted into the container beside the launcher.
Because it stays when training has ended, the container does, and with it the files in memory that
the harness has yet to collect. When its standard input is at its end, nobody is left to collect
them: it ends at once, and the container and every process in it with it.

A candidate has the same user. As the first process this one gets no signal from inside, SIGKILL and
SIGSTOP included, but those that it handles; as it is not dumpable, it can be neither traced nor
written to, and its open files are its own. So nobody inside stops it. What remains: limits set on
it from inside may make it fail, which ends the container; a model program, which shares its
standard input, may keep that from ending, and then the next harness reaps what is left.

Reads: nothing; of its standard input it only notices the end.
Writes: behind what training code printed, a mark and the exit status.
Never: is a judge. Training code may print such a mark itself; all it achieves is an end of its own,
because no metric depends on this program.

Source: the measured behaviour of the engine, whose attached stream closes a container's standard
input when the client that attached is gone (StdinOnce); pid_namespaces(7), of the first process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence

READY_FD, CHANNEL_READ_FD, CHANNEL_WRITE_FD = 3, 4, 5  # as launcher.py knows them
FORSAKEN_CODE = 87  # its own exit status where nobody is left
LAUNCHER = "/programs/launcher.py"
STATUS_BYTES = 6
PR_SET_DUMPABLE = 4


def mark(token: str) -> bytes:
    """Return what tells the end from all that is printed before it; six bytes follow.

    Its first byte keeps the command line of this program, which anybody may print, from being it.
    """
    return b"\1" + token.encode()


def status_text(code: int) -> bytes:
    """Return an exit status in six bytes, negative for a signal."""
    return b"%+06d" % code


def main(arguments: Sequence[str]) -> int:
    """Run as a script: `keeper.py TOKEN ZONE ...`; what follows TOKEN is the launcher's."""
    token, zone, *_ = arguments
    _withdraw()
    notices, notice = os.pipe()
    os.set_blocking(notice, False)
    signal.set_wakeup_fd(notice, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        _become_launcher(zone, arguments[1:])
    code = _wait(child, notices)
    if code is None:
        return FORSAKEN_CODE
    if zone == "model":
        if code == FORSAKEN_CODE:  # which is ours to say
            return 1
        return code if code >= 0 else 128 - code
    # Both went through one pipe: whoever reads this has read all that was printed before.
    os.set_blocking(2, True)  # all who print share that setting, and may have changed it
    os.write(2, mark(token) + status_text(code))
    _wait(None, notices)
    return FORSAKEN_CODE


def _withdraw() -> None:
    """Leave processes of the same user no hold on this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the interpreter handles it, so it would arrive
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # what is executed later is again


def _become_launcher(zone: str, arguments: Sequence[str]) -> None:
    """Put every descriptor where the launcher looks for it, and become the launcher."""
    try:
        os.setsid()  # a candidate that ends its whole group means itself
        os.dup2(1, READY_FD)
        if zone == "model":
            os.dup2(0, CHANNEL_READ_FD)
            os.dup2(1, CHANNEL_WRITE_FD)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        os.execv(sys.executable, [sys.executable, "-s", "-P", LAUNCHER, *arguments])
    except BaseException as error:
        os.write(2, f"the launcher could not be started: {error!r}\n".encode())
    finally:
        os._exit(1)


def _wait(child: int | None, notices: int) -> int | None:
    """Wait for a child to end; return its exit status, or None once standard input has ended.

    Who lost its parent is a child of the first process, and is waited for as well.
    """
    poll = select.poll()
    poll.register(0, 0)  # its end is told unasked, however much there is to be read before
    poll.register(notices, select.POLLIN)
    while True:
        pid, status = _reap()
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        # However many end, and however fast, none of them delays a look at standard input.
        for descriptor, _ in poll.poll(0 if pid else None):
            if descriptor != notices:
                return None
            os.read(notices, 4096)


def _reap() -> tuple[int, int]:
    """Return id and status of a process that has ended; zeros where there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
