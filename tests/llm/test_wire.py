"""Faults of endpoints, on the wire: told apart, tried again where that helps, and bounded."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.llm import Patience
from darwin_exp.llm.failures import Failure, Fault, one_line, retry_after_seconds
from darwin_exp.llm.money import Spend
from darwin_exp.protocols import Finish, Interrupted, ModelsUnavailable, Stopped
from tests.llm.asking import FAST, FINE, Asked, Run, Say, Server, completion, refusal

PAGE = "<!doctype html><html><head><title>Welcome to the proxy</title></head></html>"
ONE_TRY = Patience(max_retries=0)


def is_one_line(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) < 600


# --- F1: come back later ----------------------------------------------------------------------


def test_f1_retry_after_in_seconds_is_honoured(tmp_path: Path) -> None:
    busy = Say(429, refusal("slow down"), {"Retry-After": "1"})
    with Server([busy, FINE]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().text == "fine"
        first, second = server.asked
        assert second.at - first.at >= 1.0
        assert run.failures() == [("rate_limited", False)]


def test_f1_retry_after_as_a_date_is_honoured(tmp_path: Path) -> None:
    until = int(time.time()) + 2
    busy = Say(429, refusal("slow down"), {"Retry-After": formatdate(until, usegmt=True)})
    with Server([busy, FINE]) as server, Run(tmp_path, server.url) as run:
        run.ask()
        assert server.asked[1].at >= until


def test_f1_retry_after_in_milliseconds_is_honoured(tmp_path: Path) -> None:
    busy = Say(503, refusal("slow down"), {"retry-after-ms": "300", "Retry-After": "0"})
    with Server([busy, FINE]) as server, Run(tmp_path, server.url) as run:
        run.ask()
        assert server.asked[1].at - server.asked[0].at >= 0.3


def test_f1_without_retry_after_these_pauses_would_be_too_short() -> None:
    assert FAST.pause(5, Failure(Fault.RATE_LIMITED, "")) < 0.3  # the control of the three above


def test_f1_a_longer_retry_after_than_anyone_waits_for_is_an_outage(tmp_path: Path) -> None:
    busy = Say(429, refusal("slow down"), {"Retry-After": "3600"})
    with Server([busy]) as server, Run(tmp_path, server.url) as run:
        with pytest.raises(Stopped, match=r"tiny at .*HTTP 429: slow down.*resume"):
            run.ask()
        assert len(server.asked) == 1


def test_f1_a_spent_quota_is_no_matter_of_patience(tmp_path: Path) -> None:
    spent = Say(429, refusal("You exceeded your current quota", code="insufficient_quota"))
    with Server([spent]) as server, Run(tmp_path, server.url, outage="wait") as run:
        with pytest.raises(ModelsUnavailable, match="quota"):
            run.ask()
        assert len(server.asked) == 1


@given(st.floats(0, 86_400), st.integers(1, 200))
def test_f1_no_pause_is_sooner_than_asked_for_or_longer_than_its_cap(
    asked_for: float, n_failed: int
) -> None:
    patience = Patience()
    failure = Failure(Fault.RATE_LIMITED, "", 429, asked_for)
    jitter = min(patience.longest_seconds, patience.first_seconds * 2 ** (n_failed - 1))
    assert asked_for <= patience.pause(n_failed, failure) <= asked_for + jitter
    assert patience.outage_pause(n_failed, failure) >= asked_for


@pytest.mark.parametrize("value", ["", "soon", "nan", "Mon, 99 Foo 2026", "-"])
def test_f1_a_retry_after_that_says_nothing_is_none(value: str) -> None:
    assert retry_after_seconds({"retry-after": value}) is None


@pytest.mark.parametrize(("value", "seconds"), [("-5", 0.0), ("2.5", 2.5), ("inf", 86_400.0)])
def test_f1_odd_retry_afters_are_bounded(value: str, seconds: float) -> None:
    assert retry_after_seconds({"retry-after": value}) == seconds


# --- F2: the server's own failures --------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
def test_f2_a_server_failure_is_tried_again(tmp_path: Path, status: int) -> None:
    with Server([Say(status, refusal("oh no")), Say(status, ""), FINE]) as server:
        with Run(tmp_path, server.url) as run:
            assert run.ask().text == "fine"
            assert run.failures() == [("server", False)] * 2
            assert run.of_kind("llm_answered")[0].measured["tries"] == 3
        assert len(server.asked) == 3


def test_f2_tries_are_bounded_and_the_line_says_how_to_go_on(tmp_path: Path) -> None:
    page = "<html><head><title>502 Bad Gateway</title></head></html>"
    with Server([Say(502, page)]) as server, Run(tmp_path, server.url) as run:
        with pytest.raises(
            Stopped, match=r"an HTML page \(502 Bad Gateway\).*llm.outage=wait"
        ) as e:
            run.ask()
        assert is_one_line(e.value)
        assert len(server.asked) == 6


def test_f2_a_gateway_that_reports_a_failure_as_a_success_is_tried_again(tmp_path: Path) -> None:
    failed = Say(200, {"error": {"message": "upstream is overloaded", "code": 503}})
    with Server([failed, FINE]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().text == "fine"
        assert run.failures() == [("server", False)]


def test_f2_pauses_do_not_draw_from_seeded_random_numbers() -> None:
    random.seed(7)
    before = random.getstate()
    FAST.pause(3, Failure(Fault.SERVER, ""))
    assert random.getstate() == before


# --- F3: time-outs and cuts ---------------------------------------------------------------------


def test_f3_a_server_that_does_not_answer_in_time_may_have_charged(tmp_path: Path) -> None:
    slow = Say(body=completion(), seconds=30)
    patience = Patience(max_retries=1, first_seconds=0.001)
    with Server([slow]) as server:
        with Run(tmp_path, server.url, seconds=0.3, patience=patience) as run:
            with pytest.raises(Stopped, match="no complete answer within the time allowed"):
                run.ask()
            assert run.failures() == [("timeout", True)] * 2
            assert run.money.spent.calls == 2
            assert run.money.spent.tokens > 100
        assert len(server.asked) == 2


def test_f3_a_server_that_only_drips_is_not_waited_for(tmp_path: Path) -> None:
    dripping = Server([Say(drips=True)])
    with dripping as server, Run(tmp_path, server.url, seconds=0.3, patience=ONE_TRY) as run:
        with pytest.raises(Stopped, match="within the time allowed"):
            run.ask()
        assert run.failures() == [("timeout", True)]


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port where connections are neither taken nor refused: its queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    try:
        for _ in range(16):
            client = socket.socket()
            waiting.append(client)
            client.settimeout(0.2)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                break
        else:
            pytest.skip("this kernel queues more connections than it was told to")
        yield listener.getsockname()[1]
    finally:
        for one in (*waiting, listener):
            one.close()


def test_f3_a_connection_that_is_not_taken_costs_nothing(tmp_path: Path, deaf_port: int) -> None:
    url = f"http://127.0.0.1:{deaf_port}/v1"
    with Run(tmp_path, url, seconds=0.3, patience=ONE_TRY) as run:
        with pytest.raises(Stopped, match="no connection within the time allowed"):
            run.ask()
        assert run.failures() == [("timeout", False)]
        assert run.money.spent == Spend()


@pytest.mark.parametrize(
    "broken", [Say(body=completion(), bytes_sent=40), Say(hangs_up=True)], ids=["cut", "hung up"]
)
def test_f3_an_answer_cut_in_the_middle_is_asked_for_again(tmp_path: Path, broken: Say) -> None:
    with Server([broken, FINE]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().text == "fine"
        assert run.failures() == [("connection", True)]
        assert run.money.spent.calls == 2
        same = {asked.headers["idempotency-key"] for asked in server.asked}
        assert len(same) == 1  # a server that honours it charges once


def test_f3_a_refused_connection_is_no_call_and_costs_nothing(tmp_path: Path) -> None:
    with Run(tmp_path, free_url()) as run:
        with pytest.raises(Stopped, match="refused"):
            run.ask()
        assert run.failures() == [("connection", False)] * 6
        assert run.money.spent == Spend()


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def test_a_stop_does_not_wait_for_an_answer(tmp_path: Path) -> None:
    with Server([Say(body=completion(), seconds=60)]) as server, Run(tmp_path, server.url) as run:
        threading.Timer(0.3, run.stopping.set).start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            run.ask()
        assert time.monotonic() - began < 10
        assert run.money.spent.calls == 1  # its end is not known
        with pytest.raises(Interrupted):
            run.ask("g01-i02/0/0")
        assert len(server.asked) == 1


# --- F4: what another try would not mend --------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 501])
def test_f4_a_refusal_ends_the_run_after_one_request(tmp_path: Path, status: int) -> None:
    said = refusal("see the manual for more information")
    with Server([Say(status, said)]) as server, Run(tmp_path, server.url, outage="wait") as run:
        with pytest.raises(ModelsUnavailable, match=f"tiny at {server.url}: HTTP {status}") as e:
            run.ask()
        assert is_one_line(e.value)
        assert len(server.asked) == 1
        assert run.failures() == [("fatal", False)]
        assert run.money.spent == Spend(calls=1)


def test_f4_a_wrong_key_is_named_by_its_variable(tmp_path: Path) -> None:
    with Server([Say(401, refusal("bad key"))]) as server, Run(tmp_path, server.url) as run:
        with pytest.raises(ModelsUnavailable, match="export DARWIN_TEST_KEY"):
            run.ask()
        assert "bad key" not in str(run.of_kind("llm_failed"))  # it may show half of the key


def test_f4_a_prompt_too_long_for_the_model_is_not_taken_for_an_unknown_parameter(
    tmp_path: Path,
) -> None:
    said = refusal(
        "'max_tokens' or 'max_completion_tokens' is too large: 50. This model's maximum context "
        "length is 40 tokens"
    )
    with Server([Say(400, said)]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().finish is Finish.REFUSED  # this question, and no other
        assert len(server.asked) == 1
        assert run.money.spent.usd == 0.0


def test_f4_without_a_key_nothing_is_sent_to_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DARWIN_TEST_KEY", raising=False)
    with Run(tmp_path, "http://models.invalid/v1") as run:
        with pytest.raises(ModelsUnavailable, match="export DARWIN_TEST_KEY=YOUR_KEY"):
            run.ask()
        assert run.money.spent == Spend()


# --- what is no chat completion -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (PAGE, r"an HTML page \(Welcome to the proxy\)"),
        ("", "answered with nothing"),
        ({"ok": True}, "something else"),
        ([1, 2], "something else"),
        ({"choices": [{"text": "an older protocol"}]}, "something else"),
        ({"choices": ["?"]}, "something else"),
    ],
)
def test_a_page_or_other_json_ends_the_run_with_one_line(
    tmp_path: Path, body: Any, told: str
) -> None:
    with Server([Say(200, body)]) as server, Run(tmp_path, server.url, outage="wait") as run:
        with pytest.raises(ModelsUnavailable, match=told) as e:
            run.ask()
        assert "base_url" in str(e.value)
        assert is_one_line(e.value)
        assert len(server.asked) == 1
        assert run.failures() == [("unreadable", False)]


def test_an_empty_list_of_choices_is_tried_again_a_few_times_and_then_ends_the_run(
    tmp_path: Path,
) -> None:
    empty = Say(200, {**completion(), "choices": []})
    with Server([empty]) as server, Run(tmp_path, server.url, outage="wait") as run:
        with pytest.raises(ModelsUnavailable, match="an empty list of choices"):
            run.ask()
        assert len(server.asked) == 6
    (tmp_path / "other").mkdir()
    with Server([empty, FINE]) as server, Run(tmp_path / "other", server.url) as run:
        assert run.ask().text == "fine"


# --- F7: answers that say nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        completion(None, refusal="I cannot help with that."),
        completion("half of it", "content_filter"),
        completion(""),
        completion(None),
        completion("  \n"),
    ],
    ids=["refusal", "content filter", "empty", "null", "blank"],
)
def test_f7_a_refusal_is_an_answer_that_is_remembered_and_not_asked_for_again(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    with Server([Say(body=said)]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().finish is Finish.REFUSED
        assert run.ask().finish is Finish.REFUSED
        assert len(server.asked) == 1


@pytest.mark.parametrize("text", ["half of", None])
def test_f7_an_answer_that_was_cut_off_says_so(tmp_path: Path, text: str | None) -> None:
    with Server([Say(body=completion(text, "length"))]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().finish is Finish.LENGTH


def test_tokens_are_counted_where_the_server_does_not_say(tmp_path: Path) -> None:
    said = completion("one two three")
    del said["usage"]
    with Server([Say(body=said)]) as server, Run(tmp_path, server.url) as run:
        reply = run.ask(text="four words of prompt")
        assert (reply.tokens_in, reply.tokens_out) == (3 + 4, 3)


def test_content_in_parts_and_half_a_surrogate_pair_can_be_written_down(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a\ud800"}, {"type": "text", "text": "b"}]
    said = completion(None)
    said["choices"][0]["message"]["content"] = parts
    with Server([Say(body=said)]) as server, Run(tmp_path, server.url) as run:
        assert run.ask().text == "a?b"


# --- what a server does not know ----------------------------------------------------------------


def speaks(*formats: str) -> Any:
    """Return a server's script that refuses every response format but these."""

    def script(asked: Asked, n: int) -> Say:  # noqa: ARG001
        wanted = asked.response_format or "text"
        if wanted in formats:
            return FINE
        return Say(400, refusal(f"response_format.type {wanted} is not supported"))

    return script


