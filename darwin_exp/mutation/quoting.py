"""Words that are not ours, made fit to stand in a prompt.

Reads: what candidates printed, what models and people wrote.
Writes: quoted lines and single lines.
Never: lets a text leave its place: no control character, no line that passes for a mark of the
prompt, and no more of it than was allowed.
"""

from __future__ import annotations

import re
from typing import Literal

QUOTE = "| "
IMITATION = "[here stood a line that imitates a mark of this prompt]"
NOTHING = "(nothing)"
_LONGEST_LINE = 400
_CHARACTERS_PER_LINE = 40  # a text may have a line for every so many characters allowed
# What terminals obey: colours and cursor moves, titles and links, and two-letter commands.
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_FRAME = r"=== ?(?:file|chunk|end of)\b"  # of a file or a chunk
_MARK = re.compile(rf"{_FRAME}|##+ ")
_KEPT_IN_FRONT = {"start": 1.0, "end": 0.0, "both ends": 1 / 3}

Keep = Literal["start", "end", "both ends"]


def has_mark(text: str) -> bool:
    """Tell whether a line of a text begins like the frame of a file or a chunk in a prompt."""
    return re.search(rf"^\s*{_FRAME}", text, re.MULTILINE) is not None


def one_line(text: str, most: int) -> str:
    """Return a text as one line of at most so many characters."""
    text = " ".join(_printable(_ESCAPE.sub("", text[: 8 * most])).split())
    text = re.sub("={3,}", "==", text)
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def quoted(text: str, most: int, keep: Keep = "start") -> str:
    """Return a text with "| " before each of its lines.

    Args:
        most: characters of it that are kept, at least two lines and at most one line for every 40.
        keep: which part stays where there are more.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    lines = [_harmless(line) for line in shortened(text or NOTHING, most, keep)]
    return "".join(f"{QUOTE}{line}".rstrip() + "\n" for line in lines)


def shortened(text: str, most: int, keep: Keep = "start") -> list[str]:
    """Return the lines of a text, with a note in the place of what is too much."""
    most_lines = max(2, most // _CHARACTERS_PER_LINE)
    if len(text) <= most and text.count("\n") < most_lines:
        return text.split("\n")
    n_head = int(most * _KEPT_IN_FRONT[keep])
    n_head_lines = int(most_lines * _KEPT_IN_FRONT[keep])
    n_tail, n_tail_lines = most - n_head, most_lines - n_head_lines
    head = text[:n_head].split("\n")[:n_head_lines] if n_head_lines else []
    rest = text[len("\n".join(head)) :]
    tail = rest[max(0, len(rest) - n_tail) :].split("\n")[-n_tail_lines:] if n_tail_lines else []
    n_gone = len(text) - len("\n".join(head)) - len("\n".join(tail))
    return [*head, f"[... {n_gone:,} characters are left out here ...]", *tail]


def _harmless(line: str) -> str:
    line = _printable(_ESCAPE.sub("", line).expandtabs(4))
    if _MARK.match(line):
        return IMITATION
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def _printable(text: str) -> str:
    """Return a text in which a space stands for whatever has no shape of its own."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)
