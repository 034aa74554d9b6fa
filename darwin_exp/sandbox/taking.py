"""Takes what a frozen container left in its output folder.

Reads: plain files there, through the engine.
Writes: the destination.
Never: follows a link, or takes more bytes than it is told to.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from darwin_exp.protocols import InfrastructureFailure
from darwin_exp.sandbox.engine import Engine
from darwin_exp.sandbox.engine_calls import NotThere
from darwin_exp.sandbox.profile import OUT
from darwin_exp.sandbox.workfolder import plain_name


def take(
    engine: Engine, container: str, names: Iterable[str], destination: Path, max_bytes: int
) -> dict[str, str]:
    """Copy plain files out of `out/`; return what was refused, and why.

    Raises:
        InfrastructureFailure: the container is gone, or the engine does not answer.
        OSError: a file cannot be kept here.
    """
    refused: dict[str, str] = {}
    destination.mkdir(parents=True, exist_ok=True)
    names = list(names)
    taken = _take_together(engine, container, names, destination, max_bytes)
    left = max_bytes - sum(taken.values())
    for name in names:
        if name in taken:
            continue
        try:
            path, target = f"{OUT}/{plain_name(name)}", destination / name
            left -= engine.copy_file(container, path, target, left)
        except NotThere as missing:
            if engine.state(container) is None:
                raise InfrastructureFailure("the container vanished") from missing
            refused[name] = os.strerror(errno.ENOENT)
        except ValueError as reason:
            refused[name] = str(reason)
    return refused


def _take_together(
    engine: Engine, container: str, names: list[str], destination: Path, max_bytes: int
) -> dict[str, int]:
    """Copy at one go what can be taken so, and return the sizes; what cannot is left out."""
    wanted = set()
    for name in names:
        with contextlib.suppress(ValueError):
            wanted.add(plain_name(name))
    if len(wanted) > 1:
        with contextlib.suppress(NotThere):
            return engine.copy_folder(container, OUT, frozenset(wanted), destination, max_bytes)
    return {}
