"""The journal keeps every event, in order, and names what was tampered with."""

import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.journal import Divergence, Journal, JournalError, comparable, load

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
PAYLOADS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


@settings(max_examples=20, deadline=None)
@given(payloads=st.lists(PAYLOADS, max_size=6))
def test_what_was_appended_is_read_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[dict[str, object]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    journal = Journal(folder)
    written = [journal.append("step", str(n), payload) for n, payload in enumerate(payloads)]
    journal.close()
    assert load(folder) == written
    again = Journal(folder)
    assert again.events() == written
    again.close()


def test_an_event_is_computed_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    asked = []

    def compute() -> tuple[dict[str, int], dict[str, float]]:
        asked.append(1)
        return {"value": 7}, {"seconds": 0.5}

    for _ in range(3):
        journal = Journal(tmp_path)
        event = journal.once("job", "a", compute, given={"seed": 1})
        assert event.payload == {"seed": 1, "value": 7}
        journal.close()
    assert len(asked) == 1


def test_a_replay_that_starts_from_something_else_stops_and_says_where(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.once("job", "a", lambda: ({}, {}), given={"seed": 1})
    with pytest.raises(Divergence, match=r"event 1 \(job a\) was recorded with seed=1.*2"):
        journal.once("job", "a", lambda: ({}, {}), given={"seed": 2})
    journal.close()


def test_the_same_event_cannot_be_written_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("job", "a", {})
    with pytest.raises(JournalError, match="recorded already"):
        journal.append("job", "a", {})
    journal.close()


@pytest.mark.parametrize("column", ["payload", "measured", "key", "kind", "hash"])
def test_d8_a_changed_byte_is_named_by_its_event(tmp_path: Path, column: str) -> None:
    journal = Journal(tmp_path)
    for n in range(5):
        journal.append("step", f"key{n}", {"n": n}, {"t": n})
    journal.close()
    database = sqlite3.connect(tmp_path / "journal.sqlite")
    database.execute(
        f"UPDATE events SET {column} = replace({column}, substr({column}, 2, 1), 'Z')"
        " WHERE sequence = 3"
    )
    database.commit()
    database.close()
    with pytest.raises(JournalError, match="event 3 is damaged"):
        load(tmp_path)
    with pytest.raises(JournalError, match="event 3 is damaged"):
        Journal(tmp_path)


def test_d8_a_removed_event_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for n in range(3):
        journal.append("step", str(n), {})
    journal.close()
    database = sqlite3.connect(tmp_path / "journal.sqlite")
    database.execute("DELETE FROM events WHERE sequence = 2")
    database.commit()
    database.close()
    with pytest.raises(JournalError, match="event 2 is damaged"):
        load(tmp_path)


def test_d10_a_second_writer_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="another process"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def _write_until_killed(folder: Path, ready: object) -> None:
    journal = Journal(folder)
    n = 0
    while True:
        journal.append("step", str(n), {"text": "x" * 500})
        n += 1
        if n == 20:
            ready.set()  # type: ignore[attr-defined]


def test_d11_a_killed_writer_loses_nothing_and_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=_write_until_killed, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(60)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    journal = Journal(tmp_path)
    assert len(journal.events()) >= 20
    journal.append("after", "kill", {})
    journal.close()


def test_d7_a_garbled_file_is_refused_with_its_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("step", "0", {"text": "y" * 9000})
    journal.close()
    path = tmp_path / "journal.sqlite"
    content = bytearray(path.read_bytes())
    content[40:4000] = os.urandom(3960)
    path.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        Journal(tmp_path)


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("step", "0", {})
    journal._database.execute("PRAGMA max_page_count = 3")
    with pytest.raises(JournalError, match="free some space"):
        journal.append("step", "1", {"text": "z" * 100_000})
    journal.close()
    assert [event.key for event in load(tmp_path)] == ["0"]


def test_listeners_hear_the_past_and_the_present(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("step", "0", {})
    heard: list[str] = []
    journal.listen(lambda event: heard.append(event.key))
    journal.append("step", "1", {})
    assert heard == ["0", "1"]
    journal.close()


def test_times_and_sessions_are_left_out_of_comparison(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("session", "0", {"what": "started"})
    journal.append("step", "0", {"value": 1}, {"seconds": 3.0})
    assert comparable(journal.events()) == [("step", "0", '{"value":1}')]
    journal.close()


def test_a_missing_journal_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such journal"):
        load(tmp_path)
