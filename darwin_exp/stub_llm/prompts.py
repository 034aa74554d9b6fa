"""What a prompt holds: the files, the form of the answer, and what went wrong.

Reads: the messages of a request.
Writes: nothing.
Never: takes what is quoted (lines that start with "| ") for anything but a quotation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_FILE = re.compile(
    r"^=== file: (?P<path>[^\n]+?) ===\n(?P<text>.*?)^=== end of (?P=path) ===[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_CHUNK = re.compile(
    r"^=== chunk: (?P<name>(?P<path>[^#\n]+)#\d+)(?: \([^\n]*\))? ===\n"
    r"(?P<text>.*?)^=== end of (?P=name) ===[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_FORM = re.compile(r"^Form: (edits|rewrite|chunk|text)\b", re.MULTILINE)
_STATUS = re.compile(r"^status: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file that is asked for by itself: its file and its source."""

    path: str
    text: str


@dataclass(frozen=True)
class Failure:
    """What a prompt says about a run that failed.

    Attributes:
        status: such as "CRASHED (exception)".
        log: all that is quoted about it: the message, and the end of what the run printed.
    """

    status: str
    log: str


@dataclass(frozen=True)
class Prompt:
    """One request, as far as the stub understands it.

    Attributes:
        files: text of every file that stands in the prompt, by its path.
        form: "edits", "rewrite", "chunk" or "text" (edits as blocks of conflict markers).
        chunk: the piece that is asked for, in that form.
        failure: what a repair is asked for; None where a first draft is.
        objected: whether an earlier answer was turned down.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    form: str = "edits"
    chunk: Chunk | None = None
    failure: Failure | None = None
    objected: bool = False

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], form: str = "edits") -> Prompt:
        """Read the messages of a request.

        Args:
            form: of the answer where the prompt does not name one.
        """
        roles = [message.get("role") for message in messages]
        first_answer = roles.index("assistant") if "assistant" in roles else len(roles)
        text = "\n".join(text_of(message) for message in messages[:first_answer])
        text = text.replace("\r\n", "\n")
        # Without the files, whose comments may look like headings.
        prose = _CHUNK.sub("", _FILE.sub("", text))
        asked = _section(prose, "Your answer") or ""
        forms = _FORM.findall(asked) or _FORM.findall(prose)
        return cls(
            files={match["path"]: match["text"] for match in _FILE.finditer(text)},
            form=forms[-1] if forms else form,
            chunk=_asked_chunk(text, asked),
            failure=_failure(prose),
            objected="user" in roles[first_answer:]
            or _section(prose, "Why an earlier rewrite was turned down") is not None,
        )


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content is a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def _section(prose: str, title: str) -> str | None:
    match = re.search(rf"^## {title}[^\n]*\n(.*?)(?=^## |\Z)", prose, re.DOTALL | re.MULTILINE)
    return match[1] if match else None


def _failure(prose: str) -> Failure | None:
    section = _section(prose, "What went wrong")
    if section is None:
        return None
    status = _STATUS.search(section)
    quoted = [line[2:] for line in section.splitlines() if line == "|" or line.startswith("| ")]
    return Failure(status[1].strip() if status else "", "\n".join(quoted))


def _asked_chunk(text: str, asked: str) -> Chunk | None:
    """Return the chunk that the last section names, or else the last one."""
    chunks = {match["name"]: Chunk(match["path"], match["text"]) for match in _CHUNK.finditer(text)}
    named = [name for name in chunks if re.search(rf"{re.escape(name)}\b", asked)]
    names = named or list(chunks)
    return chunks[names[-1]] if names else None
