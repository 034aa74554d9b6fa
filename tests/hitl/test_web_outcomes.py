"""The web door before and after an answer: what would be refused, and what came of what was not."""

from __future__ import annotations

import errno
import html
import json
import math
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.chronicle import Chronicle
from darwin_exp.hitl import web
from darwin_exp.hitl.asked import NEVER_AUTOMATIC
from darwin_exp.hitl.concerns import Surroundings, concern
from darwin_exp.hitl.inbox import Author
from darwin_exp.hitl.outcomes import Outcomes
from darwin_exp.hitl.requests import (
    Decision,
    Refused,
    Request,
    RequestType,
    Standing,
    State,
    answer_payload,
    check_revocation,
    content_of,
    edit_content,
    fold,
)
from tests.hitl.peopled import ANN, POEMS, Peopled
from tests.hitl.served import Served, wait_for

PATCH = "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n import torch\n-rate = 1\n+rate = 3\n"
REVIEWED = edit_content("g03-i01", "g02-i00", "ab" * 32, PATCH)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Peopled.make(tmp_path_factory.mktemp("peopled") / "run").folder


@pytest.fixture
def served(base_run: Path) -> Iterator[Served]:
    for left in base_run.glob("inbox.*"):
        left.unlink()
    with Served(base_run) as page:
        yield page.enter()


@pytest.fixture
def run(tmp_path: Path) -> Peopled:
    return Peopled.make(tmp_path / "run", 8, 1)


def page_of(page: Served, request: Request) -> str:
    return html.unescape(page.get(f"/requests/{request.request_id}").text)


def chronicle_of(page: Served) -> Chronicle:
    facts = page.pages.live.view().facts
    assert facts is not None
    return facts.chronicle


def population(page: Served) -> list[str]:
    """Return who lived when the last generation was closed."""
    last = list(chronicle_of(page).of_kind("generation"))[-1]
    return list(last.payload["population"])


def alive(page: Served) -> str:
    return population(page)[-1]


def died_out(page: Served) -> str:
    """Return an agent that is dead, and of whom nobody descends that lives."""
    chronicle = chronicle_of(page)
    living = set(population(page))
    for name in population(page):
        one = chronicle.agent(name)
        while one is not None and one.parent_ids:
            living |= set(one.parent_ids)
            one = chronicle.agent(one.parent_ids[0])
    return next(one.individual_id for one in chronicle.rewrites if one.individual_id not in living)


def state_of(page: Served, request: Request) -> State:
    board = fold(page.inbox.entries(), page.run_folder.name)
    return board.requests[request.request_id].state


def change(page: Served, request: Request, content: str) -> tuple[int, str]:
    """Send the form that grants something else; return the answer's status and words."""
    address = f"/requests/{request.request_id}"
    fields = page.get(address).fields(address, 1)
    sent = page.post(address, {**fields, "decision": "change", "content": content})
    return sent.status, html.unescape(sent.text)


# --- what would be refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("../run.py", "none of . and .."),
        ("a/../../run.py", "none of . and .."),
        ("/etc/cron.d/run.py", "relative to the genome"),
        ("C:\\run.py", "relative to the genome"),
        ("Train.py", "reads like 'train.py'"),
        ("train.py/run.py", "is a file, and no folder"),
        ("tr\u0430in.py", "no plain name"),
        ("run\u202eyp.py", "no plain name"),
        ("run.sh", "no training code"),
    ],
)
@pytest.mark.parametrize("kind", [RequestType.SCRIPT, RequestType.FILE_STRUCTURE])
def test_g3_a_path_that_would_be_refused_is_told_before_anybody_approves(
    served: Served, kind: RequestType, path: str, words: str
) -> None:
    told: dict[str, Any] = {"path": path, "text": "x = 1\n"}
    if kind is RequestType.FILE_STRUCTURE:
        told = {"files": {path: "x = 1\n"}}
    request = served.ask(content_of(told), kind)
    text = page_of(served, request)
    assert 'id="concern"' in text
    assert words in text
    assert "\u202e" not in text


