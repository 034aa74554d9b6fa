"""What is found out about endpoints before a run begins: one clear line, and nothing is asked."""

from __future__ import annotations

from typing import Any

import pytest

from darwin_exp.individual import ModelSpec
from darwin_exp.llm import endpoints
from darwin_exp.protocols import ModelsUnavailable
from darwin_exp.stub_llm.server import StubServer
from tests.llm.asking import NAME, Say, Server, refusal
from tests.llm.test_wire import PAGE, free_url

FAR = "http://models.invalid/v1"


def listing(*names: str) -> Say:
    return Say(body={"object": "list", "data": [{"id": name} for name in names]})


def check(url: str, name: str = NAME, key_env: str = "DARWIN_TEST_KEY") -> list[str]:
    return endpoints.check([ModelSpec(name, url, key_env=key_env)], 10.0)


def test_a_model_that_is_listed_needs_no_word() -> None:
    with Server() as server:
        server.models = listing(NAME, "another")
        assert check(server.url) == []
        assert server.asked == []


@pytest.mark.parametrize("models", [listing(), Say(404, ""), Say(405, ""), Say(body={"n": 1})])
def test_an_endpoint_without_a_list_proves_nothing(models: Say) -> None:
    with Server() as server:
        server.models = models
        assert check(server.url) == []


def test_an_address_without_its_end_is_told_the_whole_one() -> None:
    with StubServer() as server:
        half = server.base_url.removesuffix("/v1")
        for typed in (half, f"{half}/"):
            with pytest.raises(ModelsUnavailable, match=f"at {server.base_url}; write that"):
                check(typed, "stub-careful")
        assert check(server.base_url, "stub-careful") == []
        assert check(f"{half}/nothing/here", "stub-careful") == []  # which proves nothing


def test_an_unknown_model_of_this_machine_is_named_with_close_ones() -> None:
    with Server() as server:
        server.models = listing("qwen2.5-coder-7b", "llama-3.1-8b")
        with pytest.raises(ModelsUnavailable, match=r"qwen2.5-coder \w+.*\(qwen2.5-coder-7b\)"):
            check(server.url, "qwen2.5-coder")


def test_a_model_whose_tag_is_left_out_is_known() -> None:
    with Server() as server:
        server.models = listing("llama3:latest")
        assert check(server.url, "llama3") == []


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (Say(200, PAGE), "an HTML page .*base_url"),
        (Say(401, refusal("no")), "HTTP 401.*export DARWIN_TEST_KEY"),
        (Say(403, refusal("no")), "HTTP 403"),
        (Say(400, refusal("no")), "HTTP 400"),
        (Say(hangs_up=True), "start the server"),
    ],
)
def test_an_endpoint_that_will_not_do_is_one_line(models: Say, told: str) -> None:
    with Server() as server:
        server.models = models
        with pytest.raises(ModelsUnavailable, match=told) as error:
            check(server.url)
        assert "\n" not in str(error.value)


def test_a_key_that_may_not_list_models_may_still_ask_them() -> None:
    with Server() as server:
        server.models = Say(403, refusal("Missing scopes: api.model.read"))
        assert check(server.url) == []


def test_an_endpoint_that_has_trouble_is_a_note() -> None:
    with Server() as server:
        server.models = Say(503, refusal("loading the model"))
        [note] = endpoints.check(
            [ModelSpec(NAME, server.url), ModelSpec("another", server.url)], 10.0
        )
        assert "loading the model" in note


def test_an_endpoint_that_is_down_is_an_error_before_the_run_begins() -> None:
    with pytest.raises(ModelsUnavailable, match=r"refused.*start the server"):
        check(free_url())


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DARWIN_TEST_KEY", raising=False)
    with pytest.raises(ModelsUnavailable, match=r"tiny at .*export DARWIN_TEST_KEY=YOUR_KEY"):
        check(FAR)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "/v1", "ftp://host/v1", "http://[::1"])
def test_what_is_no_address_is_said_so(url: str) -> None:
    with pytest.raises(ModelsUnavailable, match="is no address"):
        check(url)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ModelsUnavailable, match="must hold no user name") as error:
        check("http://me:secret@127.0.0.1/v1")
    assert "secret" not in str(error.value)


def test_each_endpoint_is_looked_at_once() -> None:
    seen: list[Any] = []
    with Server() as server:
        server.models = listing("a", "b")
        real = server.answer

        def counting(handler: Any, say: Say) -> None:
            seen.append(handler.path)
            real(handler, say)

        server.answer = counting  # type: ignore[method-assign]
        assert endpoints.check([ModelSpec("a", server.url), ModelSpec("b", server.url)], 5.0) == []
    assert seen == ["/v1/models"]
