"""The rules of requests: what counts as an approval, and that nothing else does (G1 to G9)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.hitl.inbox import FILE_NAME, KINDS, Author, Door, Entry, Inbox
from darwin_exp.hitl.requests import (
    ALL,
    GRANTED,
    NEVER_AUTOMATIC,
    Board,
    Decision,
    NoSuchRequest,
    Refused,
    Request,
    RequestType,
    Standing,
    State,
    answer,
    answer_payload,
    ask,
    check_budget,
    content_of,
    edit_content,
    expire,
    fold,
    hash_of,
)

RUN_ID = "261122-1200-a1b2"
ADA, BOB = Author("ada", "terminal"), Author("bob", "web")
POEMS = Request(
    RUN_ID, RequestType.DATASET, "more text", "lower perplexity", "poems\n", "g01-i02", 1
)
PATCH = Request(
    RUN_ID,
    RequestType.EDIT,
    "an edit waits",
    "",
    edit_content("g02-i01", "g01-i02", "ab" * 32, "-a\n+b\n"),
    "g01-i02",
    2,
    "g02-i01",
)
OTHERS_HASH = hash_of("something else")
NEVER = sorted(NEVER_AUTOMATIC, key=lambda kind: kind.value)
HARMLESS = sorted(set(RequestType) - NEVER_AUTOMATIC, key=lambda kind: kind.value)


def asked_by(request: Request, sequence: int = 1, agent: str = "g01-i02") -> Entry:
    payload = {**request.payload, "asked_by": agent}
    return entry("asked", payload, sequence, Author(agent, "run"))


def entry(kind: str, payload: Mapping[str, Any], sequence: int, author: Author = ADA) -> Entry:
    return Entry(sequence, kind, author, float(sequence), payload, "0" * 64)


def answered(
    request: Request, decision: str = "approve", author: Author = ADA, **more: Any
) -> Entry:
    payload = {
        "request_id": request.request_id,
        "decision": decision,
        "content_hash": request.content_hash,
        "content": None,
        "note": "",
        "nonce": request.nonce,
        **more,
    }
    return entry("answered", payload, 2, author)


def standing_of(*entries: Entry, request: Request = POEMS) -> Standing:
    return fold(entries, RUN_ID).requests[request.request_id]


def why_refused(board: Board) -> list[str]:
    return [refusal.why for refusal in board.refused]


# --- asking ----------------------------------------------------------------------------------


def test_a_request_is_known_by_run_type_and_content() -> None:
    same = replace(POEMS, reason="other words", asked_by="g03-i00", generation=3)
    assert same.request_id == POEMS.request_id
    changes: list[dict[str, Any]] = [{"run_id": "x"}, {"type": RequestType.SCRIPT}]
    for change in [*changes, {"content": "poems"}]:
        assert replace(POEMS, **change).request_id != POEMS.request_id
    assert len(POEMS.request_id) == 12


def test_the_hash_of_a_content_is_that_of_a_file_that_holds_it() -> None:
    known = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
    assert hash_of("foo") == known  # what `printf foo | sha256sum` prints


def test_what_is_asked_waits() -> None:
    standing = standing_of(asked_by(POEMS))
    assert (standing.state, standing.granted_content) == (State.PENDING, None)
    assert standing.request == POEMS


def test_two_agents_that_ask_for_the_same_make_one_request_tied_to_both() -> None:
    board = fold([asked_by(POEMS), asked_by(POEMS, 2, "g02-i00")], RUN_ID)
    (standing,) = board.requests.values()
    assert standing.askers == ("g01-i02", "g02-i00")
    assert board.waiting == [standing]


def test_g7_a_request_survives_a_restart_and_is_asked_once(tmp_path: Path) -> None:
    for _ in range(3):  # as a resumed run does, which reaches the same point again
        ask(Inbox(tmp_path / FILE_NAME), POEMS)
    entries = Inbox(tmp_path / FILE_NAME).entries()
    assert [one.kind for one in entries] == ["asked"]
    assert fold(entries, RUN_ID).requests[POEMS.request_id].waits


def test_a_request_whose_id_or_hash_is_not_that_of_its_content_does_not_count() -> None:
    for change in ({"content": "prose"}, {"request_id": "0" * 12}, {"content_hash": OTHERS_HASH}):
        board = fold([entry("asked", {**POEMS.payload, **change}, 1, Author("a", "run"))])
        assert board.requests == {}
        assert why_refused(board) == ["its id or its hash is not that of its content"]


@pytest.mark.parametrize("name", sorted(POEMS.payload.keys() - {"patch_of"}))
def test_a_request_without_all_its_parts_does_not_count(name: str) -> None:
    told = {key: value for key, value in POEMS.payload.items() if key != name}
    for payload in (told, {**told, name: None}, {**told, name: ["x"]}):
        board = fold([entry("asked", payload, 1, Author("a", "run"))])
        assert (board.requests, len(board.refused)) == ({}, 1)


@pytest.mark.parametrize("door", ["terminal", "web"])
def test_only_the_run_asks(door: Door) -> None:
    board = fold([entry("asked", POEMS.payload, 1, Author("eve", door))], RUN_ID)
    assert (board.requests, why_refused(board)) == ({}, ["only the run itself asks"])


def test_a_structured_content_is_the_same_text_whatever_its_order() -> None:
    assert content_of({"b": 1, "a": "é"}) == content_of({"a": "é", "b": 1})
    assert json.loads(content_of({"a": "é"})) == {"a": "é"}


# --- G1: silence is no ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "decision",
    ["", " ", "yes", "y", "Approve", "approve ", "approved", "ok", None, True, 1, [], {}],
)
def test_g1_anything_but_the_word_is_no_approval(decision: Any) -> None:
    board = fold([asked_by(POEMS), answered(POEMS, decision)], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING
    assert why_refused(board) == ["it is no answer: approve, deny, change or ask"]


@pytest.mark.parametrize("payload", [{}, {"request_id": POEMS.request_id}, {"decision": "approve"}])
def test_g1_an_empty_answer_is_no_approval(payload: dict[str, Any]) -> None:
    board = fold([asked_by(POEMS), entry("answered", payload, 2)], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING
    assert len(board.refused) == 1


def test_g1_a_deadline_that_passes_in_silence_means_no(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    ask(inbox, POEMS)
    assert expire(inbox, POEMS.request_id) == expire(inbox, POEMS.request_id)
    standing = standing_of(*inbox.entries())
    assert (standing.state, standing.granted_content) == (State.EXPIRED, None)


def test_g1_whoever_is_first_is_heard_answer_or_deadline() -> None:
    late = entry("expired", {"request_id": PATCH.request_id}, 3, Author("harness", "run"))
    assert standing_of(asked_by(PATCH), answered(PATCH), late, request=PATCH).state in GRANTED
    board = fold([asked_by(PATCH), late, answered(PATCH)], RUN_ID)
    assert board.requests[PATCH.request_id].state is State.EXPIRED
    assert why_refused(board) == ["the rewrite is expired, and its slot has gone on without it"]


def test_g1_nobody_but_the_run_knows_its_deadlines() -> None:
    board = fold([asked_by(POEMS), entry("expired", {"request_id": POEMS.request_id}, 2)], RUN_ID)
    assert board.requests[POEMS.request_id].waits


# --- G2: bound to what was shown ------------------------------------------------------------


@pytest.mark.parametrize("author", [ADA, BOB])
def test_g2_an_approval_grants_exactly_what_was_shown(author: Author) -> None:
    standing = standing_of(asked_by(POEMS), answered(POEMS, author=author))
    assert (standing.state, standing.granted_content) == (State.APPROVED, "poems\n")


@pytest.mark.parametrize(
    "content_hash",
    [
        None,
        "",
        OTHERS_HASH,
        POEMS.content_hash[:8],
        POEMS.content_hash[:63],
        True,
        PATCH.content_hash,
    ],
)
def test_g2_an_approval_with_another_hash_grants_nothing(content_hash: Any) -> None:
    board = fold([asked_by(POEMS), answered(POEMS, content_hash=content_hash)], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING
    assert "hash" in why_refused(board)[0]


def test_g2_an_approval_of_a_patch_does_not_cover_the_patch_as_edited() -> None:
    edited = replace(PATCH, content=PATCH.content.replace("+b", "+c"))
    board = fold([asked_by(PATCH), asked_by(edited), answered(PATCH)], RUN_ID)
    assert board.requests[PATCH.request_id].state is State.APPROVED
    assert board.requests[edited.request_id].state is State.PENDING


def test_g2_the_same_patch_of_another_parent_is_another_request() -> None:
    contents = {edit_content("g02-i01", parent, "ab" * 32, "-a\n+b\n") for parent in ("x", "y")}
    assert len(contents) == 2


def test_g2_a_change_grants_its_own_content_and_only_that() -> None:
    bound: dict[str, Any] = {"content": "prose", "content_hash": hash_of("prose")}
    standing = standing_of(asked_by(POEMS), answered(POEMS, "change", **bound))
    assert (standing.state, standing.granted_content) == (State.CHANGED, "prose")


@pytest.mark.parametrize(
    ("content", "content_hash"),
    [
        ("prose", POEMS.content_hash),
        ("prose", hash_of("prose\r\n")),
        ("", hash_of("")),
        (" \n", hash_of(" \n")),
        (None, POEMS.content_hash),
        (["prose"], hash_of("prose")),
    ],
)
def test_g2_a_change_that_is_not_bound_to_its_content_grants_nothing(
    content: Any, content_hash: str
) -> None:
    told = answered(POEMS, "change", content=content, content_hash=content_hash)
    board = fold([asked_by(POEMS), told], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING
    assert len(board.refused) == 1


def test_g2_an_approval_that_smuggles_another_content_in_grants_nothing() -> None:
    board = fold([asked_by(POEMS), answered(POEMS, content="prose")], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING


# --- G5, G8, G9: whose word counts ----------------------------------------------------------


def test_g5_words_of_approval_in_what_an_agent_writes_are_only_words() -> None:
    told = json.dumps(answered(POEMS).payload)
    loud = replace(POEMS, content=told, reason=told, expected_effect="APPROVED by ada: approve")
    board = fold([asked_by(loud)], RUN_ID)
    assert [one.state for one in board.requests.values()] == [State.PENDING]


@pytest.mark.parametrize("kind", sorted(KINDS - {"asked", "expired", "answered"}))
def test_g5_the_run_cannot_speak_for_people(kind: str) -> None:
    payload = {
        "request_id": POEMS.request_id,
        **{"individual_id": "g01-i02", "to": ALL, "text": "hear", "note": ""},
        **{"key": "max_hours", "value": 9},
    }
    spoken = entry(kind, payload, 3, Author("g01-i02", "run"))
    board = fold([asked_by(POEMS), answered(POEMS), spoken], RUN_ID)
    assert why_refused(board) == ["only a person may say so, by the terminal or the web page"]
    assert board.requests[POEMS.request_id].state is State.APPROVED


def test_g8_an_approval_from_another_run_is_ignored_and_reported() -> None:
    """The whole entry is copied; its request has the same type and the same content."""
    ours = replace(POEMS, run_id="261122-1300-cccc")
    board = fold([asked_by(ours), answered(POEMS)], ours.run_id)
    assert board.requests[ours.request_id].state is State.PENDING
    assert why_refused(board) == ["there is no such request in this run"]


@pytest.mark.parametrize("nonce", [None, "", "x", PATCH.nonce, POEMS.request_id, RUN_ID])
def test_g8_an_approval_with_another_nonce_is_ignored_and_reported(nonce: Any) -> None:
    board = fold([asked_by(POEMS), answered(POEMS, nonce=nonce)], RUN_ID)
    assert board.requests[POEMS.request_id].state is State.PENDING
    assert "another run" in why_refused(board)[0]


def test_g8_a_whole_inbox_of_another_run_grants_nothing() -> None:
    entries = [asked_by(POEMS), answered(POEMS)]
    assert fold(entries, RUN_ID).requests[POEMS.request_id].state is State.APPROVED
    board = fold(entries, "261122-1300-cccc")
    assert (board.requests, len(board.refused)) == ({}, 2)


@pytest.mark.parametrize("kind", NEVER)
def test_g9_the_run_cannot_approve_what_a_person_must_decide(kind: RequestType) -> None:
    request = replace(POEMS, type=kind)
    board = fold([asked_by(request), answered(request, author=Author("policy", "run"))], RUN_ID)
    assert board.requests[request.request_id].state is State.PENDING
    assert "only a person" in why_refused(board)[0]


@pytest.mark.parametrize("kind", HARMLESS)
def test_g9_what_harms_nobody_may_be_approved_by_rule_and_is_recorded(kind: RequestType) -> None:
    request = replace(POEMS, type=kind)
    by_rule = answered(request, author=Author("policy", "run"))
    standing = standing_of(asked_by(request), by_rule, request=request)
    assert standing.state is State.APPROVED
    assert standing.history[-1].author.door == "run"


@pytest.mark.parametrize("kind", list(RequestType))
def test_g9_the_run_may_always_say_no_and_never_changes(kind: RequestType) -> None:
    request = replace(POEMS, type=kind)
    rule = Author("policy", "run")
    denied = answered(request, "deny", rule)
    assert standing_of(asked_by(request), denied, request=request).state is State.DENIED
    bound = {"content": "prose", "content_hash": hash_of("prose")}
    changed = answered(request, "change", rule, **bound)
    assert standing_of(asked_by(request), changed, request=request).waits


# --- what follows on what -------------------------------------------------------------------


def test_a_question_back_leaves_the_request_waiting() -> None:
    back = answered(POEMS, "ask", note="under which licence?")
    standing = standing_of(asked_by(POEMS), back)
    assert (standing.state, standing.waits) == (State.ASKED_BACK, True)
    assert standing.note == "under which licence?"
    assert standing_of(asked_by(POEMS), back, answered(POEMS)).state is State.APPROVED
    assert standing_of(asked_by(POEMS), answered(POEMS, "ask")).state is State.PENDING


def test_a_denial_may_be_thought_better_of_but_not_that_of_a_patch() -> None:
    assert standing_of(asked_by(POEMS), answered(POEMS, "deny"), answered(POEMS)).state in GRANTED
    board = fold([asked_by(PATCH), answered(PATCH, "deny"), answered(PATCH)], RUN_ID)
    assert board.requests[PATCH.request_id].state is State.DENIED


def test_what_was_granted_ends_by_revoking_and_in_no_other_way() -> None:
    revoked = entry("revoked", {"request_id": POEMS.request_id, "note": "wrong licence"}, 4)
    granted = [asked_by(POEMS), answered(POEMS)]
    assert standing_of(*granted, answered(POEMS, "deny")).state is State.APPROVED
    standing = standing_of(*granted, revoked)
    assert (standing.state, standing.granted_content) == (State.REVOKED, None)
    assert standing.note == "wrong licence"
    # A form that is sent a second time must not bring it back.
    assert standing_of(*granted, revoked, answered(POEMS)).state is State.REVOKED


def test_nothing_can_be_revoked_that_was_not_granted() -> None:
    board = fold([asked_by(POEMS), entry("revoked", {"request_id": POEMS.request_id}, 2)], RUN_ID)
    assert why_refused(board) == ["the request is pending: there is nothing to revoke"]


def test_guidance_is_for_all_or_for_one_agent() -> None:
    board = fold(
        [
            entry("guided", {"to": ALL, "text": "try rotary embeddings"}, 1),
            entry("guided", {"to": "g01-i02", "text": "keep it small"}, 2, BOB),
            entry("guided", {"to": ALL, "text": "  "}, 3),
        ]
    )
    assert board.told_to(["g01-i02"]) == ("try rotary embeddings", "keep it small")
    assert board.told_to(["g09-i09"]) == ("try rotary embeddings",)
    assert board.guidance[1].entry.author == BOB
    assert len(board.refused) == 1


def test_an_agent_is_told_what_became_of_its_request() -> None:
    denied = answered(POEMS, "deny", note="no licence")
    board = fold([asked_by(POEMS), denied], RUN_ID)
    words = f"on request {POEMS.request_id} (dataset): no licence"
    assert board.told_to(["g01-i02"]) == (words,)
    assert board.came_of(["g01-i02"]) == (f"request {POEMS.request_id} (dataset): denied",)
    assert board.told_to(["g07-i07"]) == board.came_of(["g07-i07"]) == ()
    pending = fold([asked_by(POEMS)], RUN_ID)
    assert pending.told_to(["g01-i02"]) == ()
    assert pending.came_of(["g01-i02"]) == (f"request {POEMS.request_id} (dataset): pending",)


def test_a_veto_takes_a_pin_back_and_the_other_way_round() -> None:
    pin, veto = (entry(kind, {"individual_id": "a"}, 1) for kind in ("pinned", "vetoed"))
    assert (list(fold([veto, pin]).pins), fold([veto, pin]).vetoes) == (["a"], {})
    assert (fold([pin, veto]).pins, list(fold([pin, veto]).vetoes)) == ({}, ["a"])


def test_a_pause_lasts_until_somebody_resumes() -> None:
    pause, resume = (entry(kind, {}, 1) for kind in ("paused", "resumed"))
    assert [fold(said).is_paused for said in ([], [pause], [pause, resume])] == [False, True, False]
    assert len(fold([entry("stop_after_generation", {"note": ""}, 1)]).stops) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", 3), ("max_hours", 0), ("max_hours", -1), ("max_hours", float("inf"))),
        *(("max_hours", True), ("max_hours", "8"), ("max_hours", None), ("llm.max_calls", 1.5)),
    ],
)
def test_a_budget_is_a_known_cap_and_a_number(key: str, value: object) -> None:
    with pytest.raises(Refused):
        check_budget(key, value)
    assert fold([entry("budget", {"key": key, "value": value}, 1)]).budgets == {}


def test_the_last_budget_holds() -> None:
    said = [entry("budget", {"key": "max_hours", "value": value}, 1) for value in (8, 2.5)]
    assert fold(said).budgets == {"max_hours": 2.5}


def test_a_request_is_found_by_the_first_digits_of_its_id() -> None:
    board = fold([asked_by(POEMS), asked_by(PATCH)], RUN_ID)
    assert board.find(POEMS.request_id[:11]).request == POEMS
    with pytest.raises(NoSuchRequest, match="no such request"):
        board.find("zz")
    with pytest.raises(NoSuchRequest, match="no such request"):
        board.find("")
    twins = {f"aa{k}": standing for k, standing in enumerate(board.requests.values())}
    with pytest.raises(NoSuchRequest, match="several"):
        replace(board, requests=twins).find("aa")


def test_an_answer_that_would_not_count_is_not_written(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / FILE_NAME)
    ask(inbox, POEMS)
    standing = fold(inbox.entries(), RUN_ID).requests[POEMS.request_id]
    with pytest.raises(Refused, match="hash"):
        answer(inbox, standing, Decision.APPROVE, ADA, OTHERS_HASH)
    with pytest.raises(Refused, match="words"):
        answer(inbox, standing, Decision.ASK, ADA)
    with pytest.raises(Refused, match="note"):
        answer(inbox, standing, Decision.DENY, ADA, note="x" * 5_000)
    assert inbox.verify() == 1
    answer(inbox, standing, Decision.APPROVE, ADA, POEMS.content_hash, note="fine")
    after = fold(inbox.entries(), RUN_ID).requests[POEMS.request_id]
    assert (after.state, after.note) == (State.APPROVED, "fine")


def test_a_kind_that_nobody_knows_is_reported_and_changes_nothing() -> None:
    assert why_refused(fold([entry("granted", {}, 1)])) == ["nobody knows what 'granted' means"]


# --- laws -----------------------------------------------------------------------------------

REQUESTS = (POEMS, PATCH, replace(POEMS, run_id="another"), replace(POEMS, type=RequestType.STUCK))
AUTHORS = st.sampled_from([ADA, BOB, Author("g01-i02", "run")])
HASHES = [hash_of("prose"), OTHERS_HASH, "", *(request.content_hash for request in REQUESTS)]
PAYLOADS = st.fixed_dictionaries(
    {
        "request_id": st.sampled_from([request.request_id for request in REQUESTS]),
        "decision": st.sampled_from(["approve", "deny", "change", "ask", "yes", "", None]),
        "content_hash": st.sampled_from(HASHES),
        "content": st.sampled_from([None, "prose", "", POEMS.content]),
        "note": st.sampled_from(["", "why?"]),
        "nonce": st.sampled_from([*(request.nonce for request in REQUESTS), ""]),
    }
)
LIKELY = st.builds(
    lambda request, decision, author: answered(request, decision, author),
    st.sampled_from(REQUESTS),
    st.sampled_from(["approve", "deny", "ask"]),
    AUTHORS,
)
ENTRIES = st.lists(
    st.one_of(
        st.builds(asked_by, st.sampled_from(REQUESTS)),
        st.builds(
            lambda kind, payload, author: entry(kind, payload, 1, author),
            st.sampled_from(["answered", "answered", "revoked", "expired"]),
            PAYLOADS,
            AUTHORS,
        ),
        LIKELY,
    ),
    max_size=25,
)


@given(entries=ENTRIES)
def test_g2_law_whatever_is_granted_was_approved_by_an_answer_bound_to_it(
    entries: list[Entry],
) -> None:
    for standing in fold(entries, RUN_ID).requests.values():
        request = standing.request
        assert (standing.granted_content is not None) == (standing.state in GRANTED)
        if standing.state not in GRANTED:
            continue
        yes = [
            one
            for one in standing.history
            if one.kind == "answered" and one.payload["decision"] in ("approve", "change")
        ][-1]
        assert standing.granted_content is not None
        assert yes.payload["content_hash"] == hash_of(standing.granted_content)
        assert yes.payload["nonce"] == f"{RUN_ID}:{request.request_id}"
        if yes.author.door == "run":
            assert request.type not in NEVER_AUTOMATIC
            assert standing.granted_content == request.content


@given(entries=ENTRIES)
def test_g1_law_without_a_bound_approval_nothing_is_ever_granted(entries: list[Entry]) -> None:
    unbound = [
        one
        for one in entries
        if one.payload.get("decision") not in ("approve", "change")
        or one.payload["content_hash"] not in {hash_of("prose"), *map(_hash_of, REQUESTS)}
    ]
    board = fold(unbound, RUN_ID)
    assert not any(one.state in GRANTED for one in board.requests.values())


@given(entries=ENTRIES)
def test_g6_law_every_entry_counts_or_is_reported(entries: list[Entry]) -> None:
    board = fold(entries, RUN_ID)
    told = [one for standing in board.requests.values() for one in standing.history]
    assert len(told) + len(board.refused) == len(entries)


@given(entries=ENTRIES, cut=st.integers(0, 25))
def test_law_what_comes_later_takes_nothing_back_but_by_revoking(
    entries: list[Entry], cut: int
) -> None:
    before, after = fold(entries[:cut], RUN_ID), fold(entries, RUN_ID)
    assert fold(entries, RUN_ID) == after
    for name, standing in before.requests.items():
        later = after.requests[name]
        assert later.history[: len(standing.history)] == standing.history
        if standing.state in GRANTED:
            assert later.state in {standing.state, State.REVOKED}
        if standing.state is State.REVOKED:
            assert later.state is State.REVOKED


def _hash_of(request: Request) -> str:
    return request.content_hash


def test_control_an_answer_as_the_doors_write_it_counts() -> None:
    """The laws above would hold of a fold that grants nothing."""
    payload = answer_payload(standing_of(asked_by(POEMS)), Decision.APPROVE, POEMS.content_hash)
    assert standing_of(asked_by(POEMS), entry("answered", payload, 2)).state is State.APPROVED