def test_g3_control_a_path_that_is_allowed_raises_no_concern(served: Served) -> None:
    script = content_of({"path": "warm_up.py", "text": "x = 1\n"})
    moved = content_of({"moves": {"model.py": "parts/model.py"}})
    for kind, content in ((RequestType.SCRIPT, script), (RequestType.FILE_STRUCTURE, moved)):
        assert 'id="concern"' not in page_of(served, served.ask(content, kind))


def test_g3_a_script_that_would_take_the_place_of_a_file_is_told(served: Served) -> None:
    script = content_of({"path": "train.py", "text": "x = 1\n"})
    text = page_of(served, served.ask(script, RequestType.SCRIPT, asked_by=alive(served)))
    assert 'id="concern"' in text
    assert "'train.py' is there already" in text


def test_g3_a_restructuring_says_which_files_it_replaces(served: Served) -> None:
    asker = alive(served)
    files = {"train.py": "x = 1\n", "parts/warm.py": "y = 1\n"}
    replacing = served.ask(content_of({"files": files}), RequestType.FILE_STRUCTURE, asked_by=asker)
    text = page_of(served, replacing)
    assert "it replaces all of 'train.py' in the code of whoever asked" in text
    assert 'id="concern"' not in text, "and would be carried out"
    del files["train.py"]
    adding = served.ask(content_of({"files": files}), RequestType.FILE_STRUCTURE, asked_by=asker)
    assert 'id="remark"' not in page_of(served, adding)


@pytest.mark.parametrize("kind", [RequestType.SCRIPT, RequestType.FILE_STRUCTURE])
def test_g3_what_is_for_a_line_that_died_out_is_told(served: Served, kind: RequestType) -> None:
    told: dict[str, Any] = {"path": "warm.py", "text": "x = 1\n"}
    if kind is RequestType.FILE_STRUCTURE:
        told = {"files": {"warm.py": "x = 1\n"}}
    request = served.ask(content_of(told), kind, asked_by=died_out(served))
    assert "neither who asked for it nor any descendant lives" in page_of(served, request)
    served.ask(content_of(told), kind, asked_by=alive(served))
    assert 'id="concern"' not in page_of(served, request), "one that asked too lives"


def test_g3_whoever_died_asks_for_its_descendants(served: Served) -> None:
    chronicle = chronicle_of(served)
    living = [chronicle.agent(name) for name in population(served)]
    parents = {name for one in living if one for name in one.parent_ids} - {*population(served)}
    asker = sorted(parents)[0]
    known = Surroundings.of(chronicle, [asker])
    assert not known.is_line_dead
    assert known.genome is not None
    heirs = [one for one in living if one and asker in one.parent_ids]
    fittest = max(heirs, key=lambda one: one.fitness or -math.inf)
    assert known.genome == chronicle.genome_of(fittest.individual_id)
    assert Surroundings.of(chronicle, [fittest.individual_id]).genome == known.genome
    assert Surroundings.of(chronicle, [died_out(served)]).is_line_dead
    assert Surroundings.of(None, [asker]) == Surroundings()


def test_g3_a_link_is_no_part_of_a_request_and_a_file_that_is_not_there_is_told(
    served: Served,
) -> None:
    linked = content_of({"links": {"model.py": "/etc/passwd"}})
    assert "told exactly as" in page_of(served, served.ask(linked, RequestType.FILE_STRUCTURE))
    moved = content_of({"moves": {"../journal.sqlite": "journal.py"}})
    assert "has no file" in page_of(served, served.ask(moved, RequestType.FILE_STRUCTURE))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("wikitext-103, licence CC BY-SA 3.0, 500 MB", "told exactly as"),
        (POEMS.replace("licence", "license"), "nothing more or less"),
        (content_of({**json.loads(POEMS), "split": "val"}), "nothing more or less"),
        (content_of({**json.loads(POEMS), "licence": " "}), '"licence" is some text'),
        (content_of({**json.loads(POEMS), "most_mb": 10**6}), "most_mb"),
        (content_of({**json.loads(POEMS), "source": ["textdir"]}), '"source" is some text'),
        ("[" * 10_000, "told exactly as"),
    ],
)
def test_g4_a_data_set_that_is_not_exact_is_shown_as_such(
    served: Served, content: str, words: str
) -> None:
    text = page_of(served, served.ask(content))
    assert 'id="concern"' in text
    assert words in text


