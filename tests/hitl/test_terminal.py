"""The terminal's door, as it is typed: who approves what, and every way of not approving."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from darwin_exp.hitl import __main__ as command_line
from darwin_exp.hitl.inbox import FILE_NAME, Author, Inbox, as_json
from darwin_exp.hitl.requests import (
    Board,
    Request,
    RequestType,
    Standing,
    State,
    ask,
    edit_content,
    fold,
)
from darwin_exp.hitl.terminal import agrees
from darwin_exp.journal import Journal

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "darwin_exp.hitl"]
RUN_ID = "261122-1200-a1b2"
SCRIPT = Request(
    RUN_ID,
    RequestType.SCRIPT,
    "tokens are [bold]slow[/bold] \x1b[2J",
    "faster",
    "import sys\nprint('warm up')\n",
    "g01-i02",
    1,
)
QUESTION = replace(SCRIPT, type=RequestType.QUESTION)  # may be changed to anything
PATCH = Request(
    RUN_ID,
    RequestType.EDIT,
    "review",
    "",
    edit_content("g02-i01", "g01-i02", "ab" * 32, "-rate = 1\n+rate = 2  # \u202eevil\n"),
    "g01-i02",
    2,
    "g02-i01",
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that two requests wait in; no process works at it."""
    folder = tmp_path / RUN_ID
    (folder / "individuals" / "g01-i02").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (tmp_path / "latest").symlink_to(RUN_ID)
    for request in (SCRIPT, PATCH):
        ask(Inbox(folder / FILE_NAME), request)
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def typed(run_folder: Path, *words: str) -> int:
    """Type a command that needs nobody at the terminal; return its exit code."""
    return command_line.main(["--runs", str(run_folder.parent), *words])


def board_of(run_folder: Path) -> Board:
    return fold(Inbox(run_folder / FILE_NAME).entries(), RUN_ID)


def standing_of(run_folder: Path, request: Request = SCRIPT) -> Standing:
    return board_of(run_folder).requests[request.request_id]


def at_a_terminal(
    run_folder: Path, words: list[str], keys: bytes, meanwhile: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """Type a command at a real terminal, press keys when it asks; return code and screen."""
    ours, theirs = pty.openpty()
    coloured = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [*COMMAND, "--runs", str(run_folder.parent), *words],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**coloured, "TERM": "xterm", "COLUMNS": "160"},
        start_new_session=True,
    )
    os.close(theirs)
    screen, has_pressed = b"", False
    while True:
        try:
            read = os.read(ours, 65_536)
        except OSError:  # the other side is closed
            break
        if not read:
            break
        screen += read
        if b"else no: " in screen and not has_pressed:
            has_pressed = True
            meanwhile()
            os.write(ours, keys)
    os.close(ours)
    return process.wait(timeout=60), screen.decode()


# --- reading ---------------------------------------------------------------------------------


def test_list_shows_what_waits_and_obeys_nothing_in_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "list") == 0
    said = capsys.readouterr().out
    for words in (SCRIPT.request_id, PATCH.request_id, "script", "edit", "g01-i02", "pending"):
        assert words in said
    assert "[bold]slow[/bold]" in said
    assert "\x1b" not in said
    assert "2 waiting" in said


def test_show_prints_the_exact_content_and_its_hash(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "show", SCRIPT.request_id[:4]) == 0
    said = capsys.readouterr().out
    assert SCRIPT.content in said
    assert SCRIPT.content_hash in said
    assert hashlib.sha256(SCRIPT.content.encode()).hexdigest() == SCRIPT.content_hash


def test_show_spells_out_what_would_mislead_a_reader(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "show", PATCH.request_id) == 0
    said = capsys.readouterr().out
    assert "⟨U+202E⟩evil" in said
    assert "\u202e" not in said
    assert "what would not be seen is spelt out" in said


def test_g5_a_line_that_leaves_the_screen_comes_back_to_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = replace(PATCH, content=f"@@ -1 +1 @@\n-x = 1\n+x = 1{400 * ' '}; evil()\u3164\n")
    ask(Inbox(run_folder / FILE_NAME), hidden)
    typed(run_folder, "show", hidden.request_id)
    assert "+x = 1⟨400 spaces⟩; evil()⟨U+3164⟩\n" in capsys.readouterr().out
    typed(run_folder, "show", SCRIPT.request_id)
    assert "spelt out" not in capsys.readouterr().out
    _, screen = at_a_terminal(run_folder, ["show", hidden.request_id], b"")
    assert "⟨400 spaces⟩" in screen


