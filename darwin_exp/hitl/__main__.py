"""`python -m darwin_exp.hitl`: read what agents ask for, answer it, and steer a run.

Reads: runs/RUN_ID/inbox.sqlite, and for `verify` the journal.
Writes: entries of the inbox.
Never: touches the run itself, which takes what is written here at its next point.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from darwin_exp.chronicle import Chronicle
from darwin_exp.hitl.audit import lost
from darwin_exp.hitl.concerns import Surroundings, check_replacement, concern_about
from darwin_exp.hitl.inbox import FILE_NAME, Author, Entry, Inbox, InboxError, person
from darwin_exp.hitl.outcomes import Outcomes
from darwin_exp.hitl.requests import (
    ALL,
    Board,
    Decision,
    NoSuchRequest,
    Refused,
    Standing,
    answer,
    answer_payload,
    check_answer,
    check_budget,
    check_revocation,
    check_words,
    fold,
    hash_of,
)
from darwin_exp.hitl.terminal import (
    EditorFailed,
    agrees,
    edited,
    line_of,
    listing,
    show,
    show_content,
)
from darwin_exp.journal import FILE_NAME as JOURNAL
from darwin_exp.journal import JournalError, load
from darwin_exp.wording import clean

RUNS = Path(__file__).resolve().parents[2] / "runs"
OK, NO, WRONG = 0, 1, 2
SECONDS_BETWEEN_LOOKS = 0.5


class _Wrong(Exception):
    """The command cannot be carried out as it was typed."""


@dataclass(frozen=True)
class _Desk:
    """Where a person sits: a run's inbox, and who they are."""

    run_folder: Path
    console: Console

    @property
    def inbox(self) -> Inbox:
        return Inbox(self.run_folder / FILE_NAME)

    @property
    def author(self) -> Author:
        return person("terminal")

    def board(self) -> Board:
        return fold(self.inbox.entries(), self.run_folder.name)

    def surroundings(self, standing: Standing) -> Surroundings:
        """Return what a request is judged against, as far as the run has recorded it."""
        with suppress(JournalError, ValueError):  # there is none, or the run has not begun
            return Surroundings.of(Chronicle.read(self.run_folder), standing.askers)
        return Surroundings()

    def show(self, standing: Standing) -> None:
        """Print a request, what came of it, and what would keep it from being carried out."""
        outcomes = Outcomes.read(self.run_folder)
        worry = concern_about(standing, outcomes, lambda: self.surroundings(standing))
        show(self.console, standing, time.time(), outcomes, worry)

    def write(self, kind: str, payload: dict[str, Any]) -> int:
        return self.wrote(self.inbox.append(kind, payload, self.author))

    def wrote(self, entry: Entry) -> int:
        self.console.print(line_of(entry), soft_wrap=True)
        return OK


# --- reading ---------------------------------------------------------------------------------


def _list(desk: _Desk, _: argparse.Namespace) -> int:
    desk.console.print(listing(desk.board(), time.time(), Outcomes.read(desk.run_folder)))
    return OK


def _show(desk: _Desk, chosen: argparse.Namespace) -> int:
    desk.show(desk.board().find(chosen.id))
    return OK


def _watch(desk: _Desk, chosen: argparse.Namespace) -> int:
    seen = 0 if chosen.all else desk.inbox.verify()
    try:
        while True:
            for entry in desk.inbox.entries(after=seen):
                desk.console.print(line_of(entry), soft_wrap=True)
                seen = entry.sequence
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        return OK


def _verify(desk: _Desk, _: argparse.Namespace) -> int:
    """Audit the inbox: its chain, what the run took from it, and which answers count."""
    try:
        has_journal = (desk.run_folder / JOURNAL).is_file()
        events = load(desk.run_folder) if has_journal else []
        entries = desk.inbox.entries()
    except (InboxError, JournalError) as error:
        return _refuse(str(error), NO)
    board, gone = fold(entries, desk.run_folder.name), lost(entries, events)
    for refusal in board.refused:
        words = f"does not count: {clean(refusal.why)}"
        desk.console.print(line_of(refusal.entry), Text(words), soft_wrap=True)
    granted = sum(one.granted_content is not None for one in board.requests.values())
    last = entries[-1].hash if entries else "none"
    for line in (
        f"{len(entries)} entries, each chained to the one before; last hash {last}",
        f"{len(board.requests)} requests, {granted} of them granted, each by an answer bound to "
        "the run, the request and the hash of exactly what was shown",
        f"{len(board.refused)} entries do not count",
    ):
        desk.console.print(Text(line), soft_wrap=True)
    if gone:
        which = ", ".join(map(str, gone))
        return _refuse(f"the run took entry {which}, which is gone or is another one now", NO)
    return OK


