"""The evolution as it goes on: its journal read on from where it was left, and folded in advance.

Reads: journal.sqlite of one run, each event once; /proc/locks, for whether somebody writes it.
Writes: nothing.
Never: writes to the run's folder, holds the journal open, or reads while nobody looks.

A page must not wait for a fold, and looking must not slow down training on the same cores. So one
thread folds, while somebody looks and for a tenth of the time at most, and draws again what was
asked for of the last view; requests take the newest view that is ready.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.hitl.outcomes import Outcomes
from darwin_exp.journal import FILE_NAME, JournalError, chained_hash
from darwin_exp.protocols import Event
from darwin_exp.report.effects import effects
from darwin_exp.report.facts import Facts, line_of, n_requested

SHARE = 0.1  # of the time may go into folding and drawing
LEAST_SECONDS = 0.25  # between two looks into the journal
STALE_SECONDS = 3.0  # after which a view is worth a short wait for a newer one
WAIT_SECONDS = 0.1
WANTED_SECONDS = 30.0  # for which what was asked for once is made in advance
LOCK_NAME = "journal.lock"
_BEFORE_ALL = "0" * 64


class JournalTail:
    """Reads on in a journal that another process writes, verifying the chain as it goes.

    Args:
        run_folder: where the journal lies, or will.

    Attributes:
        events: all that were read, in order.
        last_hash: of the last one.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / FILE_NAME
        self.events: list[Event] = []
        self.last_hash = _BEFORE_ALL

    def read_on(self) -> int:
        """Take in what was written since the last call and return how many events that were.

        Raises:
            JournalError: an event is damaged, or what was read before is there no longer.
        """
        if not self.path.is_file():
            return 0
        try:
            database = self._connect()
            try:
                return self._take(database)
            finally:
                database.close()  # the last to close tidies the log up, and that is the writer
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        has_log = self.path.with_name(f"{FILE_NAME}-wal").exists()
        mode = "mode=ro" if has_log or os.access(self.path.parent, os.W_OK) else "immutable=1"
        address = f"{self.path.resolve().as_uri()}?{mode}"
        return sqlite3.connect(address, uri=True, timeout=5)

    def _take(self, database: sqlite3.Connection) -> int:
        known = len(self.events)
        if known:
            row = database.execute(
                "SELECT hash FROM events WHERE sequence = ?", (known,)
            ).fetchone()
            if row is None or row[0] != self.last_hash:
                raise JournalError(f"{self.path}: event {known} is no longer what it was")
        elif not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone():
            return 0  # made, and not yet written to
        rows = database.execute(
            "SELECT sequence, kind, key, payload, measured, written_at, hash FROM events"
            " WHERE sequence > ? ORDER BY sequence",
            (known,),
        )
        fresh: list[Event] = []
        before = self.last_hash
        for expected, (sequence, kind, key, payload, measured, written_at, found) in enumerate(
            rows, start=known + 1
        ):
            damage = f"{self.path}: event {expected} is damaged; restore the file from a copy"
            try:
                event = Event(
                    sequence, kind, key, json.loads(payload), json.loads(measured), written_at
                )
                intact = sequence == expected and chained_hash(event, before) == found
            except (ValueError, TypeError, AttributeError) as error:
                raise JournalError(damage) from error
            if not intact:
                raise JournalError(damage)
            before = found
            fresh.append(event)
        self.events += fresh
        self.last_hash = before
        return len(fresh)


@dataclass(frozen=True)
class Settled(Chronicle):
    """A chronicle that looks up once what its charts ask for at every mark."""

    @cached_property
    def closing(self) -> Event | None:
        return super().closing

    @cached_property
    def selected(self) -> Agent | None:
        return super().selected

    @cached_property
    def rewrites(self) -> tuple[Agent, ...]:
        return super().rewrites


@dataclass(frozen=True)
class Life:
    """An individual that was drafted and has not ended: it trains, is scored, or waits for a slot.

    Attributes:
        attempt: 0 for its first training, then the number of the repair.
        since: seconds since the epoch, of its last draft.
    """

    individual_id: str
    generation: int
    parent_id: str
    editor_id: str
    summary: str
    attempt: int
    since: float