def test_a_patch_is_highlighted_on_a_terminal(run_folder: Path) -> None:
    code, screen = at_a_terminal(run_folder, ["show", PATCH.request_id], b"")
    assert code == 0
    (line,) = [line for line in screen.splitlines() if "rate = 2" in line]
    assert "\x1b[" in line


def test_g3_show_warns_of_what_would_be_refused_when_it_is_carried_out(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(run_folder, "show", SCRIPT.request_id)
    assert "as it stands it would be refused: a script is told exactly" in capsys.readouterr().out
    exact = replace(SCRIPT, content='{"path": "warm.py", "text": "x = 1"}')
    ask(Inbox(run_folder / FILE_NAME), exact)
    typed(run_folder, "show", exact.request_id)
    assert "would be refused" not in capsys.readouterr().out


def test_g4_show_warns_of_a_data_set_that_is_not_exact(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = {"source": "textdir", "path": "/texts", "licence": "CC0", "most_mb": 1}
    for told, is_exact in (
        (exact, True),
        ({**exact, "licence": ""}, False),
        ({**exact, "val": "/easy"}, False),
        ({**exact, "most_mb": 10**9}, False),
    ):
        wish = replace(SCRIPT, type=RequestType.DATASET, content=json.dumps(told))
        ask(Inbox(run_folder / FILE_NAME), wish)
        typed(run_folder, "show", wish.request_id)
        assert ("would be refused" not in capsys.readouterr().out) is is_exact


def test_g7_what_waits_still_waits_for_another_process_and_is_asked_once(run_folder: Path) -> None:
    command = [*COMMAND, "--runs", str(run_folder.parent), "list"]
    for _ in range(2):
        ask(Inbox(run_folder / FILE_NAME), SCRIPT)  # as a run does that was killed meanwhile
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert said.stdout.count(SCRIPT.request_id) == 1
        assert "2 waiting" in said.stdout
    assert Inbox(run_folder / FILE_NAME).verify() == 2


@pytest.mark.parametrize("kind", ["dataset", "script", "file_structure", "library", "resources"])
@pytest.mark.parametrize("flag", ["--yes", "-y", "--force", "--all", "--no-input"])
def test_g9_no_flag_approves_what_a_person_must_decide(
    run_folder: Path, kind: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = replace(SCRIPT, type=RequestType(kind))
    ask(Inbox(run_folder / FILE_NAME), request)
    with pytest.raises(SystemExit) as ended:
        typed(run_folder, "approve", request.request_id, flag)
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err
    assert standing_of(run_folder, request).waits


def test_list_and_show_tell_what_came_of_an_answer(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert typed(run_folder, *words) == 0
        return capsys.readouterr().out

    said("approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash)
    assert "to come" in said("list")
    assert "takes effect at the next generation" in said("show", SCRIPT.request_id)
    journal = Journal(run_folder)
    payload = {
        "request_id": SCRIPT.request_id,
        "type": "script",
        "generation": 3,
        "outcome": "failed",
        "message": "no plain name \x1b[2J",
    }
    journal.append("effect", SCRIPT.request_id, payload)
    journal.close()
    assert "failed" in said("list")
    shown = said("show", SCRIPT.request_id)
    assert "failed in generation 3: no plain name" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("columns", [80, 50])
def test_each_request_is_listed_in_one_line_with_its_whole_id(
    run_folder: Path,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    inbox = Inbox(run_folder / FILE_NAME)
    requests = [replace(SCRIPT, type=kind, reason=f"漢字 {9 * 'why '}") for kind in RequestType]
    for request in requests:
        ask(inbox, request)
        for k in range(12):
            ask(inbox, replace(request, asked_by=f"g0123-i{k:04d}"))
    typed(run_folder, "approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash)
    capsys.readouterr()
    assert typed(run_folder, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= columns
    ids = {request.request_id for request in (SCRIPT, PATCH, *requests)}
    shown = [line.split()[0] for line in lines if line.split() and line.split()[0] in ids]
    assert sorted(shown) == sorted(ids)
    assert not [line for line in lines if line.startswith("  ") and line.strip()], "none is folded"


def test_a_number_beyond_all_bounds_is_listed(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(value: float) -> str:
        payload = {"key": "llm.max_tokens", "value": value}
        Inbox(run_folder / FILE_NAME).append("budget", payload, Author("ann", "web"))
        assert typed(run_folder, "list") == 0
        return capsys.readouterr().out

    # Who writes into the file may have written what no door takes.
    assert "llm.max_tokens is" in say(10**400)
    assert "budget: llm.max_tokens is 1,500,000\n" in say(1_500_000)


def test_a_damaged_journal_leaves_the_requests_to_be_read(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "journal.sqlite").write_bytes(b"no journal at all" * 100)
    assert typed(run_folder, "list") == 0
    said = capsys.readouterr().out
    assert "2 waiting" in said
    assert "what came of answers is not known" in said


# --- approving -------------------------------------------------------------------------------


def test_g2_the_digits_of_what_was_shown_approve_it(run_folder: Path) -> None:
    keys = SCRIPT.content_hash[:8].encode() + b"\n"
    code, screen = at_a_terminal(run_folder, ["approve", SCRIPT.request_id], keys)
    assert code == 0
    assert SCRIPT.content_hash in screen
    standing = standing_of(run_folder)
    assert (standing.state, standing.granted_content) == (State.APPROVED, SCRIPT.content)
    assert standing.history[-1].author.door == "terminal"


@pytest.mark.parametrize("keys", [b"\n", b"y\n", b"yes\n", b"approve\n", b"\x04"])
def test_g1_whatever_else_is_typed_is_no(run_folder: Path, keys: bytes) -> None:
    code, screen = at_a_terminal(run_folder, ["approve", SCRIPT.request_id], keys)
    assert code == 1
    assert "not approved" in screen
    assert standing_of(run_folder).state is State.PENDING


def test_g2_an_answer_that_comes_second_is_told_that_it_does(run_folder: Path) -> None:
    words = ["approve", SCRIPT.request_id]
    keys = SCRIPT.content_hash[:8].encode() + b"\n"

    def meanwhile() -> None:
        assert typed(run_folder, *words, "--hash", SCRIPT.content_hash) == 0

    code, screen = at_a_terminal(run_folder, words, keys, meanwhile)
    assert code == 1
    assert "not done: the request was approved already" in screen
    assert board_of(run_folder).refused == (), "nothing was written"


@pytest.mark.parametrize("keys", [PATCH.content_hash[:8], SCRIPT.content_hash[:7], ""])
def test_g2_other_digits_are_no(keys: str) -> None:
    assert not agrees(SCRIPT.content_hash, lambda _: keys)
    assert agrees(SCRIPT.content_hash, lambda _: f" {SCRIPT.content_hash[:8]} ")


def test_g1_the_end_of_input_is_no() -> None:
    def end(_: str) -> str:
        raise EOFError

    assert not agrees(SCRIPT.content_hash, end)


@pytest.mark.parametrize("fed", ["", "y\n" * 50, f"{SCRIPT.content_hash[:8]}\n"])
def test_g1_nothing_that_is_piped_in_approves(run_folder: Path, fed: str) -> None:
    ended = subprocess.run(
        [*COMMAND, "--runs", str(run_folder.parent), "approve", SCRIPT.request_id],
        cwd=ROOT,
        input=fed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "nobody can type here" in ended.stderr
    assert standing_of(run_folder).state is State.PENDING


def test_g2_the_whole_hash_approves_without_a_terminal(run_folder: Path) -> None:
    words = ("approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash, "--note", "fine")
    assert typed(run_folder, *words) == 0
    assert standing_of(run_folder).state is State.APPROVED
    assert standing_of(run_folder).note == "fine"


@pytest.mark.parametrize(
    "wrong", ["", SCRIPT.content_hash[:8], PATCH.content_hash, SCRIPT.content_hash.upper()]
)
def test_g2_another_hash_approves_nothing(
    run_folder: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "approve", SCRIPT.request_id, "--hash", wrong) == 1
    assert "not done: the hash is not that of what would be approved" in capsys.readouterr().err
    assert len(board_of(run_folder).waiting) == 2
    assert board_of(run_folder).refused == ()


def test_what_was_settled_is_not_asked_about_again(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash) == 0
    assert typed(run_folder, "approve", SCRIPT.request_id) == 1
    assert "approved already" in capsys.readouterr().err


# --- other answers ---------------------------------------------------------------------------


def test_deny_and_ask_back_need_no_hash(run_folder: Path) -> None:
    assert typed(run_folder, "deny", PATCH.request_id, "--note", "too large") == 0
    assert typed(run_folder, "ask", SCRIPT.request_id, "which", "tokens?") == 0
    assert standing_of(run_folder, PATCH).state is State.DENIED
    assert standing_of(run_folder).note == "which tokens?"
    assert standing_of(run_folder).waits


def test_g2_a_change_from_a_file_grants_that_file(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "better.py"
    file.write_bytes(b"print('warmer')\r\n")
    digits = hashlib.sha256(file.read_bytes()).hexdigest()  # as sha256sum prints them
    ask(Inbox(run_folder / FILE_NAME), QUESTION)
    change = ["change", QUESTION.request_id, "--file", str(file)]
    assert typed(run_folder, *change, "--hash", QUESTION.content_hash) == 1
    assert typed(run_folder, *change, "--hash", digits) == 0
    assert standing_of(run_folder, QUESTION).granted_content == "print('warmer')\r\n"


def test_g2_a_change_in_the_editor_is_shown_before_it_is_approved(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor.py"
    editor.write_text("import sys; open(sys.argv[1], 'a').write('print(2)\\n')")
    monkeypatch.setenv("EDITOR", f"{sys.executable} {editor}")
    monkeypatch.delenv("VISUAL", raising=False)
    changed = QUESTION.content + "print(2)\n"
    digits = hashlib.sha256(changed.encode()).hexdigest()
    ask(Inbox(run_folder / FILE_NAME), QUESTION)
    change = ["change", QUESTION.request_id, "--editor"]
    old = QUESTION.content_hash[:8].encode() + b"\n"
    assert at_a_terminal(run_folder, change, old)[0] == 1
    code, screen = at_a_terminal(run_folder, change, digits[:8].encode() + b"\n")
    assert code == 0
    assert digits in screen
    assert standing_of(run_folder, QUESTION).granted_content == changed


@pytest.mark.parametrize("content", ["print('x')\n", '{"path": "../a.py", "text": "x"}'])
def test_g3_a_change_that_could_not_be_carried_out_grants_nothing(
    run_folder: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "content"
    file.write_text(content)
    digits = hashlib.sha256(content.encode()).hexdigest()
    words = ("change", SCRIPT.request_id, "--file", str(file), "--hash", digits)
    assert typed(run_folder, *words) == 1
    assert "it could not be carried out" in capsys.readouterr().err
    assert standing_of(run_folder).waits


def test_g2_a_changed_rewrite_keeps_the_lines_that_say_whose_it_is(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = "--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-rate = 1\n+rate = 3\n"
    good = edit_content("g02-i01", "g01-i02", "ab" * 32, patch)
    file = tmp_path / "content"
    for content, code in ((good.replace("g01-i02", "g01-i03"), 1), ("rate = 3", 1), (good, 0)):
        file.write_text(content)
        digits = hashlib.sha256(content.encode()).hexdigest()
        words = ("change", PATCH.request_id, "--file", str(file), "--hash", digits)
        assert typed(run_folder, *words) == code
    assert "the first lines say which rewrite" in capsys.readouterr().err
    assert standing_of(run_folder, PATCH).granted_content == good


@pytest.mark.parametrize(("editor", "code"), [("true", 1), ("false", 2), ("/nowhere/vi", 2)])
def test_an_editor_that_changes_nothing_approves_nothing(
    run_folder: Path, editor: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", editor)
    assert typed(run_folder, "change", SCRIPT.request_id, "--editor") == code
    assert standing_of(run_folder).waits


def test_revoke_takes_an_approval_back(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(run_folder, "revoke", SCRIPT.request_id) == 1
    assert "nothing to revoke" in capsys.readouterr().err
    typed(run_folder, "approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash)
    assert typed(run_folder, "revoke", SCRIPT.request_id) == 0
    assert standing_of(run_folder).state is State.REVOKED


# --- steering --------------------------------------------------------------------------------


def test_what_people_say_is_recorded_with_who_and_by_which_door(run_folder: Path) -> None:
    for words in (
        ["guide", "try", "rotary"],
        ["guide", "keep it small", "--to", "g01-i02"],
        ["pin", "g01-i02", "--note", "promising"],
        ["pause"],
        ["stop"],
        ["budget", "max_hours=2.5"],
        ["budget", "llm.max_calls=40"],
    ):
        assert typed(run_folder, *words) == 0
    board = board_of(run_folder)
    assert board.told_to(["g01-i02"]) == ("try rotary", "keep it small")
    assert (list(board.pins), board.is_paused, len(board.stops)) == (["g01-i02"], True, 1)
    assert board.budgets == {"max_hours": 2.5, "llm.max_calls": 40}
    assert {note.entry.author.door for note in board.guidance} == {"terminal"}
    assert typed(run_folder, "resume") == 0
    assert typed(run_folder, "veto", "g01-i02") == 0
    assert (board_of(run_folder).is_paused, board_of(run_folder).pins) == (False, {})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "zz"], "zz: no such request"),
        (["approve", ""], "an empty id: no such request"),
        (["pin", "g09-i09"], "g09-i09: no such agent"),
        (["veto", "../g01-i02"], "no such agent"),
        (["guide", "x", "--to", "g09-i09"], "no such agent"),
        (["guide", " "], "guidance has 1 to"),
        (["budget", "max_hours"], "give key=value"),
        (["budget", "max_hours=soon"], "give key=value"),
        (["budget", "max_hours=-1"], "above zero"),
        (["budget", "seed=3"], "seed is no budget"),
        (["change", SCRIPT.request_id, "--file", "/nowhere"], "/nowhere: No such file"),
        (["--run", "nobodys", "list"], f"nobodys: no such run in.*{RUN_ID}"),
        (["--run", f"../{RUN_ID}", "list"], "no such run"),
    ],
)
def test_what_was_mistyped_is_one_clear_line(
    run_folder: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    n = Inbox(run_folder / FILE_NAME).verify()
    assert typed(run_folder, *words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("darwin_exp.hitl: ")
    assert re.search(line, said)
    assert Inbox(run_folder / FILE_NAME).verify() == n


def test_digits_that_fit_two_requests_are_one_clear_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digit = SCRIPT.request_id[0]
    others = (replace(SCRIPT, content=f"print({n})") for n in range(1_000))
    twin = next(other for other in others if other.request_id[0] == digit)
    ask(Inbox(run_folder / FILE_NAME), twin)
    assert typed(run_folder, "show", digit) == 2
    assert "several requests begin so" in capsys.readouterr().err


def test_a_run_that_nobody_asked_anything_in_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert command_line.main(["--runs", str(tmp_path), "--run", "run", "list"]) == 0
    assert "nobody has asked" in capsys.readouterr().out
    assert not (tmp_path / "run" / FILE_NAME).exists()


# --- auditing and following ------------------------------------------------------------------


def test_g6_verify_finds_a_changed_past_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(run_folder, "approve", SCRIPT.request_id, "--hash", SCRIPT.content_hash)
    assert typed(run_folder, "verify") == 0
    assert "3 entries" in capsys.readouterr().out
    with closing(sqlite3.connect(run_folder / FILE_NAME)) as database:
        database.execute("UPDATE entries SET author = 'eve' WHERE sequence = 3")
        database.commit()
    assert typed(run_folder, "verify") == 1
    assert "entry 3 was changed" in capsys.readouterr().err


def test_g6_verify_finds_an_end_that_was_cut_off_after_the_run_took_it(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(run_folder, "pause")
    journal = Journal(run_folder)
    taken = [as_json(entry) for entry in Inbox(run_folder / FILE_NAME).entries()]
    journal.append("inbox", "g01", {"entries": taken})
    journal.close()
    assert typed(run_folder, "verify") == 0
    with closing(sqlite3.connect(run_folder / FILE_NAME)) as database:
        database.execute("DELETE FROM entries WHERE sequence = 3")
        database.commit()
    assert typed(run_folder, "verify") == 1
    assert "the run took entry 3" in capsys.readouterr().err


def test_g8_verify_reports_an_approval_that_does_not_count(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = replace(SCRIPT, run_id="another")
    payload = {
        "request_id": SCRIPT.request_id,
        "decision": "approve",
        "content_hash": theirs.content_hash,
        "nonce": theirs.nonce,
    }
    Inbox(run_folder / FILE_NAME).append("answered", payload, Author("eve", "web"))
    assert typed(run_folder, "verify") == 0
    said = capsys.readouterr().out
    assert "does not count: the approval was given in another run" in said
    assert "2 requests, 0 of them granted" in said


def test_watch_follows_what_is_said_until_it_is_interrupted(run_folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--runs", str(run_folder.parent), "watch", "--all"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert SCRIPT.request_id in process.stdout.readline()
    assert PATCH.request_id in process.stdout.readline()
    typed(run_folder, "guide", "try rotary")
    assert "try rotary" in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_an_answer_reaches_the_journal_as_plain_json(run_folder: Path) -> None:
    typed(run_folder, "deny", SCRIPT.request_id)
    entry = Inbox(run_folder / FILE_NAME).entries()[-1]
    assert json.loads(json.dumps(as_json(entry)))["payload"]["decision"] == "deny"