@pytest.mark.parametrize(
    ("known", "sent"),
    [
        (("json_schema",), ["json_schema"]),
        (("json_object",), ["json_schema", "json_object"]),
        (("text",), ["json_schema", "json_object", None]),
    ],
)
def test_the_response_format_falls_back_and_is_remembered(
    tmp_path: Path, known: tuple[str, ...], sent: list[str | None]
) -> None:
    with Server(speaks(*known)) as server:
        with Run(tmp_path, server.url) as run:
            run.ask()
            run.ask("g01-i02/0/0")
            answered = run.of_kind("llm_answered")[0].payload
            assert answered["response_format"] == known[0]
            assert answered["schema"] == "edits"
            assert [role for role, _ in answered["messages"]] == ["system", "user"]
            assert "JSON schema" not in answered["messages"][0][1]
            assert run.money.spent.tokens == 2 * 15
        with Run(tmp_path, server.url) as resumed:
            resumed.ask("g01-i03/0/0")
        assert [asked.response_format for asked in server.asked] == [*sent, sent[-1], sent[-1]]
        told = ["JSON schema" in asked.body["messages"][0]["content"] for asked in server.asked]
        assert told == [asked.response_format != "json_schema" for asked in server.asked]


def test_a_server_that_refuses_every_format_is_final(tmp_path: Path) -> None:
    with Server(speaks()) as server, Run(tmp_path, server.url) as run:
        with pytest.raises(ModelsUnavailable, match="HTTP 400"):
            run.ask()
        assert len(server.asked) == 3


