"""Turns: as many lives are at work at once as there are slots, but not those that wait for people.

Never: decides who comes next, or how long a person may take.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Gives out turns, and measures how long slots stood idle because people were waited for.

    Args:
        n: how many may be at work at once.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._free = threading.Semaphore(n)
        self._mine = threading.local()
        self._mutex = threading.Lock()
        self._at_work = self._queued = self._waiting = 0
        self._idle_seconds = 0.0
        self._since = time.monotonic()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and hold it meanwhile."""
        self._take()
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Let others work while this thread, if it holds a turn, waits for a person."""
        holds = getattr(self._mine, "holds", False)
        self._count(waiting=1 if holds else self.n)  # whoever has no slot keeps all of them idle
        if holds:
            self._give_back()
        try:
            yield
        finally:
            self._count(waiting=-1 if holds else -self.n)
            if holds:
                self._take()

    def drain_idle_seconds(self) -> float:
        """Return the slot-seconds that stood idle for people since this was last asked."""
        self._count()
        with self._mutex:
            idle, self._idle_seconds = self._idle_seconds, 0.0
        return idle

    def _take(self) -> None:
        self._count(queued=1)
        self._free.acquire()
        self._mine.holds = True
        self._count(queued=-1, at_work=1)

    def _give_back(self) -> None:
        self._mine.holds = False
        self._count(at_work=-1)
        self._free.release()

    def _count(self, at_work: int = 0, queued: int = 0, waiting: int = 0) -> None:
        with self._mutex:
            now = time.monotonic()
            idle = self.n - self._at_work - self._queued
            # Those who wait for people could have used the slots that nobody else had work for.
            self._idle_seconds += max(0, min(idle, self._waiting)) * (now - self._since)
            self._since = now
            self._at_work += at_work
            self._queued += queued
            self._waiting += waiting
