"""What may pass by rule, what never does, and how exact a data set must be told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from darwin_exp.hitl.asked import NEVER_AUTOMATIC, Decision, Refused, Request, RequestType
from darwin_exp.hitl.policy import DatasetWish, Policy, PolicyError, Way

HARMLESS = sorted(set(RequestType) - NEVER_AUTOMATIC, key=lambda kind: kind.value)
WISH = {"source": "textdir", "path": "/data/poems", "licence": "CC0", "most_mb": 10}


def request(kind: RequestType) -> Request:
    return Request("run-1", kind, "why", "", "content", "g01-i02", 1)


def test_people_are_asked_unless_the_configuration_says_otherwise() -> None:
    assert all(Policy().decides(request(kind)) is None for kind in RequestType)


@pytest.mark.parametrize("kind", sorted(NEVER_AUTOMATIC, key=lambda kind: kind.value))
def test_g9_no_rule_covers_what_a_person_must_decide(kind: RequestType) -> None:
    with pytest.raises(PolicyError, match=rf"hitl\.policy\.{kind.value}=auto.*ask or deny"):
        Policy.of({kind.value: "auto"})
    with pytest.raises(PolicyError):
        Policy({kind: Way.AUTO})
    assert Policy.of({kind.value: "deny"}).decides(request(kind)) is Decision.DENY


def test_g9_the_kinds_of_the_threat_model_are_among_them() -> None:
    named = {"file_structure", "dataset", "script", "library", "resources", "budget"}
    assert {kind.value for kind in NEVER_AUTOMATIC} == named


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_harms_nobody_may_pass_by_rule(kind: RequestType) -> None:
    policy = Policy.of({kind.value: "auto"})
    assert policy.decides(request(kind)) is Decision.APPROVE
    assert policy.decides(request(RequestType.DATASET)) is None


@pytest.mark.parametrize(("kind", "way"), [("datasets", "ask"), ("dataset", "yes"), ("", "")])
def test_a_kind_or_way_that_does_not_exist_is_named(kind: str, way: str) -> None:
    with pytest.raises(PolicyError, match=f"hitl.policy.{kind}={way}: the kinds are dataset"):
        Policy.of({kind: way})


def test_g1_waiting_needs_an_end() -> None:
    with pytest.raises(PolicyError, match="deadline_seconds"):
        Policy(block=True)
    assert Policy(block=True, deadline_seconds=60).block


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_is_a_time(seconds: float) -> None:
    with pytest.raises(PolicyError, match="above zero"):
        Policy(deadline_seconds=seconds)


def test_g4_an_exact_wish_is_read() -> None:
    wish = DatasetWish.read(json.dumps(WISH), {"textdir"})
    assert wish == DatasetWish("textdir", "/data/poems", "CC0", 10)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"source": "huggingface"}, "not allowed"),
        ({"source": ""}, "some text"),
        ({"licence": " "}, "some text"),
        ({"licence": None}, "some text"),
        ({"most_mb": 0}, "most_mb"),
        ({"most_mb": 1e9}, "most_mb"),
        ({"most_mb": True}, "most_mb"),
        ({"most_mb": 100_000}, "most_mb"),
        ({"val": "/data/easy"}, "nothing more"),
        ({"split": "test"}, "nothing more"),
        ({"replaces": "val"}, "nothing more"),
    ],
)
def test_g4_what_is_not_allowed_or_not_exact_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        DatasetWish.read(json.dumps({**WISH, **change}), {"textdir"})


@pytest.mark.parametrize("content", ["more poems, please", "[]", "null", "", "{}", "[" * 100_000])
def test_g4_words_are_no_wish(content: str) -> None:
    with pytest.raises(Refused, match="exactly"):
        DatasetWish.read(content, {"textdir"})


def test_g4_no_source_is_allowed_by_itself() -> None:
    with pytest.raises(Refused, match="allowed: none"):
        DatasetWish.read(json.dumps(WISH), ())
