"""Who waited for whom: the laws of the run delay, and the wire's own."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.sandbox import processes, supervision
from darwin_exp.sandbox.confinement import Order
from darwin_exp.sandbox.processes import (
    Process,
    Usage,
    busy_seconds,
    count_tasks,
    descendants,
    owed_seconds,
    resident_bytes,
)
from darwin_exp.sandbox.supervision import Log, Supervisor
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


def owed_after(
    monkeypatch: pytest.MonkeyPatch, samples: list[tuple[float, float]], others: bool = True
) -> float:
    """Return what a group on one CPU is owed that waited and used so much in each second.

    Args:
        others: whether somebody else used what it left.
    """
    clock = waited = used = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(processes, "run_delays", lambda pid: {pid: waited})
    usage = Usage((0,), cpu_of=lambda _: used, busy=lambda _: clock if others else used)
    usage.begin([1])
    for more_waited, more_used in samples:
        clock, waited, used = clock + 1, waited + more_waited, used + more_used
        usage.sample([1])
    return usage.totals()[1]


def test_a_group_that_waits_for_itself_is_owed_nothing_for_idling_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowded, idle, robbed = (0.9, 1.0), (0.0, 0.0), (0.5, 0.5)
    assert owed_after(monkeypatch, [crowded] * 5 + [idle] * 5) == 0
    assert owed_after(monkeypatch, [idle] * 5 + [robbed] * 4) == 2


def test_who_waits_for_itself_and_then_sleeps_within_a_moment_is_owed_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it could have a training repeated whenever it did not like how that one went."""
    crowded_and_idle = [(0.5, 0.5)] * 10
    assert owed_after(monkeypatch, crowded_and_idle, others=False) == 0
    assert owed_after(monkeypatch, crowded_and_idle) == 5  # the control


def test_the_machine_says_how_long_its_cpus_have_worked() -> None:
    cpu = min(os.sched_getaffinity(0))
    before = busy_seconds((cpu,))
    assert 0 < before <= busy_seconds(os.sched_getaffinity(0))
    assert busy_seconds(()) == 0


def test_coarse_ticks_of_a_busy_group_do_not_add_up_to_a_debt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = [(0.5, 0.75), (0.5, 1.25)] * 50
    assert owed_after(monkeypatch, ticks) <= 0.5


def test_memory_counts_what_is_held_and_not_the_pages_of_a_mapped_file() -> None:
    size = 48 << 20
    before = resident_bytes(os.getpid())
    # Not in the temporary folder, which may itself lie in memory.
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            assert mapped[:: mmap.PAGESIZE].count(0) == size // mmap.PAGESIZE
            assert resident_bytes(os.getpid()) - before < size / 2
    held = bytearray(b"x" * size)
    assert resident_bytes(os.getpid()) - before > len(held) * 0.8


@pytest.mark.parametrize(("peak_mb", "verdict"), [(80, (-9, True)), (20, (None, False))])
def test_who_held_little_is_not_blamed_when_the_kernel_runs_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, peak_mb: int, verdict: tuple[int | None, bool]
) -> None:
    kills = iter([7, 8])
    monkeypatch.setattr(supervision, "kernel_oom_kills", lambda: next(kills))
    tester = os.fork()  # for a supervisor takes all its descendants for the group
    if tester == 0:
        os._exit(0 if exit_of_one_who_was_killed(peak_mb << 20) == verdict else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(tester, 0)[1]) == 0


def exit_of_one_who_was_killed(peak_bytes: int) -> tuple[int | None, bool]:
    killed = os.fork()
    if killed == 0:
        os.kill(os.getpid(), 9)
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    order = Order(
        folder="/nowhere",
        zone="train",
        command=None,
        cpus=[0],
        uid=None,
        environment={},
        private=False,
        threads=1,
        memory_bytes=100 << 20,
        address_space_bytes=None,
        file_bytes=0,
        max_processes=1,
        log_bytes=1,
    )
    harness, end = map(Wire, socket.socketpair())
    supervisor = Supervisor(order, end, None, killed, -1, -1)
    supervisor._peak_bytes = peak_bytes
    supervisor._main_ended()
    harness.send({"command": "close"})
    supervisor._commanded()
    while (message := harness.receive(time.monotonic() + 5))["event"] != "closed":
        pass
    return message["exit"]["code"], message["exit"]["out_of_memory"]


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
