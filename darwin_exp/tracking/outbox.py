"""Delivery of the journal's events to a slower, less reliable place, behind the run's back.

Reads: the events it is told of; its cursor file.
Writes: the cursor file, which says how far delivery has come.
Never: blocks or raises into the run, or delivers an event twice to any effect.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from darwin_exp.protocols import Event

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
PATIENCE = 4  # failures of one event, on a store that works, before the next event is tried


class StoreUnavailable(Exception):
    """The store cannot be written at the moment, whatever is sent to it."""


class Mirror(Protocol):
    """The store that events are delivered to. Only the outbox's thread calls it."""

    def open(self) -> None:
        """Open the store anew; any exception means later."""
        ...

    def is_open(self) -> bool:
        """Return whether it was opened and is still the same store."""
        ...

    def forget(self) -> None:
        """Make `is_open` false: something went wrong since."""
        ...

    def holds_run(self) -> bool:
        """Return whether the opened store knows the run that the events are about."""
        ...

    def surely_works(self) -> bool:
        """Return whether the store is known to take writes, so that a failure is the event's."""
        ...


# Writes one event, given also all events so far, such that writing it again changes nothing. It
# raises StoreUnavailable if the store takes no writes now, and InterruptedError if the function
# it is given said, before anything was written, that delivery has been given up.
Delivery = Callable[[Event, Sequence[Event], Callable[[], bool]], None]


class Outbox:
    """Delivers events to a mirror in order, each exactly once, from its own thread.

    The journal is the outbox's memory: a cursor file says how far delivery has come, and every
    write can be repeated, so a kill at any point leaves neither gap nor double. If the mirror has
    lost the run (deleted, or another store), delivery starts over. An event that a working store
    keeps refusing is set aside and tried again at the next start.

    Events are to be followed in the journal's order and, on resume, all of them again.
    """

    def __init__(self, mirror: Mirror, deliver: Delivery, cursor: Path, store: str) -> None:
        """Start the thread, which opens the mirror at once.

        Args:
            mirror: the store, which the events are written to.
            deliver: writes one event to it.
            cursor: the cursor file.
            store: names the store; a cursor that belongs to another one is not believed.
        """
        self._mirror = mirror
        self._deliver = deliver
        self._cursor = cursor
        self._store = store
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._known: set[int] = set()
        self._delivered: set[int] = set()
        self._refused: set[int] = set()
        self._through, self._missing = self._read_cursor()
        self._opened = threading.Event()
        self._closing = self._abandoned = False
        self.last_error = ""
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def follow(self, event: Event) -> None:
        """Take note of an event; returns at once."""
        with self._changed:
            if event.sequence in self._known:
                return
            self._known.add(event.sequence)
            self._events.append(event)
            if event.sequence <= self._through and event.sequence not in self._missing:
                self._delivered.add(event.sequence)
            self._changed.notify_all()

    def ready(self, seconds: float) -> bool:
        """Wait at most so long for the first opening of the store; return whether it is open.

        Opening may take seconds of CPU: a caller that is about to measure time waits here
        first, so that no candidate pays for it.
        """
        return self._opened.wait(seconds)

    def close(self, seconds: float) -> int:
        """Deliver what is outstanding within so many seconds; return how many events remain."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            return len(self._known - self._delivered)

    # --- the thread -------------------------------------------------------------------------

    def _work(self) -> None:
        pause, failures = FIRST_PAUSE_SECONDS, 0
        while True:
            event: Event | None = None
            try:
                self._open_mirror()
                event = self._next_event()
                if event is None:
                    return
                if not self._mirror.is_open():
                    continue  # the store was replaced while there was nothing to deliver
                self._deliver(event, tuple(self._events), lambda: self._abandoned)
            except Exception as error:
                # Only this thread would ever see it, and it has to outlive it.
                self.last_error = f"{type(error).__name__}: {error}"[:500]
                failures += event is not None and not isinstance(error, StoreUnavailable)
                self._mirror.forget()
                if event is not None and failures >= PATIENCE and self._mirror.surely_works():
                    self._settle(event, self._refused)
                    pause, failures = FIRST_PAUSE_SECONDS, 0
                elif self._pause(pause):
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                else:
                    return
            else:
                self._settle(event, self._delivered)
                pause, failures = FIRST_PAUSE_SECONDS, 0

    def _open_mirror(self) -> None:
        if self._mirror.is_open():
            return
        self._mirror.open()
        if not self._mirror.holds_run():
            with self._changed:
                self._delivered.clear()
                self._refused.clear()
                self._through, self._missing = 0, set()
        self._opened.set()

    def _next_event(self) -> Event | None:
        """Wait for an event to deliver; None once there will be no more."""

        def first() -> Event | None:
            done = self._delivered | self._refused
            return next((event for event in self._events if event.sequence not in done), None)

        with self._changed:
            self._changed.wait_for(lambda: first() or self._closing or self._abandoned)
            return None if self._abandoned else first()

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt; return False if there is to be none."""
        with self._changed:
            if not self._abandoned:
                # A run that is about to end cannot wait long for its last chance.
                self._changed.wait(min(seconds, 0.5) if self._closing else seconds)
            return not self._abandoned

    def _settle(self, event: Event, verdict: set[int]) -> None:
        with self._changed:
            verdict.add(event.sequence)
            through = max(self._delivered | self._refused)
            missing = {number for number in self._known - self._delivered if number <= through}
        cursor = {"store": self._store, "through": through, "missing": sorted(missing)}
        # Not synced to disk on purpose: a cursor that fell back only repeats deliveries.
        draft = self._cursor.with_name(self._cursor.name + ".new")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(cursor), encoding="utf-8")
            draft.replace(self._cursor)

    def _read_cursor(self) -> tuple[int, set[int]]:
        """Return the last settled sequence and the gaps below it; (0, none) if in any doubt."""
        try:
            cursor = json.loads(self._cursor.read_text(encoding="utf-8"))
            if cursor["store"] == self._store:
                return int(cursor["through"]), {int(number) for number in cursor["missing"]}
        except (OSError, ValueError, TypeError, KeyError):
            pass  # a cursor that cannot be read is no cursor: everything is delivered again
        return 0, set()
