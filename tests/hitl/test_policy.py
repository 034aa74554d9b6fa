"""What may pass by rule, and what never does."""

from __future__ import annotations

import pytest

from darwin_exp.hitl.asked import NEVER_AUTOMATIC, Decision, Request, RequestType
from darwin_exp.hitl.policy import Policy, PolicyError, Way

MUST_ASK = [kind for kind in RequestType if kind in NEVER_AUTOMATIC]
HARMLESS = [kind for kind in RequestType if kind not in NEVER_AUTOMATIC]


def request(kind: RequestType) -> Request:
    return Request("run-1", kind, "why", "", "content", "g01-i02", 1)


def test_people_are_asked_unless_the_configuration_says_otherwise() -> None:
    assert all(Policy().decides(request(kind)) is None for kind in RequestType)


@pytest.mark.parametrize("kind", MUST_ASK)
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
