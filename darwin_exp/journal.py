"""The durable record of a run: one append-only, hash-chained table of events, the only truth.

Reads: `journal.sqlite` of one run.
Writes: the same file, one committed transaction per event.
Never: changes or deletes an event; interprets what a payload means.

An event's (kind, key) is unique, so a step of the evolution is written once however often the
run is killed and resumed: `once` returns the recorded payload where there is one and otherwise
computes and records it. Resuming is running the same loop again over those answers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from darwin_exp.protocols import Event

FILE_NAME = "journal.sqlite"
# What tells of processes, of measured times, of tries and of when people spoke, and not of the
# evolution's course.
INCOMPARABLE_KINDS = frozenset(
    {
        *("session", "end", "timing", "retimed", "llm_reserved", "llm_failed"),
        *("inbox", "review", "paused", "effect", "withdrawn", "budget", "postponed"),
    }
)
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "beegfs"}
)
_FIRST_HASH = "0" * 64


class JournalError(Exception):
    """The journal cannot be used; the message names the file, the event and the cure."""


class Divergence(JournalError):
    """A resumed run came to another decision than the recorded one."""


class Journal:
    """One run's events, in order, with one writer.

    Args:
        folder: the run's folder, which must exist.

    Raises:
        JournalError: another process writes it, it is damaged, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._mutex = threading.RLock()
        self._listeners: list[Callable[[Event], None]] = []
        self._lock_file = _lock(folder / "journal.lock")
        try:
            self._database = _open(self.path, network=is_on_network(folder))
            self._events = list(read(self._database, self.path))
        except sqlite3.Error as error:
            self._lock_file.close()
            raise JournalError(
                f"{self.path}: {error}; restore it from a copy, or start a new run"
            ) from error
        except JournalError:
            self._lock_file.close()
            raise
        self._by_key = {(event.kind, event.key): event for event in self._events}
        self._precedents: dict[tuple[str, str], Event] = {}
        self._last_hash = _chain(self._events)

    def append(
        self,
        kind: str,
        key: str,
        payload: Mapping[str, Any],
        measured: Mapping[str, Any] | None = None,
    ) -> Event:
        """Write one event and return once it is on disk.

        Raises:
            JournalError: the event is there already, or the disk refused it.
        """
        with self._mutex:
            if (kind, key) in self._by_key:
                raise JournalError(f"{self.path}: {kind} {key} is recorded already")
            event = Event(
                sequence=len(self._events) + 1,
                kind=kind,
                key=key,
                payload=_plain(payload),
                measured=_plain(measured or {}),
                written_at=time.time(),
            )
            chained = chained_hash(event, self._last_hash)
            try:
                self._database.execute(
                    "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        event.sequence,
                        kind,
                        key,
                        _canonical(event.payload),
                        _canonical(event.measured),
                        event.written_at,
                        chained,
                    ),
                )
                self._database.commit()
            except sqlite3.Error as error:
                # A failed write is never tried again: after one, what is on disk is unknown.
                raise JournalError(
                    f"{self.path}: could not write event {event.sequence} ({error}); free some "
                    f"space or mend the disk, then go on with resume={self.path.parent.name}"
                ) from error
            self._last_hash = chained
            self._events.append(event)
            self._by_key[(kind, key)] = event
            for listener in self._listeners:  # still under the mutex, so that they hear in order
                listener(event)
        return event

    def find(self, kind: str, key: str) -> Event | None:
        """Return the event of that kind and key, if it was recorded."""
        return self._by_key.get((kind, key))

    def once(
        self,
        kind: str,
        key: str,
        compute: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]],
        given: Mapping[str, Any] | None = None,
    ) -> Event:
        """Return the recorded event, or compute its (payload, measured) and record it.

        Args:
            given: what the step starts from; kept in the payload and compared on replay.

        Raises:
            Divergence: the recorded event started from something else.
        """
        recorded = self.find(kind, key)
        given = _plain(given or {})
        if recorded is None:
            precedent = self._precedents.get((kind, key))
            if precedent is not None:
                self._refuse_another_start(precedent, given)
                return self.append(kind, key, precedent.payload, precedent.measured)
            payload, measured = compute()
            return self.append(kind, key, {**given, **payload}, measured)
        self._refuse_another_start(recorded, given)
        return recorded

    def _refuse_another_start(self, recorded: Event, given: Mapping[str, Any]) -> None:
        for name, value in given.items():
            if recorded.payload.get(name) != value:
                raise Divergence(
                    f"{self.path}: event {recorded.sequence} ({recorded.kind} {recorded.key}) was "
                    f"recorded with {name}={recorded.payload.get(name)!r}, and this run comes to "
                    f"{value!r}; code, data or configuration have changed since: start a new run"
                )

    def heed(self, precedents: Iterable[Event]) -> None:
        """Let `once` decide as another run did, wherever these events tell how.

        What two slots found out at the same time would otherwise be found out in another order.
        """
        self._precedents.update(((event.kind, event.key), event) for event in precedents)

    def of_kind(self, kind: str) -> list[Event]:
        """Return every event of one kind, in order."""
        return [event for event in self.events() if event.kind == kind]

    def events(self) -> list[Event]:
        """Return every event so far, in order."""
        with self._mutex:
            return list(self._events)

    def listen(self, listener: Callable[[Event], None], replay: bool = True) -> None:
        """Call `listener` for every event from now on and, with `replay`, for all earlier ones."""
        with self._mutex:
            if replay:
                for event in self._events:
                    listener(event)
            self._listeners.append(listener)

    def close(self) -> None:
        """Close the file and let another process write. Idempotent."""
        with self._mutex:
            self._listeners.clear()
            self._database.close()
            self._lock_file.close()


