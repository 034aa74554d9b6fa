"""The stub's server over the wire: real clients, real sockets on the loopback interface."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from darwin_exp.mutation.answer import read_answer, schema_of
from darwin_exp.stub_llm import Author, Fault, StubServer
from darwin_exp.stub_llm.__main__ import main
from darwin_exp.stub_llm.faults import every_so_often

ROOT = Path(__file__).resolve().parents[2]
PROMPT = """## The code

=== file: settings.json ===
{
  "n_heads": 4,
  "learning_rate": 0.003,
  "beta1": 0.9
}
=== end of settings.json ===

## Your answer

Form: edits
"""
MESSAGES: Any = [{"role": "system", "content": "You edit."}, {"role": "user", "content": PROMPT}]
RATE = Author(only=("higher_rate",))


@contextmanager
def client_of(server: StubServer, key: str = "unused", retries: int = 0) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key=key, base_url=server.base_url, max_retries=retries, timeout=30
    ) as client:
        yield client


def schema_format(form: str = "edits") -> Any:
    schema = schema_of(form)
    return {
        "type": "json_schema",
        "json_schema": {"name": form, "schema": schema, "strict": True},
    }


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "stub-careful", "messages": MESSAGES, **more})


def faulty(*faults: Fault | None) -> StubServer:
    """Make a server whose first calls go wrong in these ways."""
    script = dict(enumerate(faults))
    return StubServer(RATE, faults=script.get)


def ledger(server: StubServer) -> dict[str, Any]:
    url = server.base_url.removesuffix("/v1") + "/stub/ledger"
    with urllib.request.urlopen(url, timeout=30) as response:
        content: dict[str, Any] = json.load(response)
    return content


class TestProtocol:
    def test_the_openai_client_gets_an_answer_that_keeps_the_schema(self) -> None:
        with StubServer(RATE) as server, client_of(server) as client:
            completion = ask(client, response_format=schema_format())
        assert completion.object == "chat.completion"
        assert completion.model == "stub-careful"
        (choice,) = completion.choices
        assert choice.finish_reason == "stop"
        assert choice.message.role == "assistant"
        assert choice.message.refusal is None
        content = json.loads(choice.message.content)
        assert set(content) == {
            "reasoning", "summary", "expected_effect", "edits", "requests",
        }  # fmt: skip
        answer = read_answer(choice.message.content, "edits")
        assert answer.edits[0].file == "settings.json"
        assert "learning_rate 0.003 -> " in answer.summary
        usage = completion.usage
        assert usage.prompt_tokens > 50
        assert usage.completion_tokens > 20
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    def test_without_a_schema_the_json_stands_in_a_fence_with_prose_around(self) -> None:
        with StubServer(RATE) as server, client_of(server) as client:
            bare = ask(client, response_format={"type": "json_object"})
            fenced = ask(client).choices[0].message.content
        assert json.loads(bare.choices[0].message.content)["edits"]
        assert "```json\n{" in fenced
        assert not fenced.startswith(("{", "```"))
        assert read_answer(fenced, "edits") == read_answer(bare.choices[0].message.content, "edits")

    def test_a_format_that_is_not_supported_is_refused(self) -> None:
        with (
            StubServer(RATE, formats=("json_object", "text")) as server,
            client_of(server) as client,
        ):
            with pytest.raises(openai.BadRequestError, match="response_format 'json_schema'"):
                ask(client, response_format=schema_format())
            assert ask(client, response_format={"type": "json_object"}).choices
            assert server.paid == 1

    def test_the_models_are_listed_and_others_are_not_found(self) -> None:
        with StubServer() as server, client_of(server) as client:
            names = [model.id for model in client.models.list()]
            assert names == ["stub-careful", "stub-bold", "stub-sloppy"]
            assert client.models.retrieve("stub-bold").id == "stub-bold"
            with pytest.raises(openai.NotFoundError) as caught:
                ask(client, model="gpt-4o")
            assert caught.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("gpt-4o")
            assert server.paid == 0

    def test_f4_a_wrong_key_is_refused_and_never_repeated(self) -> None:
        with StubServer(RATE, key="right-key") as server:
            with client_of(server, "wrong-key") as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    ask(client)
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
            assert caught.value.code == "invalid_api_key"
            assert "wrong-key" not in str(caught.value)
            with client_of(server, "right-key") as client:
                assert ask(client).choices
            assert server.paid == 1

    def test_most_tokens_cut_an_answer_off(self) -> None:
        with StubServer(RATE) as server, client_of(server) as client:
            cut = ask(client, max_completion_tokens=10)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 10

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/v1/chat/completions", b"{not json", 400),
            ("/v1/chat/completions", b"[]", 400),
            ("/v1/chat/completions", b'{"model": "stub-bold"}', 400),
            ("/v1/chat/completions", b'{"messages": []}', 400),
            ("/v1/completions", b"{}", 404),
            ("/chat/completions", b"{}", 404),
        ],
    )
    def test_errors_have_the_protocols_shape(self, path: str, body: bytes, status: int) -> None:
        with StubServer() as server, connection_to(server) as connection:
            connection.request("POST", path, body)
            response = connection.getresponse()
            error = json.load(response)["error"]
        assert response.status == status
        assert set(error) == {"message", "type", "param", "code"}

    def test_a_connection_serves_several_requests(self) -> None:
        with StubServer(RATE) as server, connection_to(server) as connection:
            body = json.dumps({"model": "stub-careful", "messages": MESSAGES})
            sockets = set()
            for _ in range(3):
                connection.request("POST", "/v1/chat/completions", body)
                response = connection.getresponse()
                assert response.version == 11
                assert json.load(response)["choices"]
                sockets.add(id(connection.sock))
            assert sockets != {id(None)}
            assert len(sockets) == 1

    def test_it_is_silent_unless_it_is_told_to_log(self, capfd: pytest.CaptureFixture[str]) -> None:
        lines: list[str] = []
        with StubServer(RATE) as server, client_of(server) as client:
            ask(client)
        assert capfd.readouterr() == ("", "")
        with StubServer(RATE, log=lines.append) as server, client_of(server) as client:
            ask(client)
        assert any("POST /v1/chat/completions" in line for line in lines)


@contextmanager
def connection_to(server: StubServer) -> Iterator[http.client.HTTPConnection]:
    address = server.base_url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


class TestLedger:
    def test_calls_and_what_was_paid_for_can_be_counted_from_another_process(self) -> None:
        with faulty(None, Fault.error(503)) as server, client_of(server) as client:
            ask(client)
            with pytest.raises(openai.InternalServerError):
                ask(client)
            ask(client, messages=[*MESSAGES, {"role": "user", "content": "Again."}])
            counts = ledger(server)
            assert counts == {"calls": 3, "paid": 2, "by_answer": {"higher_rate": 2}}
            assert server.ledger() == counts

    def test_f11_an_idempotency_key_is_answered_again_and_paid_for_once(self) -> None:
        with StubServer() as server, client_of(server) as client:
            other = [*MESSAGES, {"role": "user", "content": "Another question."}]
            first = ask(client, extra_headers={"Idempotency-Key": "g01-i03/0/0"})
            again = ask(client, messages=other, extra_headers={"Idempotency-Key": "g01-i03/0/0"})
            assert first == again
            assert server.paid == 1
            ask(client, extra_headers={"Idempotency-Key": "g01-i03/0/1"})
            ask(client)
            ask(client)
            assert server.paid == 4

    def test_requests_are_kept_with_their_headers(self) -> None:
        with StubServer(RATE) as server, client_of(server, "some-key") as client:
            ask(client, temperature=0.3)
        (received,) = server.requests
        assert received.headers["authorization"] == "Bearer some-key"
        assert received.body["temperature"] == 0.3
        assert received.body["messages"] == MESSAGES

    def test_the_same_question_gets_the_same_answer_from_another_server(self) -> None:
        given = []
        for _ in range(2):
            with StubServer(Author(seed=5)) as server, client_of(server) as client:
                given.append(ask(client, model="stub-sloppy").choices[0])
        assert given[0] == given[1]

    def test_many_clients_are_served_at_a_time(self) -> None:
        with StubServer(RATE, delay_seconds=0.05) as server, client_of(server) as client:

            def one(number: int) -> str:
                turn = {"role": "user", "content": f"Question {number}."}
                text: str = ask(client, messages=[*MESSAGES, turn]).choices[0].message.content
                return text

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(one, range(24)))
            assert server.paid == 24


class TestFaults:
    def test_f1_a_rate_limit_says_when_to_come_back(self) -> None:
        limit = Fault.error(429, "slow down", "rate_limit_exceeded", Retry_After="7")
        with faulty(limit) as server, client_of(server) as client:
            with pytest.raises(openai.RateLimitError, match="slow down") as caught:
                ask(client)
            assert caught.value.response.headers["retry-after"] == "7"
            assert ask(client).choices
            assert server.paid == 1

    def test_f2_a_client_that_tries_again_gets_its_answer(self) -> None:
        error = Fault.error(500)
        with faulty(error, error) as server, client_of(server, retries=3) as client:
            assert ask(client).choices
            assert (len(server.requests), server.paid) == (3, 1)

    @pytest.mark.parametrize("fault", [Fault.cut(), Fault.hang_up()], ids=["cut", "hang up"])
    def test_f3_a_broken_connection_is_seen_and_not_paid_for(self, fault: Fault) -> None:
        with faulty(fault) as server, client_of(server) as client:
            with pytest.raises(openai.APIConnectionError):
                ask(client)
            assert server.paid == 0
            assert ask(client).choices
            assert server.paid == 1

    def test_f3_an_answer_that_takes_too_long_is_given_up(self) -> None:
        with faulty(Fault.slow(20)) as server, client_of(server) as client:
            with pytest.raises(openai.APITimeoutError):
                ask(client, timeout=0.3)
            assert server.paid == 0

    @pytest.mark.parametrize("fault", [Fault.html(), Fault.garbage()], ids=["html", "garbage"])
    def test_f5_what_is_no_completion_is_not_paid_for(self, fault: Fault) -> None:
        with faulty(fault) as server, connection_to(server) as connection:
            body = json.dumps({"model": "stub-careful", "messages": MESSAGES})
            connection.request("POST", "/v1/chat/completions", body)
            response = connection.getresponse()
            content = response.read()
            assert response.status == 200
            with pytest.raises(ValueError, match=r"Expecting value|Unterminated"):
                json.loads(content)
            assert server.paid == 0

    def test_f6_f7_answers_that_end_otherwise_are_completions_and_cost_as_much(self) -> None:
        faults = (
            Fault.ends("length"),
            Fault.ends("content_filter"),
            Fault.refuses("No."),
            Fault.no_choices(),
        )
        with faulty(*faults) as server, client_of(server) as client:
            length, filtered, refused, none = (
                ask(client, response_format=schema_format()) for _ in faults
            )
            assert length.choices[0].finish_reason == "length"
            with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
                json.loads(length.choices[0].message.content)
            assert filtered.choices[0].finish_reason == "content_filter"
            assert filtered.choices[0].message.content is None
            assert refused.choices[0].message.refusal == "No."
            assert none.choices == []
            assert server.paid == 4

    def test_a_script_names_faults_and_how_often_they_come(self) -> None:
        faults = every_so_often("429/10, cut/4")
        kinds = ["429" if f.status == 429 else "cut" for n in range(20) if (f := faults(n))]
        assert kinds == ["cut", "cut", "429", "cut", "cut", "429"]
        for wrong in ("teapot/3", "429", "429/0", "429/x"):
            with pytest.raises(ValueError, match=r"fault|how many"):
                every_so_often(wrong)

    def test_leaving_ends_the_connections_that_clients_keep_open(self) -> None:
        server = StubServer(RATE)
        with connection_to(server) as connection:
            with server:
                connection.request("GET", "/v1/models")
                assert connection.getresponse().read()
                assert connection.sock is not None
            assert connection.sock.recv(1) == b""


class TestCommand:
    def test_the_list_names_every_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--list"]) == 0
        shown = capsys.readouterr().out
        assert "squared_relu" in shown
        assert "hand-written answers" in shown.splitlines()[0]
        assert len(shown.splitlines()) > 45

    @pytest.mark.parametrize(
        "arguments", [["--only", "nonsense"], ["--faults", "429"], ["--port", "99999"]]
    )
    def test_a_wrong_option_takes_one_line_and_code_2(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--port", "0", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_it_says_how_to_be_used_serves_and_ends_at_a_signal(self) -> None:
        command = [sys.executable, "-m", "darwin_exp.stub_llm", "--port", "0"]
        with subprocess.Popen(
            [*command, "--only", "higher_rate"],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                url = line.split()[0]
                assert line.rstrip().endswith(
                    "python -m darwin_exp +experiment=llm mutator.model=stub-careful "
                    f"mutator.base_url={url}"
                )
                with openai.OpenAI(api_key="unused", base_url=url, timeout=30) as client:
                    assert ask(client).choices
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=30) == 0
            finally:
                process.kill()
