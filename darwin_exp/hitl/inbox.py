"""The inbox of a run: what agents ask and people answer, append-only and chained by hashes.

Reads: `inbox.sqlite` of one run.
Writes: the same file, one committed transaction per entry.
Never: changes or deletes an entry, or interprets what one means (see requests.py).

Any process may write at any time, also while no run is alive: an entry is chained onto the last
one within the transaction that writes it. The run takes entries at points of its own choosing and
keeps what it took in its journal, so `as_json` and `from_json` are part of the store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from darwin_exp.journal import is_on_network
from darwin_exp.unseen import is_unseen

FILE_NAME = "inbox.sqlite"
KINDS = frozenset(
    {
        *("asked", "answered", "guided", "pinned", "vetoed", "paused", "resumed"),
        *("stop_after_generation", "budget", "revoked", "expired"),
    }
)
MOST_PAYLOAD_BYTES = 4_000_000  # a patch of a whole genome, with room
MOST_NAME = 200
BUSY_SECONDS = 30.0  # how long a writer waits for the others
_FIRST_HASH = "0" * 64
_COLUMNS = "sequence, kind, author, door, written_at, payload, hash"

Door = Literal["terminal", "web", "run"]


class InboxError(Exception):
    """The inbox cannot be used, or does not take this entry; the message says what to do."""


class EntryRefused(InboxError):
    """This entry cannot be kept as it is; others can."""


@dataclass(frozen=True)
class Author:
    """Who wrote an entry: a person's or an agent's name, and the door it came in by.

    Raises:
        ValueError: there is no such door, or the name is empty, long or not printable.
    """

    name: str
    door: Door

    def __post_init__(self) -> None:
        if self.door not in get_args(Door):
            raise ValueError(f"an entry comes in by {', '.join(get_args(Door))}, not {self.door!r}")
        odd = any(is_unseen(letter) for letter in self.name)
        if not self.name.strip() or len(self.name) > MOST_NAME or odd:
            raise ValueError(f"an author's name has 1 to {MOST_NAME} printable characters")


def person(door: Door) -> Author:
    """Return whoever runs this process.

    By the account and not by the environment, in which anybody can call himself anything.
    """
    try:
        return Author(pwd.getpwuid(os.getuid()).pw_name, door)
    except (KeyError, ValueError):  # an account without a name, or with an odd one
        return Author(f"uid {os.getuid()}", door)


@dataclass(frozen=True)
class Entry:
    """One line of the inbox.

    Attributes:
        sequence: 1 for the first, without gaps.
        written_at: seconds since 1970.
        hash: of this entry and of the hash before it, 64 hexadecimal digits.
    """

    sequence: int
    kind: str
    author: Author
    written_at: float
    payload: Mapping[str, Any]
    hash: str


class Inbox:
    """A run's inbox; the file is made by the first entry, and reading never makes it.

    Every call opens the file anew, so that one object serves many threads.

    Args:
        path: of the file, usually runs/RUN_ID/inbox.sqlite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(
        self,
        kind: str,
        payload: Mapping[str, Any],
        author: Author,
        guard: Callable[[Sequence[Entry]], None] = lambda _: None,
    ) -> Entry:
        """Write one entry and return it once it is on disk.

        Args:
            guard: is told all entries before it, and raises what speaks against writing it. Nobody
                else can write in between.

        Raises:
            EntryRefused: the kind is unknown, or the payload is no JSON object or too large.
            InboxError: the inbox is damaged, or the disk refused.
        """
        return self.append_unless(lambda _: False, kind, payload, author, guard)

    def append_unless(
        self,
        is_it: Callable[[Entry], bool],
        kind: str,
        payload: Mapping[str, Any],
        author: Author,
        guard: Callable[[Sequence[Entry]], None] = lambda _: None,
    ) -> Entry:
        """Return the first entry that `is_it` recognises, or else write one and return that.

        Nobody else can write in between, so that what two processes ask at once is asked once.

        Raises:
            InboxError: as `append`.
        """
        text = _checked(kind, payload)
        try:
            self._make_if_missing()
            with closing(self._open("mode=rw")) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(
                    "CREATE TABLE IF NOT EXISTS entries (sequence INTEGER PRIMARY KEY,"
                    " kind TEXT NOT NULL, author TEXT NOT NULL, door TEXT NOT NULL,"
                    " written_at REAL NOT NULL, payload TEXT NOT NULL, hash TEXT NOT NULL)"
                )
                before = list(_read(database, self.path))
                for entry in before:
                    if is_it(entry):
                        return entry  # closing the file gives the transaction up
                guard(before)
                entry = _next(before[-1] if before else None, kind, text, author)
                database.execute(
                    f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(entry.sequence, kind, author.name, author.door),
                        *(entry.written_at, text, entry.hash),
                    ),
                )
                database.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise InboxError(
                f"{self.path}: nothing was written ({error}); free some space or mend the disk, "
                "then say it again"
            ) from error
        return entry

    def entries(self, after: int = 0) -> list[Entry]:
        """Return the entries with a higher sequence number than `after`, all of them verified.

        Raises:
            InboxError: an entry is missing or was changed; the message gives its number.
        """
        if not self.path.is_file():
            return []
        try:
            # Where the folder cannot be written nobody writes now, and SQLite could not take part
            # in a log; but one that a crash left behind holds the last entries.
            has_log = self.path.with_name(f"{self.path.name}-wal").exists()
            may_join = has_log or os.access(self.path.parent, os.W_OK)
            with closing(self._open("mode=ro" if may_join else "immutable=1")) as database:
                found = list(_read(database, self.path)) if _has_table(database) else []
        except sqlite3.Error as error:
            raise InboxError(f"{self.path}: {error}; restore it from a copy") from error
        return [entry for entry in found if entry.sequence > after]

    def more(self, known: Sequence[Entry]) -> list[Entry]:
        """Return the entries that follow those that were read before, all of them verified.

        Raises:
            InboxError: what was read before is gone or is another one now, or an entry after it is
                damaged; the message gives its number.
        """
        if not known:
            return self.entries()
        last = known[-1]
        gone = (
            f"{self.path}: entry {last.sequence} was read before, and is gone or another one now; "
            "restore the newest copy of the file"
        )
        if not self.path.is_file():
            raise InboxError(gone)
        try:
            with closing(self._open("mode=ro")) as database:
                if not _has_table(database) or not _holds(database, last):
                    raise InboxError(gone)
                return list(_read(database, self.path, last))
        except sqlite3.Error as error:
            raise InboxError(f"{self.path}: {error}; restore it from a copy") from error

    def verify(self) -> int:
        """Return how many entries there are, after checking that the chain holds.

        Raises:
            InboxError: an entry is missing or was changed; the message gives its number.
        """
        return len(self.entries())

    def _open(self, mode: str) -> sqlite3.Connection:
        database = sqlite3.connect(
            f"{self.path.resolve().as_uri()}?{mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,  # transactions begin where this module says so
        )
        try:
            database.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _make_if_missing(self) -> None:
        """Make the file, readable by nobody else; of several that try, one does."""
        if self.path.exists() and self.path.stat().st_size:
            return
        with self.path.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
            if self.path.exists() and self.path.stat().st_size:
                return
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            if is_on_network(self.path.parent):
                return  # WAL needs shared memory, which network file systems do not offer
            with closing(self._open("mode=rw")) as database, suppress(sqlite3.OperationalError):
                # Another process may have opened it already; SQLite's other mode is as safe.
                database.execute("PRAGMA journal_mode=WAL")