def test_a_request_is_named_by_what_it_asks_for_and_not_by_its_brackets(served: Served) -> None:
    wishes = {
        "textdir /data/poems": (RequestType.DATASET, POEMS),
        "einops==0.8.1": (RequestType.LIBRARY, content_of({"requirement": "einops==0.8.1"})),
        "max_steps 90": (RequestType.RESOURCES, content_of({"key": "max_steps", "value": 90})),
        "warm.py": (RequestType.SCRIPT, content_of({"path": "warm.py", "text": "x"})),
        "model.py": (RequestType.FILE_STRUCTURE, content_of({"removes": ["model.py"]})),
        "more text": (RequestType.DATASET, "[]"),
    }
    for kind, content in wishes.values():
        served.ask(content, kind)
    text = served.get("/").text
    for headline in wishes:
        assert f": {headline}</a>" in text


def test_g4_control_an_exact_data_set_raises_no_concern(served: Served) -> None:
    assert 'id="concern"' not in page_of(served, served.ask(POEMS))


def test_g4_a_source_that_the_configuration_does_not_allow_is_told() -> None:
    request = Request("run", RequestType.DATASET, "", "", POEMS, "g01-i01", 1)
    assert concern(request, POEMS, Surroundings(sources=("textdir",))) == ""
    assert concern(request, POEMS, Surroundings()) == ""
    assert "not allowed" in concern(request, POEMS, Surroundings(sources=("shakespeare",)))
    assert "allowed: none" in concern(request, POEMS, Surroundings(sources=()))


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        (RequestType.LIBRARY, {"requirement": "einops"}, "exactly one version"),
        (RequestType.LIBRARY, {"requirement": "x @ http://evil.example/x.whl"}, "an address"),
        (RequestType.RESOURCES, {"key": "seed", "value": 4}, "none of budget_seconds"),
        (RequestType.RESOURCES, {"key": "max_steps", "value": 1.5}, "whole number"),
        (RequestType.RESOURCES, {"key": "memory_mb", "value": 10**30}, "at most"),
        (RequestType.BUDGET, {"key": "max_hours", "value": -1}, "above zero"),
    ],
)
def test_what_is_not_exact_is_told_of_every_kind_and_cannot_be_granted_by_a_change(
    served: Served, kind: RequestType, content: dict[str, Any], words: str
) -> None:
    request = served.ask(content_of(content), kind)
    assert words in page_of(served, request)
    status, said = change(served, request, content_of({**content, "more": 1}))
    assert (status, "could not be carried out" in said) == (409, True)
    assert state_of(served, request) is State.PENDING


@pytest.mark.parametrize("path", ["../run.py", "/run.py", "tr\u0430in.py"])
def test_g3_a_change_to_a_path_that_is_not_allowed_grants_nothing(
    served: Served, path: str
) -> None:
    request = served.ask(content_of({"path": "warm.py", "text": "x"}), RequestType.SCRIPT)
    status, said = change(served, request, content_of({"path": path, "text": "x"}))
    assert (status, "could not be carried out" in said) == (409, True)
    assert state_of(served, request) is State.PENDING
    good = content_of({"path": "warmer.py", "text": "x"})
    assert change(served, request, good)[0] == 303, "and the person can mend it"
    assert state_of(served, request) is State.CHANGED


@pytest.mark.parametrize(
    "content",
    [
        REVIEWED.replace("g03-i01", "g03-i02"),
        REVIEWED.replace("ab" * 32, "cd" * 32),
        REVIEWED.replace("genome", "genom"),
        PATCH,
        REVIEWED.replace("@@ -1,2 +1,2 @@", "@@ -1,2 +1,9 @@"),
        REVIEWED + "and a word more\n",
        edit_content("g03-i01", "g02-i00", "ab" * 32, "rate = 4\n"),
    ],
)
def test_g2_a_changed_rewrite_stays_the_one_that_was_asked_about_and_a_patch(
    served: Served, content: str
) -> None:
    request = served.ask(REVIEWED, RequestType.EDIT)
    assert change(served, request, content)[0] == 409
    assert state_of(served, request) is State.PENDING