@dataclass(frozen=True)
class View:
    """A run at one moment.

    Attributes:
        facts: as far as charts and tables need them; None before the run began.
        n_events: that the journal held, its chain verified up to here.
        last_hash: of the last of them.
        under_way: who is between draft and end, oldest first.
        problem: why the journal could not be read on; empty where it could.
        outcomes: what came of people's answers.
    """

    facts: Facts | None
    n_events: int = 0
    last_hash: str = ""
    under_way: tuple[Life, ...] = ()
    problem: str = ""
    outcomes: Outcomes = field(default_factory=Outcomes)
    _made: dict[str, str] = field(default_factory=dict, repr=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def once(self, name: str, make: Callable[[View], str]) -> str:
        """Return what was made of this view under that name, or make it."""
        with self._mutex:
            if name not in self._made:
                self._made[name] = make(self)
            return self._made[name]


class Live:
    """A run's newest view. Closed by `close`.

    Args:
        run_folder: the run's folder.
        makers: what may be made of a view, by name; made in advance once it was asked for.
    """

    def __init__(
        self, run_folder: Path, makers: Mapping[str, Callable[[View], str]] | None = None
    ) -> None:
        self.run_folder = run_folder
        self._makers = dict(makers or {})
        self._tail = JournalTail(run_folder)
        self._asked: dict[str, float] = {}  # when each thing was last asked for
        self._looked = threading.Event()
        self._is_idle = threading.Event()
        self._checked = threading.Event()
        self._ended = threading.Event()
        self._checked_at = 0.0
        self._view = View(None)
        self._refresh()
        self._thread = threading.Thread(target=self._follow, name="live-view", daemon=True)
        self._thread.start()

    def view(self) -> View:
        """Return the newest view, after a short wait where nobody has looked for a while."""
        # Only where nobody has looked: after a long fold the thread rests, and is not waited for.
        if self._is_idle.is_set() and time.monotonic() - self._checked_at > STALE_SECONDS:
            self._checked.clear()
            self._looked.set()
            self._checked.wait(WAIT_SECONDS)
        self._looked.set()
        return self._view

    def made(self, name: str, view: View) -> str:
        """Return what a maker makes of a view, and have it made in advance for a while.

        Raises:
            KeyError: there is no such maker.
        """
        make = self._makers[name]
        self._asked[name] = time.monotonic()
        return view.once(name, make)

    def close(self) -> None:
        """Stop following. Idempotent."""
        self._ended.set()
        self._looked.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.is_set():
            self._is_idle.set()
            self._looked.wait()
            self._is_idle.clear()
            self._looked.clear()
            began = time.monotonic()
            self._refresh()
            took = time.monotonic() - began
            self._ended.wait(max(LEAST_SECONDS, took / SHARE - took))

    def _refresh(self) -> None:
        problem = ""
        n_fresh = 0
        try:
            n_fresh = self._tail.read_on()
        except JournalError as error:
            problem = str(error)
        if n_fresh or problem != self._view.problem:
            try:
                view = _fold(self.run_folder, self._tail, problem)
            except (KeyError, TypeError, ValueError) as error:
                told = f"its events are not those of this version ({type(error).__name__}: {error})"
                view = replace(self._view, problem=told)
            self._publish(view)
        self._checked_at = time.monotonic()
        self._checked.set()

    def _publish(self, view: View) -> None:
        now = time.monotonic()
        for name, asked_at in list(self._asked.items()):
            if now - asked_at < WANTED_SECONDS:
                with suppress(Exception):  # whoever asks for it meets the same, and is told
                    view.once(name, self._makers[name])
        self._view = view


def _fold(run_folder: Path, tail: JournalTail, problem: str = "") -> View:
    """Fold the events into a view.

    It holds only the facts that a live page shows: what a report adds (claims in words, failures
    by kind, time by stage) is made at the end of a run, from the same chronicle.
    """
    n_events = len(tail.events)
    if not any(event.kind == "run" for event in tail.events):
        return View(None, n_events, tail.last_hash, problem=problem)
    chronicle = Settled.of(tail.events)
    children: dict[str, list[Agent]] = {}
    for agent in chronicle.rewrites:
        children.setdefault(agent.parent_ids[0] if agent.parent_ids else "", []).append(agent)
    for siblings in children.values():
        siblings.sort(key=lambda agent: (agent.generation, agent.slot))
    kept = (event.payload.get("survivors") or () for event in chronicle.of_kind("generation"))
    facts = Facts(
        chronicle,
        {"run_id": run_folder.name, "requested": n_requested(chronicle)},
        chronicle.status,
        effects(chronicle),
        operators=(),
        statements=(),
        failures=(),
        phases=(),
        survivors=frozenset(str(name) for names in kept for name in names),
        champions_line=line_of(chronicle, chronicle.selected),
        children=children,
    )
    outcomes = Outcomes.of(tail.events)
    return View(facts, n_events, tail.last_hash, _under_way(chronicle), problem, outcomes)


def _under_way(chronicle: Chronicle) -> tuple[Life, ...]:
    lives: dict[str, Life] = {}
    for event in chronicle.of_kind("proposal"):
        payload, (name, _, attempt) = event.payload, event.key.partition("/")
        if "changed" in payload and chronicle.agent(name) is None:
            lives[name] = Life(
                name,
                int(name[1 : name.index("-")]),
                payload["parent_id"],
                payload["editor_id"],
                payload["summary"],
                int(attempt),
                event.written_at,
            )
    return tuple(sorted(lives.values(), key=lambda life: life.since))


def is_worked_at(run_folder: Path) -> bool | None:
    """Tell whether a process on this machine holds the run's lock; None where that is not known.

    The kernel's own list is read, since trying the lock would take it from a run that starts.
    """
    try:
        inode = (run_folder / LOCK_NAME).stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    wanted = f":{inode}"
    return any(
        fields[1] == "FLOCK" and fields[5].endswith(wanted)
        for fields in (line.split() for line in locks.splitlines())
        if len(fields) > 5 and fields[1] != "->"
    )