def as_json(entry: Entry) -> dict[str, Any]:
    """Return an entry as the journal keeps it."""
    return asdict(entry)


def from_json(told: Mapping[str, Any]) -> Entry:
    """Return the entry that `as_json` wrote down.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    return Entry(**{**told, "author": Author(**told["author"])})


def canonical(value: Mapping[str, Any]) -> str:
    """Return a JSON object as text, the same text whatever the order of its keys.

    Raises:
        TypeError, ValueError: it is none that can be kept.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    text.encode()  # half of a surrogate pair is no text
    return text


def _checked(kind: str, payload: Mapping[str, Any]) -> str:
    if kind not in KINDS:
        raise EntryRefused(f"an entry's kind is one of {', '.join(sorted(KINDS))}, not {kind!r}")
    if not isinstance(payload, Mapping):
        raise EntryRefused("an entry's payload is a JSON object")
    try:
        text = canonical(dict(payload))
    except (TypeError, ValueError, RecursionError) as error:
        raise EntryRefused(f"an entry's payload must be plain JSON: {error}") from error
    if (size := len(text.encode())) > MOST_PAYLOAD_BYTES:
        raise EntryRefused(
            f"{size:,} bytes are too many for one entry; {MOST_PAYLOAD_BYTES:,} may do"
        )
    return text


def _next(last: Entry | None, kind: str, text: str, author: Author) -> Entry:
    before, sequence = (_FIRST_HASH, 1) if last is None else (last.hash, last.sequence + 1)
    now = time.time()
    chained = _hash(before, sequence, kind, author.name, author.door, now, text)
    return Entry(sequence, kind, author, now, json.loads(text), chained)


def _has_table(database: sqlite3.Connection) -> bool:
    found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone()
    return found is not None


def _holds(database: sqlite3.Connection, entry: Entry) -> bool:
    found = database.execute(
        "SELECT hash FROM entries WHERE sequence = ?", (entry.sequence,)
    ).fetchone()
    return found is not None and found[0] == entry.hash


def _read(database: sqlite3.Connection, path: Path, last: Entry | None = None) -> Iterator[Entry]:
    """Yield every entry, verifying the chain of hashes.

    Args:
        last: what was read before; what follows must be chained to it.

    Raises:
        InboxError: an entry is missing or was changed.
    """
    before, first = (_FIRST_HASH, 1) if last is None else (last.hash, last.sequence + 1)
    rows: Iterable[tuple[Any, ...]] = database.execute(
        f"SELECT {_COLUMNS} FROM entries WHERE sequence >= ? ORDER BY sequence", (first,)
    )
    for expected, row in enumerate(rows, start=first):
        sequence, kind, name, door, written_at, text, chained = row
        damage = f"{path}: entry {expected} was changed or is missing; restore it from a copy"
        if sequence != expected:
            raise InboxError(damage)
        try:
            intact = _hash(before, sequence, kind, name, door, written_at, text) == chained
            entry = Entry(sequence, kind, Author(name, door), written_at, json.loads(text), chained)
        except (ValueError, TypeError, AttributeError) as error:
            raise InboxError(damage) from error
        if not intact or not isinstance(entry.payload, dict):
            raise InboxError(damage)
        before = chained
        yield entry


def _hash(before: str, *line: int | float | str) -> str:
    return hashlib.sha256(json.dumps([before, *line]).encode()).hexdigest()