def test_g2_control_a_rewrite_may_be_granted_with_another_number_in_it(served: Served) -> None:
    request = served.ask(REVIEWED, RequestType.EDIT)
    assert change(served, request, REVIEWED.replace("+rate = 3", "+rate = 2"))[0] == 303
    assert state_of(served, request) is State.CHANGED


@pytest.mark.parametrize("kind", [kind for kind in RequestType if kind in NEVER_AUTOMATIC])
def test_g9_what_a_rule_approves_still_waits_for_a_person(
    served: Served, kind: RequestType
) -> None:
    request = served.ask("something", kind)
    standing = fold(served.inbox.entries()).requests[request.request_id]
    payload = answer_payload(standing, Decision.APPROVE, request.content_hash)
    served.inbox.append("answered", payload, Author("harness", "run"))
    assert state_of(served, request) is State.PENDING
    assert 'value="approve"' in page_of(served, request)
    assert f"/requests/{request.request_id}" in served.get("/").text
    assert "only a person may decide" in served.get("/audit").text


def test_g9_control_a_rule_may_answer_what_harms_nobody(served: Served) -> None:
    request = served.ask("may I go on?", RequestType.QUESTION)
    standing = fold(served.inbox.entries()).requests[request.request_id]
    payload = answer_payload(standing, Decision.APPROVE, request.content_hash)
    served.inbox.append("answered", payload, Author("harness", "run"))
    assert state_of(served, request) is State.APPROVED


def test_g9_every_form_is_about_one_request_and_none_says_yes_to_all(served: Served) -> None:
    requests = [served.ask(f"data set {k}") for k in range(3)]
    assert "<form" not in served.get("/").text
    address = f"/requests/{requests[0].request_id}"
    fields = served.get(address).fields(address)
    for more in ({"all": "1"}, {"yes": "1"}, {"request_id": requests[1].request_id}):
        sent = {**fields, "decision": "approve", **more}
        assert served.post(address, sent).status == 400
    assert {state_of(served, request) for request in requests} == {State.PENDING}


# --- what came of it ------------------------------------------------------------------------------


def reviewed(run: Peopled) -> Request:
    """Approve a rewrite that waited for its review."""
    request = run.ask(RequestType.EDIT, REVIEWED, patch_of="g00-i03")
    run.answer(request, Decision.APPROVE)
    return request


def revoke(run: Peopled, request: Request) -> None:
    run.inbox.append("revoked", {"request_id": request.request_id}, ANN)


def standing_of(run: Peopled, request: Request) -> Standing:
    return fold(run.inbox.entries(), run.folder.name).requests[request.request_id]


def test_an_approval_says_that_it_is_to_come_and_then_what_came_of_it(run: Peopled) -> None:
    with Served(run.folder) as page:
        page.enter()
        request = run.approved(RequestType.DATASET, POEMS)
        assert "takes effect at the next generation" in page_of(page, request)
        assert "takes effect at the next generation" in page.get("/").text
        run.take()
        run.effect(request, "extra training text of 12,000 tokens", tokens=12_000)
        words = "done in generation 3: extra training text of 12,000 tokens"
        wait_for(lambda: words in page_of(page, request))
        assert words in page.get("/live/inbox").text
        run.inbox.append("revoked", {"request_id": request.request_id}, ANN)
        wait_for(lambda: "is withdrawn at the next generation" in page_of(page, request))
        run.withdrawn(request, "g01-i02")
        wait_for(lambda: "withdrawn in generation 4: revoked" in page_of(page, request))
        assert "no longer alive for it: g01-i02" in page_of(page, request)


def test_what_failed_and_what_the_end_of_the_run_holds_up_are_told(run: Peopled) -> None:
    failed = run.approved(RequestType.LIBRARY, content_of({"requirement": "einops==0.8.1"}))
    late = run.approved(RequestType.RESOURCES, content_of({"key": "max_steps", "value": 90}))
    never = run.approved(RequestType.DATASET, POEMS)
    run.inbox.append("revoked", {"request_id": never.request_id}, ANN)
    run.take()
    run.effect(failed, "a library goes into a new image, and this run has none", "failed")
    run.add("end", "0", {"status": "finished", "exit_code": 0}, {"seconds": 1.0})
    with Served(run.folder) as page:
        page.enter()
        assert "failed in generation 3: a library goes into a new image" in page_of(page, failed)
        assert "the run has ended; it takes effect if the run is resumed" in page_of(page, late)
        assert "revoked before it had any effect" in page_of(page, never)


