"""The inbox keeps every entry, in order, whoever writes, and names what was tampered with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.hitl import inbox as module
from darwin_exp.hitl.inbox import (
    FILE_NAME,
    Author,
    Entry,
    Inbox,
    InboxError,
    as_json,
    from_json,
    person,
)

ROOT = Path(__file__).parents[2]
ADA = Author("ada", "terminal")
RUN = Author("g01-i02", "run")
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
PAYLOADS = st.dictionaries(WORDS, JSON, max_size=4)
WRITER = """
import sys
from pathlib import Path
from darwin_exp.hitl.inbox import Author, Inbox
inbox = Inbox(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for n in range(int(sys.argv[3])):
    inbox.append("guided", {"to": "all", "text": f"{sys.argv[2]} {n} " + "x" * 500},
                 Author(sys.argv[2], "web"))
"""


def with_entries(folder: Path, n: int = 5) -> Inbox:
    inbox = Inbox(folder / FILE_NAME)
    for k in range(n):
        inbox.append("guided", {"to": "all", "text": f"note {k}"}, ADA)
    return inbox


def tampered(inbox: Inbox, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(inbox.path)) as database:
        database.execute(statement, values)
        database.commit()


def writer(inbox: Inbox, name: str, n: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(inbox.path), name, str(n)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@settings(max_examples=20)
@given(payloads=st.lists(PAYLOADS, max_size=5))
def test_what_was_appended_is_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[dict[str, object]]
) -> None:
    inbox = Inbox(tmp_path_factory.mktemp("run") / FILE_NAME)
    written = [inbox.append("guided", payload, ADA) for payload in payloads]
    assert inbox.entries() == written
    assert inbox.entries(after=2) == written[2:]
    assert inbox.verify() == len(payloads)
    # The run keeps what it took in its journal, as JSON.
    assert [from_json(json.loads(json.dumps(as_json(one)))) for one in written] == written


def test_reading_an_inbox_that_nobody_wrote_to_makes_no_file(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    assert inbox.entries() == []
    assert inbox.verify() == 0
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_can_read_what_was_said(tmp_path: Path) -> None:
    inbox = with_entries(tmp_path, 1)
    assert stat.S_IMODE(inbox.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("column", ["kind", "author", "door", "payload", "hash"])
def test_g6_a_changed_byte_is_named_by_its_entry(tmp_path: Path, column: str) -> None:
    inbox = with_entries(tmp_path)
    statement = f"UPDATE entries SET {column} = replace({column}, substr({column}, 2, 1), 'Z')"
    tampered(inbox, f"{statement} WHERE sequence = 3")
    with pytest.raises(InboxError, match="entry 3 was changed"):
        inbox.verify()
    with pytest.raises(InboxError, match="entry 3 was changed"):
        inbox.append("paused", {"note": ""}, ADA)


def test_g6_another_time_is_noticed(tmp_path: Path) -> None:
    inbox = with_entries(tmp_path)
    tampered(inbox, "UPDATE entries SET written_at = written_at - 3600 WHERE sequence = 2")
    with pytest.raises(InboxError, match="entry 2 was changed"):
        inbox.entries()


def test_g6_a_removed_entry_is_noticed(tmp_path: Path) -> None:
    inbox = with_entries(tmp_path)
    tampered(inbox, "DELETE FROM entries WHERE sequence = 2")
    with pytest.raises(InboxError, match="entry 2 was changed or is missing"):
        inbox.verify()


def test_g6_control_a_line_with_a_hash_of_its_own_is_found_by_the_next_one(tmp_path: Path) -> None:
    """Without the chain the forged line would pass: its hash fits what it says."""
    inbox = with_entries(tmp_path)
    before, old = inbox.entries()[1:3]
    payload = '{"text":"forged","to":"all"}'
    line = [before.hash, 3, old.kind, old.author.name, old.author.door, old.written_at, payload]
    forged = hashlib.sha256(json.dumps(line).encode()).hexdigest()
    tampered(inbox, "UPDATE entries SET payload = ?, hash = ? WHERE sequence = 3", payload, forged)
    with pytest.raises(InboxError, match="entry 4 was changed"):
        inbox.verify()
    tampered(inbox, "DELETE FROM entries WHERE sequence > 3")
    assert inbox.verify() == 3  # which only who remembers the last hash can tell


@pytest.mark.parametrize("payload", [b"\x00\x01", 7, "[]", "{", "null"])
def test_g6_what_is_no_object_is_damage(tmp_path: Path, payload: Any) -> None:
    inbox = with_entries(tmp_path, 2)
    tampered(inbox, "UPDATE entries SET payload = ? WHERE sequence = 1", payload)
    with pytest.raises(InboxError, match="entry 1 was changed"):
        inbox.verify()


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    inbox.path.write_bytes(b"no database at all" * 300)
    with pytest.raises(InboxError, match="restore it from a copy"):
        inbox.entries()
    with pytest.raises(InboxError, match="nothing was written"):
        inbox.append("paused", {}, ADA)


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InboxError, match="nothing was written"):
        Inbox(tmp_path / "gone" / FILE_NAME).append("paused", {}, ADA)


def test_processes_that_write_at_once_leave_one_whole_chain(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    writers = [writer(inbox, name, 8) for name in ("one", "two", "three")]
    for process in writers:
        assert process.stdout is not None
        process.stdout.readline()
    for process in writers:
        process.communicate(b"\n", timeout=60)
        assert process.returncode == 0
    said = [entry.payload["text"].split() for entry in inbox.entries()]
    assert len(said) == 24
    for name in ("one", "two", "three"):
        assert [int(words[1]) for words in said if words[0] == name] == list(range(8))


def test_g7_a_killed_writer_leaves_whole_entries_and_no_lock(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    process = writer(inbox, "one", 100_000)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write(b"\n")
    process.stdin.flush()
    while inbox.verify() < 5:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    n = inbox.verify()
    assert n >= 5
    assert inbox.append("paused", {}, ADA).sequence == n + 1


def test_a_file_whose_making_was_cut_short_is_finished(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    inbox.path.touch()
    assert inbox.entries() == []
    assert inbox.append("paused", {}, ADA).sequence == 1
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as database:
        database.execute("PRAGMA journal_mode=WAL")
    other = Inbox(tmp_path / "other.sqlite")
    assert other.entries() == []
    assert other.append("paused", {}, ADA).sequence == 1


@pytest.mark.parametrize(("on_network", "mode"), [(True, "delete"), (False, "wal")])
def test_the_log_fits_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_network: bool, mode: str
) -> None:
    monkeypatch.setattr(module, "is_on_network", lambda _: on_network)
    inbox = with_entries(tmp_path, 2)
    with closing(sqlite3.connect(inbox.path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == (mode,)
    assert inbox.verify() == 2


def test_what_is_there_already_is_returned_and_not_written_again(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)

    def is_it(entry: Entry) -> bool:
        return entry.kind == "asked"

    first = inbox.append_unless(is_it, "asked", {"request_id": "a"}, RUN)
    assert inbox.append_unless(is_it, "asked", {"request_id": "b"}, RUN) == first
    assert inbox.entries() == [first]


@pytest.mark.parametrize(
    ("kind", "payload", "why"),
    [
        ("approved", {}, "kind is one of"),
        ("guided", ["all"], "JSON object"),
        ("guided", {"text": float("nan")}, "plain JSON"),
        ("guided", {"text": {1, 2}}, "plain JSON"),
        ("guided", {"text": "\ud800"}, "plain JSON"),
        ("guided", {"text": "x" * 4_000_001}, "too many"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, kind: str, payload: Any, why: str) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    with pytest.raises(InboxError, match=why):
        inbox.append(kind, payload, ADA)
    assert not inbox.path.exists()


@pytest.mark.parametrize("name", ["", "  ", "x" * 201, "ada\x1b[2J", "ada\u202e", "a\nb"])
def test_an_author_has_a_name_that_can_be_read(name: str) -> None:
    with pytest.raises(ValueError, match="printable"):
        Author(name, "web")


def test_there_are_three_doors() -> None:
    with pytest.raises(ValueError, match="not 'mail'"):
        Author("ada", "mail")  # type: ignore[arg-type]


def test_g6_who_it_was_is_told_by_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("USER", "somebody-else")
    assert person("web").name != "somebody-else"