def test_free_text_is_asked_for_without_a_format(tmp_path: Path) -> None:
    with Server() as server, Run(tmp_path, server.url) as run:
        run.ask(schema=None)
        assert server.asked[0].response_format is None
        assert run.of_kind("llm_answered")[0].payload["response_format"] == "text"


def test_other_names_for_the_limit_and_a_fixed_temperature_are_learned(tmp_path: Path) -> None:
    def script(asked: Asked, n: int) -> Say:  # noqa: ARG001
        if "max_tokens" in asked.body:
            message = (
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead."
            )
            return Say(400, refusal(message, param="max_tokens", code="unsupported_parameter"))
        if "temperature" in asked.body:
            message = "Unsupported value: 'temperature' does not support 0.7 with this model."
            return Say(400, refusal(message, param="temperature", code="unsupported_value"))
        return FINE

    with Server(script) as server, Run(tmp_path, server.url, temperature=0.7) as run:
        run.ask()
        run.ask("g01-i02/0/0")
        assert len(server.asked) == 4
        last = server.asked[-1].body
        assert last["max_completion_tokens"] == 50
        assert last["response_format"]["json_schema"]["strict"] is True
        assert last["response_format"]["json_schema"]["name"] == "edits"
        refused = [event.payload["refused"] for event in run.of_kind("llm_failed")]
        assert refused == ["max_tokens", "temperature"]


def test_a_temperature_out_of_range_is_not_dropped_in_silence(tmp_path: Path) -> None:
    said = refusal("temperature must be at most 2", param="temperature")
    with Server([Say(400, said)]) as server, Run(tmp_path, server.url, temperature=9.0) as run:
        with pytest.raises(ModelsUnavailable, match="at most 2"):
            run.ask()
        assert len(server.asked) == 1


def test_idempotency_keys_change_after_a_known_failure_and_between_runs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Server([Say(503, ""), FINE]) as server:
        for folder in ("a", "b"):
            with Run(tmp_path / folder, server.url) as run:
                run.ask()
        sent = [asked.headers["idempotency-key"] for asked in server.asked]
        assert len(set(sent)) == len(sent) == 3


def test_a_server_of_this_machine_is_asked_without_the_environments_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, free_url())
    with Server() as server, Run(tmp_path, server.url) as run:
        assert run.ask().text == "fine"
        assert server.asked[0].path == "/v1/chat/completions"


def test_messages_of_others_become_one_short_line_without_control_characters() -> None:
    line = one_line("a\x1b[31m\nb\t" + "c" * 1000)
    assert line.startswith("a [31m b ccc")
    assert len(line) <= 300
    assert line.isprintable()