@pytest.mark.parametrize("verdict", ["approved", "changed"])
def test_a_rewrite_that_went_on_was_not_revoked_before_it_had_any_effect(
    run: Peopled, verdict: str
) -> None:
    request = reviewed(run)
    run.review(request, verdict)
    revoke(run, request)
    words = "its individual, g00-i03, and those who descend from it live no longer from the next"
    told = Outcomes.read(run.folder).of_request(standing_of(run, request))
    assert told is not None
    assert words in told.sentence
    assert "claim" not in told.sentence
    with Served(run.folder) as page:
        page.enter()
        assert words in page_of(page, request)
        assert "before it had any effect" not in page_of(page, request)


@pytest.mark.parametrize("verdict", [None, "denied", "expired"])
def test_control_a_rewrite_that_did_not_go_on_was_revoked_in_time(
    run: Peopled, verdict: str | None
) -> None:
    request = reviewed(run)
    if verdict is not None:
        run.review(request, verdict)
    revoke(run, request)
    told = Outcomes.read(run.folder).of_request(standing_of(run, request))
    assert told is not None
    assert told.sentence == "revoked before it had any effect"


def test_g2_a_claim_that_was_made_stands_though_its_review_is_revoked(run: Peopled) -> None:
    request = reviewed(run)
    told = {"individual_id": "g00-i03", "request_id": request.request_id, "verdict": "approved"}
    run.add("review", "champion/after-g01/g00-i03", told)
    revoke(run, request)
    before = Outcomes.read(run.folder).of_request(standing_of(run, request))
    assert before is not None
    assert "a claim that is under way is made" in before.sentence
    run.add("claim", "after-g01", {"selected_id": "g00-i03", "baseline_id": "g00-i00"})
    after = Outcomes.read(run.folder).of_request(standing_of(run, request))
    assert after is not None
    assert after.sentence.endswith("; the claim stands")


def test_a_cap_is_set_anew_and_not_revoked(run: Peopled) -> None:
    request = run.approved(RequestType.BUDGET, content_of({"key": "max_hours", "value": 3}))
    run.take()
    run.add("budget", "2", {"key": "max_hours", "value": 3})
    with Served(run.folder) as page:
        page.enter()
        address = f"/requests/{request.request_id}"
        assert f'action="{address}/revoke"' not in page.get(address).text
        assert "set another" in page_of(page, request)
    with pytest.raises(Refused, match="set anew"):
        check_revocation(standing_of(run, request))
    # An inbox of before that rule was one.
    revoked = replace(standing_of(run, request), state=State.REVOKED, granted_content=None)
    told = Outcomes.read(run.folder).of_request(revoked)
    assert told is not None
    assert told.sentence.startswith("it came too late: max_hours is 3 from now on")


def test_an_answer_in_words_that_is_revoked_is_told_and_no_more(run: Peopled) -> None:
    request = run.approved(RequestType.QUESTION, "may I?")
    revoke(run, request)
    told = Outcomes.read(run.folder).of_request(standing_of(run, request))
    assert told is not None
    assert told.sentence == "revoked; whoever asked is told so with the next prompt"


def test_a_budget_that_was_granted_is_told_with_the_cap_that_it_set(run: Peopled) -> None:
    request = run.approved(RequestType.BUDGET, content_of({"key": "max_hours", "value": 3}))
    with Served(run.folder) as page:
        page.enter()
        assert "takes it in at its next look" in page_of(page, request)
        run.take()
        run.add("budget", "2", {"key": "max_hours", "value": 3})
        wait_for(lambda: "done: max_hours is 3 from now on" in page_of(page, request))