# --- answering -------------------------------------------------------------------------------


def _approve(desk: _Desk, chosen: argparse.Namespace) -> int:
    standing = desk.board().find(chosen.id)
    content_hash = standing.request.content_hash
    if chosen.hash is None:
        _check_early(standing, Decision.APPROVE, content_hash, None, chosen.note)
        desk.show(standing)
        if not _has_agreed(content_hash):
            return NO
    return desk.wrote(
        answer(
            desk.inbox,
            standing,
            Decision.APPROVE,
            desk.author,
            content_hash if chosen.hash is None else chosen.hash,
            note=chosen.note,
        )
    )


def _change(desk: _Desk, chosen: argparse.Namespace) -> int:
    standing = desk.board().find(chosen.id)
    before = standing.request.content
    content = edited(before) if chosen.file is None else _text_of(chosen.file)
    if content == before:
        return _refuse("nothing was changed; `approve` takes it as it is", NO)
    check_replacement(standing.request, content, desk.surroundings(standing))
    content_hash = hash_of(content)
    if chosen.hash is None:
        _check_early(standing, Decision.CHANGE, content_hash, content, chosen.note)
        show_content(desk.console, "approved would be", content)
        desk.console.print(Text(f"hash     {content_hash}"), soft_wrap=True)
        if not _has_agreed(content_hash):
            return NO
    return desk.wrote(
        answer(
            desk.inbox,
            standing,
            Decision.CHANGE,
            desk.author,
            content_hash if chosen.hash is None else chosen.hash,
            content,
            chosen.note,
        )
    )


def _check_early(
    standing: Standing, decision: Decision, content_hash: str, content: str | None, note: str
) -> None:
    """Refuse what could not count before a person reads it all."""
    check_answer(
        standing, answer_payload(standing, decision, content_hash, content, note), "terminal"
    )


def _has_agreed(content_hash: str) -> bool:
    if not sys.stdin.isatty():
        _refuse("not approved: nobody can type here; give --hash with what `show` printed", NO)
        return False
    if not agrees(content_hash):
        _refuse("not approved", NO)
        return False
    return True


def _deny(desk: _Desk, chosen: argparse.Namespace) -> int:
    standing = desk.board().find(chosen.id)
    return desk.wrote(answer(desk.inbox, standing, Decision.DENY, desk.author, note=chosen.note))


def _ask(desk: _Desk, chosen: argparse.Namespace) -> int:
    standing = desk.board().find(chosen.id)
    words = " ".join(chosen.text)
    return desk.wrote(answer(desk.inbox, standing, Decision.ASK, desk.author, note=words))


def _revoke(desk: _Desk, chosen: argparse.Namespace) -> int:
    standing = desk.board().find(chosen.id)
    check_revocation(standing)
    told = {"request_id": standing.request.request_id, "note": chosen.note}
    return desk.write("revoked", told)


# --- steering --------------------------------------------------------------------------------


def _guide(desk: _Desk, chosen: argparse.Namespace) -> int:
    words = " ".join(chosen.text)
    try:
        check_words(words)
    except Refused as refusal:
        raise _Wrong(str(refusal)) from refusal
    if chosen.to != ALL:
        _check_agent(desk, chosen.to)
    return desk.write("guided", {"to": chosen.to, "text": words})


def _mark(desk: _Desk, chosen: argparse.Namespace) -> int:
    _check_agent(desk, chosen.agent)
    kind = {"pin": "pinned", "veto": "vetoed"}[chosen.command]
    return desk.write(kind, {"individual_id": chosen.agent, "note": chosen.note})


def _switch(desk: _Desk, chosen: argparse.Namespace) -> int:
    kinds = {"pause": "paused", "resume": "resumed", "stop": "stop_after_generation"}
    return desk.write(kinds[chosen.command], {"note": chosen.note})


def _budget(desk: _Desk, chosen: argparse.Namespace) -> int:
    key, is_pair, told = chosen.setting.partition("=")
    try:
        value: int | float = int(told) if told.strip().isdigit() else float(told)
        if not is_pair:
            raise ValueError
        check_budget(key, value)
    except ValueError as error:
        raise _Wrong(f"{chosen.setting}: give key=value, such as max_hours=8") from error
    except Refused as refusal:
        raise _Wrong(str(refusal)) from refusal
    return desk.write("budget", {"key": key, "value": value})


def _check_agent(desk: _Desk, name: str) -> None:
    """Refuse a name that nobody in the run has.

    Raises:
        _Wrong: it is none of theirs.
    """
    folder = desk.run_folder / "individuals"
    known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if name not in known:
        hint = f"the newest are {', '.join(known[-3:])}" if known else "there are none yet"
        raise _Wrong(f"{name}: no such agent in {desk.run_folder.name}; {hint}")