def load(folder: Path) -> list[Event]:
    """Read and verify a run's journal without becoming its writer.

    Raises:
        JournalError: it is missing or damaged; the message names the event.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise JournalError(f"{path}: no such journal; `ls {folder.parent}` shows the runs")
    try:
        # A live writer may hold a transaction open for a moment: wait for it. Where the folder
        # cannot be written nobody writes now, and SQLite could not take part in a log; but one
        # that a crash left behind holds the last events, and must not be passed over.
        has_log = path.with_name(f"{FILE_NAME}-wal").exists()
        mode = "mode=ro" if has_log or os.access(folder, os.W_OK) else "immutable=1"
        address = f"{path.resolve().as_uri()}?{mode}"
        database = sqlite3.connect(address, uri=True, timeout=30)
        try:
            return list(read(database, path))
        finally:
            database.close()
    except sqlite3.Error as error:
        raise JournalError(f"{path}: {error}; restore it from a copy") from error


def comparable(events: list[Event]) -> list[tuple[str, str, str]]:
    """Return what must be equal in two runs with the same seed: kind, key and payload, in order."""
    return [
        (event.kind, event.key, _canonical(event.payload))
        for event in events
        if event.kind not in INCOMPARABLE_KINDS
    ]


def read(database: sqlite3.Connection, path: Path) -> Iterator[Event]:
    """Yield the events of an open database, verifying the chain of hashes.

    Raises:
        JournalError: an event is missing or was changed; the message gives its number.
    """
    before = _FIRST_HASH
    rows = database.execute(
        "SELECT sequence, kind, key, payload, measured, written_at, hash FROM events"
        " ORDER BY sequence"
    )
    for expected, row in enumerate(rows, start=1):
        sequence, kind, key, payload, measured, written_at, chained = row
        damage = f"{path}: event {expected} is damaged; restore the file from a copy"
        if sequence != expected:
            raise JournalError(damage)
        try:
            event = Event(
                sequence, kind, key, json.loads(payload), json.loads(measured), written_at
            )
            intact = chained_hash(event, before) == chained
        except (ValueError, TypeError, AttributeError) as error:
            raise JournalError(damage) from error
        if not intact:
            raise JournalError(damage)
        before = chained
        yield event


def _chain(events: list[Event]) -> str:
    chained = _FIRST_HASH
    for event in events:
        chained = chained_hash(event, chained)
    return chained


def chained_hash(event: Event, before: str) -> str:
    """Return the hash of an event and of the hash before it: the one rule of the chain."""
    text = json.dumps(
        [
            before,
            event.sequence,
            event.kind,
            event.key,
            _canonical(event.payload),
            _canonical(event.measured),
            event.written_at,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value as JSON will give it back, so that live and replayed runs see the same."""
    plain: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def _open(path: Path, network: bool) -> sqlite3.Connection:
    fresh = not path.exists()
    database = sqlite3.connect(path, timeout=30, check_same_thread=False)
    if fresh:
        with suppress(OSError):
            os.chmod(path, 0o600)  # it holds the integrity key
    # WAL needs shared memory, which network file systems do not offer.
    database.execute(f"PRAGMA journal_mode={'DELETE' if network else 'WAL'}")
    database.execute("PRAGMA synchronous=FULL")
    database.execute(
        "CREATE TABLE IF NOT EXISTS events (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL,"
        " key TEXT NOT NULL, payload TEXT NOT NULL, measured TEXT NOT NULL,"
        " written_at REAL NOT NULL, hash TEXT NOT NULL, UNIQUE (kind, key))"
    )
    database.commit()
    return database


def _lock(path: Path) -> Any:
    """Take the kernel's lock on a file; it is released however this process ends."""
    try:
        handle = path.open("a+")
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}; check the folder of paths.runs") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise JournalError(
            f"{path.parent.name} is being run by another process; wait for it or stop it first"
        ) from error
    return handle


def is_on_network(folder: Path) -> bool:
    """Tell whether a folder lies on a file system where SQLite's WAL mode is unsafe."""
    target = folder.resolve()
    best, kind = "", ""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    for line in mounts:
        _, point, file_system, *_ = line.split()
        point = point.replace("\\040", " ")
        if target.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, file_system
    return kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")
