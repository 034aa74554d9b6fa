"""Who waited for whom: the laws of the run delay, and the wire's own."""

from __future__ import annotations

import os
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.sandbox.processes import Process, count_tasks, descendants, owed_seconds
from darwin_exp.sandbox.supervision import Log
from darwin_exp.sandbox.wire import Wire

seconds = st.floats(0, 1e4)


@given(seconds, seconds, st.integers(1, 64), seconds)
def test_others_never_owe_more_than_was_waited_nor_more_than_was_left_unused(
    waited: float, wall: float, n_cpus: int, cpu: float
) -> None:
    owed = owed_seconds(waited, wall, n_cpus, cpu)
    assert 0 <= owed <= waited
    assert owed <= max(0.0, wall * n_cpus - cpu)


def test_a_group_that_keeps_its_cpus_busy_itself_is_owed_nothing() -> None:
    # Two threads on one CPU: each waits half of the time, and nobody took anything from them.
    assert owed_seconds(longest_wait=5.0, wall_seconds=10.0, n_cpus=1, cpu_seconds=10.0) == 0
    # One thread that shares its CPU with a stranger.
    assert owed_seconds(longest_wait=5.0, wall_seconds=10.0, n_cpus=1, cpu_seconds=5.0) == 5.0


@given(st.lists(st.binary(min_size=1, max_size=50)), st.integers(1, 100))
def test_a12_a_log_keeps_exactly_the_last_bytes(chunks: list[bytes], max_bytes: int) -> None:
    log = Log(max_bytes)
    for chunk in chunks:
        log.add(chunk)
    printed = b"".join(chunks)
    assert log.text() == printed[-max_bytes:].decode(errors="replace")
    assert log.truncated == (len(printed) > max_bytes)


def test_a_process_is_found_among_the_descendants_of_its_parent() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert child in [process.pid for process in descendants(os.getpid())]
        assert count_tasks(os.getuid()) >= 2
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert Process.read(child) is None


def test_messages_arrive_whole_and_in_order_however_they_are_cut() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = Wire(ours), Wire(theirs)
    messages = [{"number": i, "text": "x" * i * 1000} for i in range(20)]
    for message in messages:
        sender.send(message)
        assert receiver.receive(time.monotonic() + 5) == message
    with pytest.raises(TimeoutError):
        receiver.receive(time.monotonic() + 0.01)
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive(time.monotonic() + 5)
    receiver.close()