@pytest.mark.parametrize(
    ("verdict", "note", "words"),
    [
        ("approved", "", "went on after 2 min, as it was shown"),
        ("changed", "", "went on after 2 min, as ann changed it"),
        ("denied", "ann did not approve it", "did not go on: ann did not approve it"),
        ("expired", "nobody answered in time", "did not go on: nobody answered in time"),
    ],
)
def test_a_review_tells_whether_the_rewrite_went_on(
    run: Peopled, verdict: str, note: str, words: str
) -> None:
    request = run.ask(RequestType.EDIT, REVIEWED, patch_of="g03-i01")
    run.review(request, verdict, note)
    with Served(run.folder) as page:
        assert words in page_of(page.enter(), request).replace("1 min 35 s", "2 min")


def test_words_of_an_outcome_are_text(run: Peopled) -> None:
    request = run.approved(RequestType.DATASET, POEMS, asked_by="g00-i01")
    run.effect(request, "<script>alert(1)</script>\u202e")
    with Served(run.folder) as page:
        page.enter()
        for path in (f"/requests/{request.request_id}", "/", "/agents/g00-i01"):
            text = page.get(path).text
            assert "done in generation 3" in text, path
            assert "<script>alert" not in text, path
            assert "\u202e" not in text, path


def test_g6_an_end_that_was_cut_off_after_the_run_took_it_is_told(run: Peopled) -> None:
    for words in ("a", "b"):
        run.ask(RequestType.QUESTION, words)
    run.take()
    with Served(run.folder) as page:
        page.enter()
        wait_for(lambda: "chain holds" in page.get("/audit").text)
        assert "no longer holds" not in page.get("/audit").text
        with closing(sqlite3.connect(run.inbox.path)) as database:
            database.execute("DELETE FROM entries WHERE sequence = 2")
            database.commit()
        assert "entry 2 is gone" in page.get("/audit").text


def test_agents_say_in_which_environment_they_were_measured(run: Peopled) -> None:
    request = run.approved(RequestType.DATASET, POEMS)
    with Served(run.folder) as page:
        page.enter()
        assert ">env.<" not in page.get("/agents").text
        assert "<dt>environment</dt>" not in page.get("/agents/g00-i00").text
        run.open_environment(request)
        wait_for(lambda: ">env.<" in page.get("/agents").text)
        text = page.get("/agents/g00-i00").text
        assert "made in 0, measured again in 1; the run is in 1" in text
        assert "perplexity in environment 0" in text


def test_the_run_view_tells_environments_and_shows_the_last(run: Peopled) -> None:
    with Served(run.folder) as page:
        page.enter()
        assert "<h3>Environments</h3>" not in page.get("/run").text
        request = run.approved(RequestType.DATASET, POEMS)
        run.take()
        run.effect(request, "more", content_hash="ab" * 32, tokens=12_000, source="textdir")
        before = page.pages.live.view().facts
        run.open_environment(request, gain=0.5)
        wait_for(lambda: "5 were measured again" in page.get("/live/run").text)
        text = page.get("/run").text
        assert "<h3>Environments</h3>" in text
        assert "<b>environment 1: data</b> since generation 3: more text to train on" in text
        after = page.pages.live.view().facts
        assert before is not None
        assert after is not None
        assert before.chronicle.base is not None
        assert after.chronicle.base is not None
        ratio = (
            after.chronicle.base.values["val_perplexity"]
            / before.chronicle.base.values["val_perplexity"]
        )
        assert ratio == pytest.approx(0.5)
        assert after.chronicle.selected is not None
        assert after.chronicle.selected.environment == 1


# --- where it is served ---------------------------------------------------------------------------


def test_the_page_is_at_its_own_port_where_that_is_free_and_says_so_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(web.listen("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(web, "PORT", port)
    with closing(web._listen_where_it_is_free("127.0.0.1")) as listener:
        assert listener.getsockname()[1] == port
        with closing(web._listen_where_it_is_free("127.0.0.1")) as another:
            assert another.getsockname()[1] not in (0, port)


def test_an_address_of_another_machine_is_no_reason_to_take_another_port() -> None:
    with pytest.raises(OSError, match="assign") as error:
        web._listen_where_it_is_free("192.0.2.1")
    assert error.value.errno == errno.EADDRNOTAVAIL
    assert isinstance(error.value, socket.error)
