"""The web door: what it shows, what its forms write, and that nothing else counts as a yes."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from darwin_exp.hitl.inbox import Entry
from darwin_exp.hitl.requests import RequestType, State, content_of, fold, hash_of
from darwin_exp.hitl.web import WRONG, listen, serve
from darwin_exp.hitl.web.live import is_worked_at
from darwin_exp.hitl.web.shown import LARGEST_SHOWN, patch_lines
from darwin_exp.journal import Journal
from tests.hitl.served import PATCH, Served, wait_for
from tests.report.long_journal import LongJournal

PAGES = ("/", "/run", "/lineage", "/lineage?all=1", "/agents", "/guidance", "/audit")
HOSTILE = "</textarea><script>alert(1)</script>\u202e\x1b[2J'\" onload=x"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    run = LongJournal(tmp_path / "run", 32, 3, failing=0.0).write("search")
    with Served(run) as page:
        yield page.enter()


def answered(page: Served) -> list[Entry]:
    return [entry for entry in page.inbox.entries() if entry.kind != "asked"]


def test_every_page_shows_the_run(served: Served) -> None:
    told = {path: served.get(path) for path in PAGES}
    assert {answer.status for answer in told.values()} == {200}
    assert "Nothing waits" in told["/"].text
    assert "32 of 32" in told["/run"].text
    assert told["/run"].text.count("<svg") == 3
    assert 'href="/agents/g01-i02"' in told["/lineage"].text
    assert "33 of 33" in told["/agents"].text
    assert "chain holds" in told["/audit"].text


def test_an_agents_page_shows_change_scores_memory_and_log(served: Served) -> None:
    folder = served.run_folder / "individuals" / "g01-i02"
    folder.mkdir(parents=True)
    (folder / "memory.json").write_text('[{"individual_id": "g00-i03", "summary": "was tried"}]')
    text = served.get("/agents/g01-i02").text
    assert "# edited for g01-i02" in text
    assert "was tried" in text
    assert "val perplexity" in text
    assert "step     39" in text
    assert served.get("/agents/g99-i99").status == 404
    assert served.get("/agents/nobody").status == 404


def test_agents_are_found_by_words_and_status(served: Served) -> None:
    assert "1 of 33" in served.get("/agents?words=g01-i02").text
    assert "0 of 33" in served.get("/agents?words=no+such+words").text
    assert served.get("/agents?status=OK&page=99").status == 200


def test_what_waits_is_shown_with_who_asks_and_why(served: Served) -> None:
    request = served.ask(reason="the corpus is small")
    text = served.get("/").text
    assert f'href="/requests/{request.request_id}"' in text
    assert "the corpus is small" in text
    assert 'href="/agents/g02-i01"' in text
    assert '<span class="count" aria-label="waiting">1</span>' in text


def test_g2_a_request_is_shown_whole_with_the_hash_that_an_approval_will_carry(
    served: Served,
) -> None:
    content = "\n".join(f"line {k}" for k in range(3000))
    request = served.ask(content, RequestType.SCRIPT)
    page = served.get(f"/requests/{request.request_id}")
    assert content in page.text
    assert request.content_hash in page.text
    fields = page.fields(f"/requests/{request.request_id}")
    assert fields["content_hash"] == request.content_hash


def test_g2_approving_writes_exactly_the_hash_that_was_shown(served: Served) -> None:
    request = served.ask()
    address = f"/requests/{request.request_id}"
    fields = served.get(address).fields(address)
    answer = served.post(address, {**fields, "decision": "approve", "note": "fine"})
    assert (answer.status, answer.headers["location"]) == (303, address)
    (entry,) = answered(served)
    assert entry.kind == "answered"
    assert entry.author.door == "web"
    assert entry.payload["content_hash"] == request.content_hash
    assert entry.payload["nonce"] == request.nonce
    board = fold(served.inbox.entries(), served.run_folder.name)
    assert board.requests[request.request_id].state is State.APPROVED
    assert "approved" in served.get(address).text


def test_g2_a_form_that_showed_one_content_approves_no_other(served: Served) -> None:
    one, other = served.ask("a"), served.ask("b")
    address = f"/requests/{other.request_id}"
    fields = served.get(address).fields(address)
    changed = {**fields, "content_hash": one.content_hash, "decision": "approve"}
    assert served.post(address, changed).status == 403
    assert answered(served) == []


@pytest.mark.parametrize(
    ("decision", "note", "state"),
    [
        ("deny", "", State.DENIED),
        ("deny", "not now", State.DENIED),
        ("ask", "which licence?", State.ASKED_BACK),
    ],
)
def test_a_request_is_denied_or_asked_back(
    served: Served, decision: str, note: str, state: State
) -> None:
    request = served.ask()
    address = f"/requests/{request.request_id}"
    fields = served.get(address).fields(address)
    assert served.post(address, {**fields, "decision": decision, "note": note}).status == 303
    board = fold(served.inbox.entries(), served.run_folder.name)
    assert board.requests[request.request_id].state is state


def test_a_change_grants_the_new_content_and_only_that(served: Served) -> None:
    request = served.ask("500 MB", RequestType.QUESTION)
    address = f"/requests/{request.request_id}"
    fields = served.get(address).fields(address, 1)
    sent = {**fields, "decision": "change", "content": "50 MB\r\nof it"}
    assert served.post(address, sent).status == 303
    standing = fold(served.inbox.entries(), served.run_folder.name).requests[request.request_id]
    assert standing.state is State.CHANGED
    assert standing.granted_content == "50 MB\nof it"
    assert answered(served)[0].payload["content_hash"] == hash_of("50 MB\nof it")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"decision": ""},
        {"decision": "yes"},
        {"decision": "APPROVE"},
        {"decision": "approve", "content": "something else"},
        {"decision": "change"},
        {"decision": "change", "content": " \n "},
        {"decision": "ask"},
        {"decision": "approve", "force": "1"},
        {"note": "approve"},
    ],
)
def test_g1_anything_but_a_clear_yes_writes_nothing(served: Served, said: dict[str, str]) -> None:
    request = served.ask()
    address = f"/requests/{request.request_id}"
    fields = served.get(address).fields(address)
    answer = served.post(address, {**fields, **said})
    assert answer.status in (400, 409)
    assert answered(served) == []


def test_g1_looking_writes_nothing(served: Served) -> None:
    request = served.ask()
    for path in (*PAGES, f"/requests/{request.request_id}", "/live/inbox", "/live/run"):
        assert served.get(path).status == 200
    assert served.get(f"/requests/{request.request_id}?decision=approve").status == 200
    assert answered(served) == []


def test_a_form_that_is_sent_twice_counts_once(served: Served) -> None:
    fields = served.get("/guidance").fields("/guidance/note")
    sent = {**fields, "to": "all", "text": "try smaller batches"}
    assert served.post("/guidance/note", sent).status == 303
    assert served.post("/guidance/note", sent).status == 409
    assert len(answered(served)) == 1


def test_a_form_that_was_turned_down_can_be_mended_and_sent_again(served: Served) -> None:
    fields = served.get("/guidance").fields("/guidance/note")
    assert served.post("/guidance/note", {**fields, "to": "all", "text": " "}).status == 409
    assert served.post("/guidance/note", {**fields, "to": "all", "text": "a word"}).status == 303


def test_g7_what_waits_still_waits_after_a_restart_and_is_asked_once(tmp_path: Path) -> None:
    run = LongJournal(tmp_path / "run", 4, 1).write("search")
    with Served(run) as page:
        request = page.ask()
    with Served(run) as page:
        assert page.ask().request_id == request.request_id
        assert page.enter().get("/").text.count(f'href="/requests/{request.request_id}"') == 1


def test_g8_another_runs_request_cannot_be_answered_here(served: Served) -> None:
    request = served.ask(run_id="another-run")
    assert served.get(f"/requests/{request.request_id}").status == 404
    assert "asked in another run" in served.get("/audit").text


def test_g5_words_of_agents_are_text_and_nothing_in_them_is_invisible(tmp_path: Path) -> None:
    run = LongJournal(tmp_path / "run", 12, 2, hostile=HOSTILE).write("search")
    with Served(run) as page:
        page.enter()
        request = page.ask(f"approve this: {HOSTILE}", RequestType.SCRIPT, reason=HOSTILE)
        paths = (*PAGES, f"/requests/{request.request_id}", "/agents/g01-i02")
        for path in paths:
            text = page.get(path).text
            assert "<script>alert" not in text, path
            assert "\u202e" not in text, path
            assert "\x1b" not in text, path
        assert "⟨U+202E⟩" in page.get(f"/requests/{request.request_id}").text
        assert fold(page.inbox.entries()).requests[request.request_id].waits


def test_no_page_shows_the_integrity_key(served: Served) -> None:
    for path in (*PAGES, "/agents/g01-i02", "/agents/g00-i00"):
        assert "5e" * 32 not in served.get(path).text


def test_g6_a_changed_past_entry_is_named_and_nothing_can_be_approved(served: Served) -> None:
    requests = [served.ask(str(k)) for k in range(3)]
    address = f"/requests/{requests[2].request_id}"
    fields = served.get(address).fields(address)
    with closing(sqlite3.connect(served.inbox.path)) as database:
        database.execute(
            "UPDATE entries SET payload = replace(payload, '1', '7') WHERE sequence = 2"
        )
        database.commit()
    assert "entry 2" in served.get("/audit").text
    assert "cannot be trusted" in served.get("/").text
    assert served.post(address, {**fields, "decision": "approve"}).status == 404


def test_a_rewrite_is_shown_as_the_patch_that_it_is(served: Served) -> None:
    request = served.ask(PATCH, RequestType.EDIT)
    text = served.get(f"/requests/{request.request_id}").text
    assert '<tr class="removed"><td class="no">2</td><td class="no"></td>' in text
    assert "rate = 0.003" in text


@pytest.mark.parametrize("kind", [RequestType.SCRIPT, RequestType.QUESTION])
def test_g5_only_a_rewrite_is_shown_as_a_patch(served: Served, kind: RequestType) -> None:
    request = served.ask(PATCH, kind)
    text = served.get(f"/requests/{request.request_id}").text
    assert '<table class="patch">' not in text
    assert f"<pre>\n{PATCH}</pre>" in text


def test_g5_a_gap_that_hides_what_follows_it_is_counted(served: Served) -> None:
    line = f"x = 1{400 * ' '}; evil()\u3164"
    for content, kind in (
        (f"@@ -1 +1 @@\n-x = 1\n+{line}\n", RequestType.EDIT),
        (f"{line}\n", RequestType.QUESTION),
        (content_of({"path": "warm.py", "text": f"{line}\n"}), RequestType.SCRIPT),
    ):
        text = served.get(f"/requests/{served.ask(content, kind).request_id}").text
        assert "x = 1⟨400 spaces⟩; evil()⟨U+3164⟩" in text
        assert "\u3164" not in text


def test_g2_what_is_left_in_the_form_is_granted_with_its_gaps(served: Served) -> None:
    content = f"x = 1{60 * ' '}# é 漢\n"
    request = served.ask(content, RequestType.QUESTION)
    text = served.get(f"/requests/{request.request_id}").text
    assert f'spellcheck="false">\n{content}</textarea>' in text
    assert "in these very letters" not in text
    odd = served.ask("x = 1\u00a0# 漢", RequestType.QUESTION)
    text = served.get(f"/requests/{odd.request_id}").text
    assert 'spellcheck="false">\nx = 1⟨U+00A0⟩# 漢</textarea>' in text
    assert "in these very letters" in text


def test_g2_a_patch_that_was_granted_instead_is_shown_with_its_lines(served: Served) -> None:
    request = served.ask(PATCH, RequestType.EDIT)
    address = f"/requests/{request.request_id}"
    fields = served.get(address).fields(address, 1)
    other = PATCH.replace("+rate = 0.003", "+rate = 0.007")
    assert served.post(address, {**fields, "decision": "change", "content": other}).status == 303
    granted = served.get(address).text.partition("What was granted instead")[2]
    assert '<td class="no">+</td><td>rate = 0.007</td>' in granted


def test_g2_of_two_that_answer_at_once_one_is_told_that_it_came_second(served: Served) -> None:
    request = served.ask()
    address = f"/requests/{request.request_id}"
    forms = [served.get(address).fields(address) for _ in range(2)]
    with (
        ThreadPoolExecutor(len(forms)) as people,
        closing(sqlite3.connect(served.inbox.path, isolation_level=None)) as database,
    ):
        database.execute("BEGIN IMMEDIATE")  # both look at the request before either can write
        sent = [
            people.submit(served.post, address, {**form, "decision": "approve"}) for form in forms
        ]
        time.sleep(0.5)
        database.execute("ROLLBACK")
        answers = [one.result() for one in sent]
    assert sorted(answer.status for answer in answers) == [303, 409]
    second = next(answer for answer in answers if answer.status == 409)
    assert "Nothing was written: the request was approved already" in second.text
    assert len(answered(served)) == 1


def test_an_empty_line_whose_space_an_editor_took_is_part_of_its_hunk() -> None:
    lines = list(patch_lines("@@ -1,3 +1,3 @@\n a\n\n-b\n+c\n"))
    assert [line.kind for line in lines] == ["gap", "same", "same", "removed", "added"]
    assert [line.before for line in lines] == [None, 1, 2, 3, None]


def test_text_that_only_looks_like_a_patch_keeps_every_line() -> None:
    text = "+ no hunk\n@@ -1,1 +1,1 @@\n-a\n+b\n+c is beyond the hunk\n"
    lines = list(patch_lines(text))
    assert [line.kind for line in lines] == ["same", "gap", "removed", "added", "same"]
    assert str(lines[-1].code) == "+c is beyond the hunk"


def test_what_is_too_large_to_be_read_cannot_be_approved(served: Served) -> None:
    request = served.ask("x" * (LARGEST_SHOWN + 1), RequestType.SCRIPT)
    address = f"/requests/{request.request_id}"
    page = served.get(address)
    assert 'value="approve"' not in page.text
    sent = {**page.fields(address), "decision": "approve"}
    assert served.post(address, sent).status == 409
    assert answered(served) == []
    assert served.post(address, {**sent, "decision": "deny"}).status == 303


def test_a_grant_is_revoked(served: Served) -> None:
    request = served.ask()
    address = f"/requests/{request.request_id}"
    served.post(address, {**served.get(address).fields(address), "decision": "approve"})
    fields = served.get(address).fields(f"{address}/revoke")
    assert served.post(f"{address}/revoke", {**fields, "revoke": "yes"}).status == 303
    standing = fold(served.inbox.entries(), served.run_folder.name).requests[request.request_id]
    assert standing.state is State.REVOKED


def test_people_steer_the_run(served: Served) -> None:
    def send(where: str, **fields: str) -> int:
        hidden = served.get("/guidance").fields(f"/guidance/{where}")
        return served.post(f"/guidance/{where}", {**hidden, **fields}).status

    assert send("note", to="all", text="prefer small changes") == 303
    assert send("note", to="g01-i02", text="go on with the schedule") == 303
    assert send("mark", individual_id="g01-i02", mark="pinned", note="") == 303
    assert send("mark", individual_id="g01-i03", mark="vetoed", note="cheats") == 303
    assert send("pause") == 303
    assert "paused by a person" in served.get("/").text
    assert send("resume") == 303
    assert send("budget", key="max_hours", value="2.5") == 303
    assert send("stop", note="enough") == 303
    board = fold(served.inbox.entries(), served.run_folder.name)
    assert [note.to for note in board.guidance] == ["all", "g01-i02"]
    assert set(board.pins) == {"g01-i02"}
    assert set(board.vetoes) == {"g01-i03"}
    assert not board.is_paused
    assert board.budgets == {"max_hours": 2.5}
    assert len(board.stops) == 1
    assert {entry.author.door for entry in served.inbox.entries()} == {"web"}


def test_steering_that_means_nothing_is_refused(served: Served) -> None:
    def send(where: str, **fields: str) -> int:
        hidden = served.get("/guidance").fields(f"/guidance/{where}")
        return served.post(f"/guidance/{where}", {**hidden, **fields}).status

    assert send("note", to="g77-i77", text="hello") == 400
    assert send("note", to="", text="hello") == 404
    assert send("mark", individual_id="g01-i02", mark="promoted") == 400
    assert send("budget", key="max_hours", value="-1") == 400
    assert send("budget", key="max_hours", value="nan") == 400
    assert send("budget", key="sandbox.memory_mb", value="4") == 409
    assert answered(served) == []


def test_an_agent_is_pinned_from_its_page(served: Served) -> None:
    fields = served.get("/agents/g01-i02").fields("/agents/g01-i02/mark")
    assert served.post("/agents/g01-i02/mark", {**fields, "mark": "pinned"}).status == 303
    assert "pinned" in served.get("/agents/g01-i02").text


def test_a_part_is_sent_again_only_when_it_has_changed(served: Served) -> None:
    first = served.get("/live/inbox")
    assert first.status == 200
    seen = first.headers["x-seen"]
    again = served.get(f"/live/inbox?seen={seen}")
    assert (again.status, again.text) == (204, "")
    served.ask()
    later = served.get(f"/live/inbox?seen={seen}")
    assert (later.status, later.headers["x-waiting"]) == (200, "1")
    assert served.get("/live/nothing").status == 404


def test_the_page_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    run = LongJournal(tmp_path / "run", 6, 1).write("search")
    with Served(run) as page:
        page.enter()
        assert "Nobody, at this moment" in page.get("/run").text
        journal = Journal(run)
        try:
            made = {
                "individual_id": "g02-i00",
                "parent_id": "g00-i00",
                "editor_id": "g00-i00",
                "changed": {},
                "summary": "a new life",
            }
            journal.append("proposal", "g02-i00/0", made)
            wait_for(lambda: "a new life" in page.get("/live/run").text)
            wait_for(lambda: is_worked_at(run) in (True, None))
        finally:
            journal.close()
        assert is_worked_at(run) in (False, None)


def test_a_damaged_journal_is_told_and_what_was_read_stays(tmp_path: Path) -> None:
    run = LongJournal(tmp_path / "run", 6, 1).write("search")
    with Served(run) as page:
        page.enter()
        with closing(sqlite3.connect(run / "journal.sqlite")) as database:
            database.execute("DELETE FROM events WHERE sequence > 10")
            database.commit()
        wait_for(lambda: "no longer what it was" in page.get("/audit").text)
        assert page.get("/run").status == 200


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    with Served(tmp_path) as page:
        page.enter()
        for path in PAGES:
            assert page.get(path).status == 200, path
        assert "not begun" in page.get("/").text


def test_serve_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(tmp_path / "none") == WRONG
    assert "no such run" in capsys.readouterr().err
    with closing(listen("127.0.0.1", 0)) as taken:
        assert serve(tmp_path, port=taken.getsockname()[1]) == WRONG
    assert "choose --port" in capsys.readouterr().err
    assert serve(tmp_path, host="0.0.0.0", port=0) == WRONG
    assert "name one address" in capsys.readouterr().err
    assert serve(tmp_path, host="192.0.2.1") == WRONG
    assert "choose --host" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of locks is Linux's")
def test_whether_a_run_is_worked_at_is_told_without_taking_its_lock(tmp_path: Path) -> None:
    assert is_worked_at(tmp_path) is None
    journal = Journal(tmp_path)
    try:
        assert is_worked_at(tmp_path) in (True, None)
    finally:
        journal.close()
    assert is_worked_at(tmp_path) in (False, None)
