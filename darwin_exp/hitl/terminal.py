"""The terminal's door: requests as a person reads them, and the question that approves one.

Reads: boards and entries; what a person types.
Writes: the terminal.
Never: takes anything but the digits of what was shown for a yes, or passes on control characters
that an agent wrote.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from darwin_exp.hitl.asked import ID_DIGITS, RequestType, Standing, State
from darwin_exp.hitl.concerns import NO_CONCERN, Concern
from darwin_exp.hitl.inbox import Entry
from darwin_exp.hitl.outcomes import Outcomes, in_words
from darwin_exp.hitl.requests import Board
from darwin_exp.unseen import spelt_out
from darwin_exp.wording import clean, duration

HASH_DIGITS = 8  # that a person types
LARGEST_HIGHLIGHTED = 200_000  # characters
MOST_REASON = 160
_STYLES = {
    State.PENDING: "bold yellow",
    State.ASKED_BACK: "yellow",
    State.APPROVED: "green",
    State.CHANGED: "green",
    State.DENIED: "red",
    State.EXPIRED: "red",
    State.REVOKED: "red",
}
_TONES = {"yes": "green", "no": "red", "waiting": "yellow"}


class EditorFailed(Exception):
    """No text came back from the editor; the message says why."""


# --- what is shown ---------------------------------------------------------------------------


def listing(board: Board, now: float, outcomes: Outcomes) -> RenderableType:
    """Return all requests as a table, those that wait first, and what else was said."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column("id", no_wrap=True, min_width=ID_DIGITS)
    for heading in ("type", "asked by", "age", "state"):
        table.add_column(heading, no_wrap=True)
    # The rest of the line, whatever that is: `show` has all of it.
    table.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
    for one in sorted(board.requests.values(), key=lambda one: not one.waits):
        came = outcomes.of_request(one)
        state = Text(came.word, _TONES[came.tone]) if came else Text(_words(one.state))
        state.stylize("" if came else _STYLES[one.state])
        others = len(one.askers) - 1
        table.add_row(
            one.request.request_id,
            one.request.type.value,
            Text(clean(one.askers[0]) + (f" +{others}" if others else "")),
            _age(now - one.asked_at),
            state,
            Text(clean(one.request.reason)[:MOST_REASON]),
        )
    lines = [Text(line) for line in (*_said(board), clean(outcomes.problem)) if line]
    if not board.requests:
        return Group(Text("nobody has asked for anything yet"), *lines)
    n = len(board.waiting)
    waiting = "nothing waits" if not n else f"{n} waiting; read one with: show ID"
    return Group(table, Text(waiting), *lines)


def _age(seconds: float) -> str:
    """Return how old something is, in its largest unit."""
    for unit, word in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds // unit:.0f} {word}"
    return f"{max(0.0, seconds):.0f} s"


def _said(board: Board) -> list[str]:
    lines = []
    if board.is_paused:
        lines.append("the run is paused; `resume` lets it go on")
    for word, marked in (("pinned", board.pins), ("vetoed", board.vetoes)):
        if marked:
            lines.append(clean(f"{word}: {', '.join(marked)}"))
    for key, value in board.budgets.items():
        lines.append(f"budget: {in_words(key, value)}")
    if board.guidance:
        lines.append(f"notes to agents: {len(board.guidance)}")
    if board.refused:
        lines.append(f"entries that do not count: {len(board.refused)}; `verify` shows them")
    return lines


