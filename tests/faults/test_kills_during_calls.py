"""A run that is killed while its language models answer: nothing is paid twice, nothing lost.

`make test-kills` does it a hundred times.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import pytest

from darwin_exp.journal import comparable, load
from darwin_exp.protocols import Event
from darwin_exp.stub_llm import StubServer
from tests.faults import killed_run

PROGRAM = Path(killed_run.__file__)
ANSWER_SECONDS = 0.15
CALLS = ("llm_reserved", "llm_answered", "llm_failed")


def _start(folder: Path, server: StubServer) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2])}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), server.base_url],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )


def _run_and_kill(folder: Path, server: StubServer, rng: Random, most: int) -> int:
    """Run to the end, killing the process up to `most` times; return how often it was killed."""
    kills = 0
    while True:
        process = _start(folder, server)
        try:
            # Where a start takes longer than this, nothing was under way: that counts for nothing.
            said, _ = process.communicate(timeout=rng.uniform(0.8, 3.0) if kills < most else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, said.decode()
        return kills


def _answered(events: list[Event]) -> dict[str, Event]:
    return {event.key: event for event in events if event.kind == "llm_answered"}


def _course(events: list[Event]) -> list[tuple[str, str, str]]:
    """Return what must be equal, in an order that does not depend on which slot was faster."""
    return sorted(comparable(events))


def _without_end(events: list[Event]) -> int:
    """Return how many calls were under way when their process was killed."""
    n = {kind: sum(event.kind == kind for event in events) for kind in CALLS}
    return n["llm_reserved"] - n["llm_answered"] - n["llm_failed"]


def _kill_until(n_kills: int, seed: int, root: Path) -> tuple[int, int, int]:
    """Kill runs so often; return how many answers they used, how many were paid, and how many
    calls were under way at a kill.

    Every run must end as the uninterrupted one did, within its cap.
    """
    rng = Random(seed)
    done, used, paid, in_flight, n = 0, 0, 0, 0, 0
    with StubServer(delay_seconds=ANSWER_SECONDS) as server:
        assert _run_and_kill(root / "whole", server, rng, 0) == 0
    whole = _course(load(root / "whole"))
    while done < n_kills:
        folder = root / f"killed-{n}"
        # On the same port: the endpoint is part of what an agent is, and so of every record.
        with StubServer(
            delay_seconds=ANSWER_SECONDS, port=urlsplit(server.base_url).port or 0
        ) as again:
            done += _run_and_kill(folder, again, rng, n_kills - done)
            paid += again.paid
        events = load(folder)
        assert _course(events) == whole
        used += len(_answered(events))
        in_flight += _without_end(events)
        spent = sum(event.payload["usd"] for event in _answered(events).values())
        assert spent <= killed_run.MAX_USD
        n += 1
    return used, paid, in_flight


def test_f11_ten_kills_during_calls_lose_nothing_and_pay_nothing_twice(tmp_path: Path) -> None:
    used, paid, in_flight = _kill_until(10, 11, tmp_path)
    assert paid == used > 0
    assert in_flight > 0  # or nothing of this was tried


@pytest.mark.kills
def test_f11_a_hundred_kills_during_calls(tmp_path: Path) -> None:
    used, paid, in_flight = _kill_until(100, 12, tmp_path)
    print(f"100 kills, {in_flight} calls under way: {used} answers used, {paid} paid")
    assert paid == used > 0
    assert in_flight > 10
