"""The inbox as the page needs it: read anew only when its file has changed, and folded once.

Reads: inbox.sqlite of one run.
Writes: nothing by itself; `inbox` is what answers are written through.
Never: shows requests of an inbox whose chain is broken, so that none of them can be approved.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from darwin_exp.hitl.inbox import FILE_NAME, Entry, Inbox, InboxError
from darwin_exp.hitl.requests import Board, fold

# A file's time is as coarse as the kernel's clock: what changed within one tick looks unchanged.
TICK_SECONDS = 0.1


@dataclass(frozen=True)
class Desktop:
    """What lies on the desk at one moment.

    Attributes:
        entries: all of them, verified; none where the chain is broken.
        damage: why the inbox cannot be trusted; empty where it can.
    """

    entries: tuple[Entry, ...] = ()
    board: Board = field(default_factory=Board)
    damage: str = ""


class Desk:
    """Reads one inbox for many pages.

    Args:
        run_folder: where the inbox lies, or will.
    """

    def __init__(self, run_folder: Path) -> None:
        self.inbox = Inbox(run_folder / FILE_NAME)
        self._run_id = run_folder.name  # whose requests count
        self._mutex = threading.Lock()
        self._desktop = Desktop()
        self._seen: tuple[tuple[int, int, int] | None, ...] | None = None

    def read(self, anew: bool = False) -> Desktop:
        """Return what the inbox holds now, its whole chain verified when it last changed.

        Args:
            anew: whether to read and verify it even though nothing seems to have changed.
        """
        with self._mutex:
            state = tuple(_state(path) for path in self._files())
            if anew or self._seen != state:
                try:
                    entries = tuple(self.inbox.entries())
                    self._desktop = Desktop(entries, fold(entries, self._run_id))
                except InboxError as error:
                    self._desktop = Desktop(damage=str(error))
                newest = max((one[0] for one in state if one is not None), default=0)
                is_settled = time.time_ns() - newest > TICK_SECONDS * 1e9
                self._seen = state if is_settled else None
            return self._desktop

    def _files(self) -> tuple[Path, Path]:
        path = self.inbox.path
        return path, path.with_name(f"{path.name}-wal")


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