def show(
    console: Console,
    standing: Standing,
    now: float,
    outcomes: Outcomes,
    concern: Concern = NO_CONCERN,
) -> None:
    """Print a request: who asks for what and why, the exact content, and the hash that binds it.

    Args:
        concern: what is to be known of what is asked for, or was granted, before it is carried out.
    """
    request = standing.request
    came = outcomes.of_request(standing)
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("request", request.request_id),
        ("type", request.type.value),
        ("state", _words(standing.state)),
        ("asked by", f"{', '.join(standing.askers)} in generation {request.generation}"),
        ("age", duration(max(0.0, now - standing.asked_at))),
        ("individual", request.patch_of),
        ("reason", request.reason),
        ("expected", request.expected_effect),
        ("last note", standing.note),
        ("came of it", came.sentence if came else outcomes.problem),
    ):
        if value:
            facts.add_row(Text(name, "bold"), Text(clean(value)))
    console.print(facts)
    is_patch = request.type is RequestType.EDIT
    show_content(console, "content", request.content, "diff" if is_patch else None)
    if standing.state is State.CHANGED and standing.granted_content is not None:
        granted = standing.granted_content
        show_content(console, "approved instead", granted, "diff" if is_patch else None)
    if concern.refusal:
        warning = f"warning  as it stands it would be refused: {clean(concern.refusal)}"
        console.print(Text(warning, "bold red"), soft_wrap=True)
    if concern.remark:
        console.print(Text(f"note     {clean(concern.remark)}", "bold yellow"), soft_wrap=True)
    console.print(Text(f"hash     {request.content_hash}"), soft_wrap=True)
    for entry in standing.history[1:]:
        console.print(line_of(entry), soft_wrap=True)


def show_content(console: Console, title: str, content: str, lexer: str | None = None) -> None:
    """Print a text exactly, with what a reader would not see spelt out."""
    shown = spelt_out(content)
    told = title if shown == content else f"{title} (what would not be seen is spelt out)"
    console.rule(Text(told), align="left")
    if console.is_terminal and len(shown) <= LARGEST_HIGHLIGHTED:
        syntax = Syntax(
            shown, lexer or _lexer_of(content), theme="ansi_dark", background_color="default"
        )
        text = syntax.highlight(shown)
        text.rstrip()
        console.print(text, soft_wrap=True)
    else:
        # Not by way of the console, which would turn tabs into spaces.
        console.file.write(shown if shown.endswith("\n") else f"{shown}\n")
    console.rule()


def _lexer_of(content: str) -> str:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        looks_like_code = content.lstrip().startswith(("import ", "from ", "def ", '"""', "#!"))
        return "python" if looks_like_code else "text"
    return "json"


def line_of(entry: Entry) -> Text:
    """Return an entry as one line: when, who, by which door, and what."""
    payload = entry.payload
    words: list[str]
    if entry.kind == "asked":
        words = [str(payload.get("type")), str(payload.get("reason"))[:MOST_REASON]]
    elif entry.kind == "answered":
        words = [str(payload.get("decision")), str(payload.get("note") or "")]
    elif entry.kind == "guided":
        words = [f"to {payload.get('to')}:", str(payload.get("text"))]
    elif entry.kind == "budget":
        words = [f"{payload.get('key')}={payload.get('value')}"]
    else:
        words = [str(payload.get("individual_id") or ""), str(payload.get("note") or "")]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.written_at))
    which = payload.get("request_id")
    who = f"{entry.author.name} ({entry.author.door})"
    parts = [when, f"#{entry.sequence}", entry.kind, str(which or ""), *words, "by", who]
    return Text(clean(" ".join(part for part in parts if part)))


def _words(state: State) -> str:
    return state.value.replace("_", " ")


# --- what is asked of the person -------------------------------------------------------------


def agrees(content_hash: str, ask: Callable[[str], str] = input) -> bool:
    """Ask for the first digits of a hash; whatever else is typed, and no answer, is no."""
    try:
        typed = ask(
            f"Type the first {HASH_DIGITS} digits of the hash to approve what was shown, else no: "
        )
    except EOFError:
        return False
    return typed.strip() == content_hash[:HASH_DIGITS]


def edited(text: str) -> str:
    """Return a text as the person's editor left it.

    Raises:
        EditorFailed: there is no editor, it failed, or it left no text.
    """
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "content.txt")
        file.write_bytes(text.encode())
        try:
            ended = subprocess.run([*command, str(file)], check=False)
            changed = file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise EditorFailed(f"{command[0]}: {error}; set EDITOR to one that works") from error
    if ended.returncode:
        raise EditorFailed(f"{command[0]} ended with {ended.returncode}; nothing was changed")
    return changed
