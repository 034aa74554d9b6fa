"""The bare process sandbox: candidates are forked from a warm interpreter, in milliseconds.

What it protects from depends on who the harness is.

- As root that may make mount namespaces, a candidate runs as a user of its own in a house of its
  own: no network, a read-only world, a private /tmp, and no sight of `hidden` folders.
- As root that may not (in most containers), it runs as a user of its own; file modes alone
  protect files, and the network is open.
- As anyone else, it runs as the same user: its limits hold what is careless, and nothing holds
  what is hostile. That is for code of our own.

In no case is the disk space bounded that many files take together, only the size of each.
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
