"""Fits a prompt into so many tokens: what must be told is told, the rest as far as there is room.

Reads: sections of text, and a counter of tokens.
Writes: a prompt, and a list of what it leaves out.
Never: drops anything without naming it, or knows what a section is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from darwin_exp.genome import lines_of
from darwin_exp.individual import Reason
from darwin_exp.protocols import EditFailed, Message

MESSAGE_TOKENS = 8  # that an endpoint puts around each message, at most
MOST_OVERRUN = 2  # times the budget that what must be told may take
_ENTRY_SLACK = 4  # tokens by which the digits of one number can cost more than another's


class Tokens(Protocol):
    """Counts tokens; what it counts adds up over lines."""

    def count(self, text: str) -> int:
        """Return how many tokens a text has."""
        ...

    def cut(self, text: str, n_tokens: int) -> str:
        """Return as many whole lines from the start of a text as fit."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What a language model is asked.

    Attributes:
        messages: a system message and a user message.
        left_out: what there was no room for, a few words each.
        n_tokens: what it takes, by the counter that it was fitted with.
    """

    messages: tuple[Message, ...]
    left_out: tuple[str, ...]
    n_tokens: int


@dataclass(frozen=True)
class Material:
    """A section that may be cut short or left out.

    Attributes:
        name: what it is called where it is said to be missing.
        head: its heading and introduction.
        body: lines, the most useful first.
        rank: the lowest is served first.
        share: of the room that all materials have, before what others leave is handed out.
        unit: what one line of it is.
        least: fewer lines than that are of no use.
        shown_first: lines that stand before the others, whatever their use.
    """

    name: str
    head: str
    body: str
    rank: int
    share: float = 1.0
    unit: str = "lines"
    least: int = 1
    shown_first: frozenset[str] = frozenset()

    @property
    def n_lines(self) -> int:
        return self.body.count("\n")

    def text(self, body: str) -> str:
        """Return the section with as much of its body as is kept; nothing without any."""
        lines = lines_of(body)
        ordered = sorted(lines, key=lambda line: line not in self.shown_first)
        return self.head + "".join(ordered) + "\n" if lines else ""


def fitted(
    system: str,
    sections: Sequence[str | Material],
    answer: str,
    budget_tokens: int,
    count: Tokens,
) -> Prompt:
    """Return a prompt of at most `budget_tokens`, if what must be told leaves room for anything.

    Sections given as text are always told, materials as far as they fit. Where what must be told
    is too much by itself, it is told nevertheless and nothing else is: a model's window is mostly
    wider than the budget, and code that outgrew the budget a little still deserves its rewrite.

    Raises:
        EditFailed: what must be told takes more than twice the budget.
    """
    fixed = [system, answer, *(part for part in sections if isinstance(part, str))]
    n_fixed = sum(map(count.count, fixed)) + 2 * MESSAGE_TOKENS
    if n_fixed > MOST_OVERRUN * budget_tokens:
        raise EditFailed(
            Reason.NOTHING_TO_EDIT,
            f"contract and code alone take {n_fixed:,} tokens of a prompt that may have "
            f"{budget_tokens:,}",
        )
    materials = sorted(
        (part for part in sections if isinstance(part, Material)), key=lambda part: part.rank
    )
    kept = {part.name: part.body for part in materials}
    room = budget_tokens - n_fixed
    if not _all_fit(materials, room, count):
        # Room for either way in which each of them may be said to be missing.
        entries = [_missing(part, body) for part in materials for body in ("", part.body)]
        room -= count.count(_left_out_section(entries)) + _ENTRY_SLACK * len(materials)
        kept = _cut(materials, room, count)
    left_out = tuple(
        _missing(part, kept[part.name]) for part in materials if kept[part.name] != part.body
    )
    told = [part if isinstance(part, str) else part.text(kept[part.name]) for part in sections]
    user = "".join(told) + _left_out_section(left_out) + answer
    messages = (Message("system", system), Message("user", user))
    n_tokens = sum(count.count(message.text) + MESSAGE_TOKENS for message in messages)
    return Prompt(messages, left_out, n_tokens)


def _all_fit(materials: Sequence[Material], room: int, count: Tokens) -> bool:
    """Tell whether there is room for everything; of what is far too long little is counted."""
    for part in materials:
        room -= count.count(f"{part.head}\n")
        if count.cut(part.body, room) != part.body:
            return False
        room -= count.count(part.body)
    return room >= 0


def _cut(materials: Sequence[Material], room: int, count: Tokens) -> dict[str, str]:
    """Return how much of each material is kept: first by its share, then whatever is left."""
    kept = {part.name: "" for part in materials}
    for by_share in (True, False):
        for part in materials:
            others = (other for other in materials if other is not part)
            free = room - sum(count.count(other.text(kept[other.name])) for other in others)
            if by_share:
                free = min(free, int(room * part.share))
            body = count.cut(part.body, free - count.count(f"{part.head}\n"))
            enough = body.count("\n") >= min(part.least, part.n_lines)
            kept[part.name] = body if enough else ""
    return kept


def _missing(part: Material, kept: str) -> str:
    n = part.n_lines
    if not kept:
        return f"{part.name} ({n:,} {part.unit})"
    return f"{n - kept.count(chr(10)):,} of {n:,} {part.unit} of {part.name}"


def _left_out_section(left_out: Sequence[str]) -> str:
    if not left_out:
        return ""
    entries = "".join(f"- {what}\n" for what in left_out)
    return f"## What was left out\n\nThere was no room for:\n{entries}\n"
