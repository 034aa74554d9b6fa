"""A question is paid for once and within the caps, whatever happens to the process or endpoint."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from darwin_exp.journal import Divergence
from darwin_exp.llm import Patience
from darwin_exp.llm.exchanges import prompt_sha256
from darwin_exp.llm.failures import Failure, Fault
from darwin_exp.llm.money import Money, Spend
from darwin_exp.protocols import Finish, Interrupted, ModelsUnavailable, Reply, Stopped
from tests.llm.asking import FAST, FINE, KEY, NAME, Asked, Run, Say, Server, completion, refusal
from tests.llm.test_wire import free_url

PRICES = {NAME: (1000.0, 1000.0)}  # USD for a million tokens: a thousandth for each


def reserved_tokens(folder: Path) -> int:
    """Return how many tokens are set aside for one call."""
    folder.mkdir()
    with Server() as server, Run(folder, server.url) as run:
        run.ask()
        return int(run.of_kind("llm_reserved")[0].payload["tokens"])


# --- F11: paid for once -------------------------------------------------------------------------


def test_f11_an_answered_question_is_not_asked_again_in_a_resumed_run(tmp_path: Path) -> None:
    with Server() as server:
        with Run(tmp_path, server.url) as run:
            first = run.ask()
            assert run.ask() == first
        with Run(tmp_path, server.url) as resumed:
            assert resumed.ask() == first
            assert resumed.money.spent == Spend(0.0, 15, 1)
        assert len(server.asked) == 1
    with Run(tmp_path, server.url) as without_server:
        assert without_server.ask() == first == Reply("fine", Finish.COMPLETE, 10, 5, 0.0)


def test_f11_another_question_under_the_same_key_is_a_divergence(tmp_path: Path) -> None:
    with Server() as server:
        with Run(tmp_path, server.url) as run:
            run.ask()
        told = pytest.raises(Divergence, match=f"llm_answered {KEY}.*prompt_sha256")
        with Run(tmp_path, server.url) as resumed, told:
            resumed.ask(text="Rewrite that.")
        assert len(server.asked) == 1


def test_f11_a_call_whose_end_is_not_recorded_stays_counted_and_keeps_its_idempotency_key(
    tmp_path: Path,
) -> None:
    with Server([Say(body=completion(), seconds=60), FINE]) as server:
        with Run(tmp_path, server.url) as run:
            threading.Timer(0.3, run.stopping.set).start()
            with pytest.raises(Interrupted):
                run.ask()
            reserved = run.of_kind("llm_reserved")[0].payload["tokens"]
        with Run(tmp_path, server.url) as resumed:
            assert resumed.money.spent == Spend(0.0, reserved, 1)
            resumed.ask()
            keys = [event.key for event in resumed.of_kind("llm_reserved")]
            assert keys == [f"{KEY}.0", f"{KEY}.1"]
            assert resumed.money.spent == Spend(0.0, reserved + 15, 2)
        first, second = (asked.headers["idempotency-key"] for asked in server.asked)
        assert first == second


def test_f11_everything_an_answer_depends_on_is_in_the_hash(tmp_path: Path) -> None:
    with Run(tmp_path, "http://127.0.0.1:1/v1", temperature=0.5) as run:
        same = {prompt_sha256(run.query()), prompt_sha256(run.query(key="g09-i09/1/1"))}
        others = {
            prompt_sha256(run.query(text="Rewrite this. ")),
            prompt_sha256(run.query(schema=None)),
            prompt_sha256(run.query(max_tokens=51)),
        }
    (tmp_path / "b").mkdir()
    with Run(tmp_path / "b", "http://127.0.0.1:1/v1", temperature=0.6) as warmer:
        others.add(prompt_sha256(warmer.query()))
    assert len(same) == 1
    assert len(same | others) == 5


def test_what_was_exchanged_is_written_down_in_full(tmp_path: Path) -> None:
    with Server() as server, Run(tmp_path, server.url, money=Money(9.0, None, None, PRICES)) as run:
        reply = run.ask()
        [reserved] = run.of_kind("llm_reserved")
        [answered] = run.of_kind("llm_answered")
        assert reserved.key == f"{KEY}.0"
        assert answered.key == KEY
        assert reply.usd == answered.payload["usd"] == pytest.approx(0.015)
        assert reserved.payload["usd"] == pytest.approx(reserved.payload["tokens"] / 1000)
        assert answered.payload["model"]["name"] == NAME
        assert answered.payload["messages"] == [
            ["system", "You write code."],
            ["user", "Rewrite this."],
        ]
        assert answered.payload["prompt_sha256"] == reserved.payload["prompt_sha256"]
        assert answered.payload["individual_id"] == "g01-i01"
        assert answered.payload["purpose"] == "draft"
        assert answered.payload["finish"] == "complete"
        assert answered.payload["max_tokens"] == 50
        assert answered.measured["tries"] == 1


# --- F10: caps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["usd", "tokens", "calls"])
def test_f10_a_cap_holds_across_resumed_runs(tmp_path: Path, unit: str) -> None:
    each = reserved_tokens(tmp_path / "probe")
    # Room for two calls as they are settled and a third as it is reserved.
    caps: dict[str, tuple[float | None, int | None, int | None]] = {
        "usd": ((2 * 15 + each) / 1000, None, None),
        "tokens": (None, 2 * 15 + each, None),
        "calls": (None, None, 3),
    }
    most = caps[unit]
    (tmp_path / "run").mkdir()
    with Server() as server:
        for n in range(3):
            with Run(tmp_path / "run", server.url, money=Money(*most, PRICES)) as run:
                run.ask(f"g01-i0{n}/0/0")
        for _ in range(2):
            with Run(tmp_path / "run", server.url, money=Money(*most, PRICES)) as run:
                with pytest.raises(Stopped, match=f"llm.max_{unit}=.*resume"):
                    run.ask("g01-i03/0/0")
                assert run.ask("g01-i00/0/0").text == "fine"  # what is paid for is still there
        assert len(server.asked) == 3


class Forgetful(Money):
    """Money that looks at what is settled only: the control of the reservations."""

    def reserve(self, key: str, tokens: int, usd: float | None) -> None:
        with self._mutex:
            self._refuse_past_a_cap(self._settled, Spend(usd or 0.0, tokens, 1))


@pytest.mark.parametrize(("kind", "n_calls"), [(Money, 1), (Forgetful, 2)])
def test_f10_two_slots_cannot_both_spend_the_last_dollar(
    tmp_path: Path, kind: type[Money], n_calls: int
) -> None:
    each = reserved_tokens(tmp_path / "probe")
    both_asked = threading.Barrier(2)

    def script(asked: Asked, n: int) -> Say:  # noqa: ARG001
        said = completion()
        said["usage"] = {"prompt_tokens": each - 50, "completion_tokens": 50}
        return Say(body=said, seconds=0.5)

    cap = 1.5 * each / 1000
    money = kind(cap, None, None, PRICES)
    (tmp_path / "run").mkdir()
    with Server(script) as server, Run(tmp_path / "run", server.url, money=money) as run:

        def ask(key: str) -> str:
            both_asked.wait()
            try:
                return run.ask(key).text
            except Stopped:
                return "stopped"

        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(ask, ["g01-i00/0/0", "g01-i01/0/0"]))
        assert len(server.asked) == said.count("fine") == n_calls
        assert (run.money.spent.usd <= cap) == (kind is Money)


def test_f10_a_failure_that_costs_nothing_gives_its_reservation_back(tmp_path: Path) -> None:
    each = reserved_tokens(tmp_path / "probe")
    (tmp_path / "run").mkdir()
    money = Money(None, each, None, {})
    failing = Server([Say(500, ""), Say(429, ""), FINE])
    with failing as server, Run(tmp_path / "run", server.url, money=money) as run:
        assert run.ask().text == "fine"
        assert run.money.spent == Spend(0.0, 15, 3)


# --- F12: an endpoint that is down ------------------------------------------------------------


def in_a_thread(run: Run, key: str = KEY) -> tuple[threading.Thread, list[str]]:
    """Ask in another thread; what came of it is in the list once that has ended."""
    ended: list[str] = []

    def ask() -> None:
        try:
            ended.append(run.ask(key).text)
        except (Interrupted, Stopped, ModelsUnavailable) as end:
            ended.append(type(end).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, ended


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited for something that did not happen"
        time.sleep(0.01)


def test_f12_a_run_waits_for_an_endpoint_that_is_down_and_goes_on(tmp_path: Path) -> None:
    url = free_url()
    with Run(tmp_path, url, outage="wait") as run:
        began = time.monotonic()
        thread, ended = in_a_thread(run)
        wait_for(lambda: bool(run.said))
        time.sleep(0.3)
        assert not ended
        n_tries = len(run.of_kind("llm_reserved"))
        # Six at once, and then with pauses of 0.02 s and more: no busy loop.
        assert n_tries <= 7 + (time.monotonic() - began) / FAST.outage_seconds
        with Server(port=int(url.rpartition(":")[2].removesuffix("/v1"))) as server:
            thread.join(30)
            assert ended == ["fine"]
            assert len(server.asked) == 1
        assert len(run.said) == 2
        assert "Connection refused" in run.said[0]
        assert run.said[1] == f"{url} answers again"
        assert run.money.spent == Spend(0.0, 15, 1)


def test_f12_pauses_grow_to_ten_minutes_so_that_an_hour_is_a_dozen_requests() -> None:
    pauses = [Patience().outage_pause(n, Failure(Fault.SERVER, "")) for n in range(100)]
    assert pauses[:6] == [30, 60, 120, 240, 480, 600]
    assert pauses[-1] == 600


def test_f12_a_stop_interrupts_the_wait(tmp_path: Path) -> None:
    patience = Patience(first_seconds=0.001, longest_seconds=0.002)  # and 30 s in an outage
    with Server([Say(503, "")]) as server:
        with Run(tmp_path, server.url, outage="wait", patience=patience) as run:
            thread, ended = in_a_thread(run)
            wait_for(lambda: bool(run.said))
            run.stopping.set()
            thread.join(10)
            assert ended == ["Interrupted"]
        assert len(server.asked) == 6


def test_f12_in_an_outage_one_slot_tries_for_all(tmp_path: Path) -> None:
    n_slots, n_failures = 4, 40
    patience = Patience(
        first_seconds=0.001,
        longest_seconds=0.002,
        outage_seconds=0.01,
        longest_outage_seconds=0.02,
    )
    down = Server([Say(503, "")] * n_failures + [FINE])
    with down as server, Run(tmp_path, server.url, outage="wait", patience=patience) as run:
        with ThreadPoolExecutor(n_slots) as pool:
            asking = [pool.submit(run.ask, f"g01-i0{n}/0/0", f"slot {n}") for n in range(n_slots)]
            assert [future.result(30).text for future in asking] == ["fine"] * n_slots
        probes = server.asked[n_slots * 6 : n_failures]
        assert len({asked.body["messages"][-1]["content"] for asked in probes}) == 1
        assert [line.endswith("answers again") for line in run.said] == [False, True]


def test_f12_a_prober_that_gives_up_lets_the_others_go_on(tmp_path: Path) -> None:
    patience = Patience(max_retries=0, outage_seconds=0.01)

    gone = Server([Say(503, ""), Say(404, refusal("no such model"))])
    with gone as server, Run(tmp_path, server.url, outage="wait", patience=patience) as run:
        with pytest.raises(ModelsUnavailable):
            run.ask()
        with pytest.raises(ModelsUnavailable):
            run.ask("g01-i02/0/0")
        assert len(server.asked) == 3


# --- F13: the key -------------------------------------------------------------------------------

CANARY = "sk-canary-5f1d0c7e9b"


def parrot(asked: Asked, n: int) -> Say:
    """Repeat the key wherever a server can."""
    key = asked.headers["authorization"]
    return [
        Say(500, refusal(f"failed for {key}", code=key)),
        Say(400, refusal(f"response_format is unknown to {key}", param="response_format")),
        Say(body=completion(f"The key is {key}.")),
        Say(401, refusal(f"wrong key: {key}")),
        Say(403, f"<html><title>{key}</title></html>"),
        Say(404, refusal(f"no model for {key}")),
        Say(200, f"<html><title>{key}</title></html>"),
    ][min(n, 6)]


def test_f13_the_key_is_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DARWIN_TEST_KEY", f" {CANARY}\n")
    caplog.set_level(logging.DEBUG)
    told = []
    with Server(parrot) as server:
        with Run(tmp_path, server.url, outage="wait") as run:
            told.append(repr(run.ask()))
            for n in range(2, 6):
                with pytest.raises(ModelsUnavailable) as error:
                    run.ask(f"g01-i0{n}/0/0")
                told.append(str(error.getrepr(style="long")))
            told += run.said
        with Run(_fresh(tmp_path / "other"), free_url()) as run:
            with pytest.raises(Stopped) as stopped:
                run.ask()
            told.append(str(stopped.getrepr(style="long")))
        # The control: the server did get it, and had every chance to give it away.
        assert all(CANARY in asked.headers["authorization"] for asked in server.asked)
        assert len(server.asked) == 7
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in found} >= {"journal.sqlite"}
    for path in found:
        assert CANARY.encode() not in path.read_bytes()
    output = capfd.readouterr()
    for text in (*told, output.out, output.err, caplog.text):
        assert CANARY not in text


def _fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_f13_only_the_named_variable_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.delenv("DARWIN_TEST_KEY", raising=False)
    with Server() as server, Run(tmp_path, server.url) as run:
        run.ask()
        assert server.asked[0].headers["authorization"] == "Bearer unused"
        assert CANARY not in str(server.asked)


def test_f13_a_key_with_characters_that_no_header_holds_is_refused_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARWIN_TEST_KEY", f"“{CANARY}”")
    with Server() as server, Run(tmp_path, server.url) as run:
        with pytest.raises(ModelsUnavailable, match="DARWIN_TEST_KEY holds characters") as error:
            run.ask()
        assert CANARY not in str(error.value)
        assert not server.asked