def _serve(desk: _Desk, chosen: argparse.Namespace) -> int:
    from darwin_exp.hitl.web import serve

    return serve(desk.run_folder, chosen.host, chosen.port, not chosen.no_browser)


# --- the command line ------------------------------------------------------------------------

_Command = Callable[[_Desk, argparse.Namespace], int]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.hitl",
        description="Shows what the agents of a run ask for, answers it, and steers the run, which "
        "takes what is written here at its next point. No run has to be alive for that.",
        epilog="exit codes: 0 done; 1 no: not approved, refused, or an audit that failed; 2 the "
        "command is wrong. Examples: python -m darwin_exp.hitl list; python -m darwin_exp.hitl "
        "--run 261121-2309-a220 approve 3f2a",
    )
    parser.add_argument("--run", default="latest", metavar="RUN_ID", help="a run's id (latest)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        metavar="FOLDER",
        help="where the runs lie (default: runs/ in the checkout)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, does: _Command, told: str, *, noted: bool = False) -> Any:
        command = commands.add_parser(name, help=told, description=f"{told}.")
        command.set_defaults(does=does)
        if noted:
            command.add_argument(
                "--note", default="", help="a word to whoever asked, and for later"
            )
        return command

    add("list", _list, "list the requests, those that wait first")
    of_request = [
        add("show", _show, "show a request, its exact content, and the hash that approves it"),
        add("approve", _approve, "approve exactly what is shown", noted=True),
        add("deny", _deny, "deny a request", noted=True),
        add("change", _change, "approve another content in its place", noted=True),
        add("ask", _ask, "ask back; the request goes on waiting"),
        add("revoke", _revoke, "take an approval back", noted=True),
    ]
    for command in of_request:
        command.add_argument("id", metavar="ID", help="the id of a request, or its first digits")
    for command in (of_request[1], of_request[3]):
        command.add_argument(
            "--hash", help="all 64 digits of what is approved; without it you are asked for some"
        )
    how = of_request[3].add_mutually_exclusive_group(required=True)
    how.add_argument("--file", type=Path, help="the new content")
    how.add_argument("--editor", action="store_true", help="write it in $EDITOR")
    of_request[4].add_argument("text", nargs="+", metavar="TEXT")
    guide = add("guide", _guide, "tell the agents something")
    guide.add_argument("text", nargs="+", metavar="TEXT")
    guide.add_argument("--to", default=ALL, metavar="AGENT", help="one of them alone")
    for name, told in (
        ("pin", "let an agent live on, whatever selection says"),
        ("veto", "let an agent neither live on nor reproduce"),
    ):
        add(name, _mark, told, noted=True).add_argument("agent", metavar="AGENT")
    add("pause", _switch, "begin no further life until `resume`", noted=True)
    add("resume", _switch, "go on after a pause", noted=True)
    add("stop", _switch, "stop, resumably, after this generation", noted=True)
    add("budget", _budget, "set a cap of the run").add_argument("setting", metavar="KEY=VALUE")
    add("verify", _verify, "audit the chain, and that every decision fits what was shown")
    add("watch", _watch, "follow new entries until Ctrl-C").add_argument(
        "--all", action="store_true", help="begin with those that are there"
    )
    serve = add("serve", _serve, "open the web page of a run")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    serve.add_argument(
        "--port",
        type=int,
        help="port; 0 takes a free one (8787, or a free one where that is taken)",
    )
    serve.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out what the command line says, and return the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        desk = _Desk(_folder(chosen.runs, chosen.run), Console())
        code: int = chosen.does(desk, chosen)
    except (_Wrong, NoSuchRequest, EditorFailed, InboxError, OSError) as error:
        return _refuse(str(error), WRONG)
    except Refused as refusal:
        return _refuse(f"not done: {refusal}", NO)
    except KeyboardInterrupt:
        return _refuse("not done: interrupted", NO)
    return code


def _folder(runs: Path, name: str) -> Path:
    """Return the folder of a run by its id, or of the newest one started.

    Raises:
        _Wrong: there is none.
    """
    folder = runs / name
    marks = (JOURNAL, FILE_NAME, "config.yaml")
    if "/" not in name and any((folder / mark).is_file() for mark in marks):
        return folder.resolve()
    found = {path.parent.name for mark in marks for path in runs.glob(f"*/{mark}")}
    newest = sorted(found - {"latest"}, reverse=True)[:3]
    hint = f"the newest are {', '.join(newest)}" if newest else "there are none yet"
    raise _Wrong(f"{name}: no such run in {runs}; {hint}")


def _text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise _Wrong(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _Wrong(f"{file} is not UTF-8 text") from error


def _refuse(message: str, code: int) -> int:
    print(f"darwin_exp.hitl: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
