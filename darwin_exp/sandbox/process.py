"""The bare process sandbox: candidates are forked from a warm interpreter, in milliseconds.

What it protects from depends on who the harness is. As root, a candidate runs as a user of its
own, in a house of its own: no network, a read-only world, a private /tmp. As anyone else, it runs
as the same user and only its limits hold it: that is for code of our own, or for careless code,
and not for hostile code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

from darwin_exp.protocols import Launch, SandboxUnavailable
from darwin_exp.sandbox.supervised import SupervisedSandbox


class ProcessSandbox(SupervisedSandbox):
    """Runs candidates as processes of this machine."""

    name: ClassVar[str] = "process"
    forks: ClassVar[bool] = True

    @classmethod
    def check(cls) -> None:
        """Find out whether it can work here, without starting anything.

        Raises:
            SandboxUnavailable: it cannot; the message says what would mend it.
        """
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable("sandbox=process needs Linux; elsewhere use sandbox=docker")
        try:
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            raise SandboxUnavailable("sandbox=process needs Linux 5.3 or newer") from error

    def _command(self, launch: Launch, folder: Path) -> list[str] | None:
        return None
