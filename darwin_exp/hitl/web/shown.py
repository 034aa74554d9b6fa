"""Requests and entries as pages show them: every character that an approval covers, visibly.

Reads: standings, entries. Writes: nothing.
Never: shortens a content that may be approved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from markupsafe import Markup, escape

from darwin_exp.hitl.inbox import Author, Entry
from darwin_exp.hitl.outcomes import Outcome, Outcomes
from darwin_exp.hitl.requests import (
    GRANTED,
    HARNESS,
    Refused,
    Request,
    RequestType,
    Standing,
    State,
    check_revocation,
)
from darwin_exp.report.patch import Line
from darwin_exp.unseen import spelt_out

LARGEST_SHOWN = 400_000  # characters; what is longer cannot be read, and so not approved, here
KINDS_IN_WORDS = {
    RequestType.DATASET: "Data set",
    RequestType.SCRIPT: "Training script",
    RequestType.FILE_STRUCTURE: "File structure",
    RequestType.LIBRARY: "Library",
    RequestType.RESOURCES: "Resources",
    RequestType.QUESTION: "Question",
    RequestType.EDIT: "Rewrite to review",
    RequestType.BUDGET: "Budget",
    RequestType.STUCK: "No progress",
    RequestType.QUARANTINE: "Quarantine",
}
STATES_IN_WORDS = {
    State.PENDING: "waits",
    State.ASKED_BACK: "asked back, waits",
    State.APPROVED: "approved",
    State.CHANGED: "something else granted",
    State.DENIED: "denied",
    State.REVOKED: "revoked",
    State.EXPIRED: "expired: silence is no",
}
_AGENT = re.compile(r"g[0-9]{2,}-i[0-9]{2,}")
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Row:
    """One request, worded.

    Attributes:
        agent: the agent that asked; None where the harness did.
        tone: of its pill: waiting, yes or no.
        may_approve: whether a yes would still count.
        may_revoke: whether taking a yes back would.
        is_open: whether it waits.
        outcome: what came of the answer, as far as the run has got.
    """

    request_id: str
    content_hash: str
    kind_in_words: str
    headline: str
    state_in_words: str
    tone: str
    asked_by: str
    agent: str | None
    patch_of: str | None
    generation: int
    reason: str
    expected_effect: str
    asked_at: float
    changed_at: float
    is_open: bool
    may_approve: bool
    is_granted: bool
    may_revoke: bool
    outcome: Outcome | None

    @classmethod
    def of(cls, standing: Standing, outcomes: Outcomes) -> Row:
        """Word a standing."""
        request, state = standing.request, standing.state
        late = state in (State.DENIED, State.EXPIRED) and request.type is not RequestType.EDIT
        first = headline(request)
        return cls(
            request.request_id,
            request.content_hash,
            KINDS_IN_WORDS[request.type],
            first if len(first) <= 110 else f"{first[:109]}…",
            STATES_IN_WORDS[state],
            "waiting" if standing.waits else "yes" if state in GRANTED else "no",
            ", ".join("the run" if name == HARNESS else name for name in standing.askers),
            request.asked_by if _AGENT.fullmatch(request.asked_by) else None,
            request.patch_of,
            request.generation,
            request.reason,
            request.expected_effect,
            standing.asked_at,
            standing.history[-1].written_at,
            standing.waits,
            standing.waits or late,
            state in GRANTED,
            _may_revoke(standing),
            outcomes.of_request(standing),
        )


def _may_revoke(standing: Standing) -> bool:
    try:
        check_revocation(standing)
    except Refused:
        return False
    return True


def headline(request: Request) -> str:
    """Return in a few words what is asked for; the content itself is shown apart, and whole."""
    if request.type is RequestType.EDIT and request.patch_of:
        return request.patch_of
    try:
        told = json.loads(request.content)
    except (ValueError, RecursionError):
        told = None
    words: list[str] = []
    if isinstance(told, dict):
        named = [told.get(name) for name in ("source", "requirement", "key", "value", "path")]
        listed = [told.get(name) for name in ("moves", "files", "removes")]
        words = [str(one) for one in named if isinstance(one, str | int | float)]
        words += [str(path) for paths in listed if isinstance(paths, dict | list) for path in paths]
    first = request.content.strip().partition("\n")[0] if told is None else ""
    return " ".join(words) or first or request.reason or "no words"


@dataclass(frozen=True)
class Part:
    """A piece of a content: as lines of a patch, or as text."""

    name: str
    text: str = ""
    lines: tuple[Line, ...] = ()


def parts(kind: RequestType, content: str) -> list[Part]:
    """Return a content for reading: whole, and then its longer texts as they will be used."""
    if kind is RequestType.EDIT:
        return [Part("the patch", lines=tuple(patch_lines(content)))]
    found = [Part("the whole content", spelt_out(content))]
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return found
    if isinstance(told, dict):
        found += [
            Part(f"its {name}, with line breaks", spelt_out(text))
            for name, text in told.items()
            if isinstance(text, str) and "\n" in text
        ]
    return found


def patch_lines(text: str) -> Iterator[Line]:
    """Yield every line of a text that holds a unified diff, numbered within the hunks.

    Within a hunk only as many lines count as its head says: text that merely looks like a line of
    a patch is shown as text.
    """
    before = after = left_before = left_after = 0
    for line in spelt_out(text).removesuffix("\n").split("\n"):
        head = _HUNK.match(line)
        if left_before <= 0 and left_after <= 0 and head:
            before, after = int(head[1]), int(head[3])
            left_before, left_after = int(head[2] or 1), int(head[4] or 1)
            yield Line("gap", None, None, escape(line))
        elif line.startswith("-") and left_before > 0:
            yield Line("removed", before, None, escape(line[1:]))
            before, left_before = before + 1, left_before - 1
        elif line.startswith("+") and left_after > 0:
            yield Line("added", None, after, escape(line[1:]))
            after, left_after = after + 1, left_after - 1
        elif (not line or line.startswith(" ")) and left_before > 0 and left_after > 0:
            # An empty line whose space an editor has taken is one of the hunk, too.
            yield Line("same", before, after, escape(line[1:]))
            before, left_before = before + 1, left_before - 1
            after, left_after = after + 1, left_after - 1
        else:
            yield Line("same", None, None, Markup("{}").format(line))


@dataclass(frozen=True)
class Told:
    """One entry, worded."""

    sequence: int
    what: str
    author: Author
    written_at: float
    words: str


def told(entries: Iterable[Entry]) -> list[Told]:
    """Word entries."""
    found = []
    for entry in entries:
        payload = entry.payload
        what = entry.kind.replace("_", " ")
        if entry.kind == "answered":
            what = f"answered: {payload.get('decision')}"
        elif entry.kind in ("pinned", "vetoed"):
            what = f"{entry.kind} {payload.get('individual_id')}"
        elif entry.kind == "guided":
            what = f"to {payload.get('to')}"
        elif entry.kind == "budget":
            what = f"{payload.get('key')} = {payload.get('value')}"
        words = str(payload.get("text") or payload.get("note") or "")
        found.append(Told(entry.sequence, what, entry.author, entry.written_at, words))
    return found
