"""Answers of language models: the forms they may have, and how they are read.

Reads: the text of an answer.
Writes: the same as typed, bounded values.
Never: uses half of an answer, runs anything in it, or trusts a length.

Servers differ: some keep to a JSON schema, some write prose around the object or put it into a
fence, some think aloud first. All of that is read; what is not there is asked for again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from darwin_exp.individual import Reason
from darwin_exp.mutation.quoting import one_line
from darwin_exp.mutation.rewriting import FileEdit
from darwin_exp.protocols import EditFailed

FORMS = ("edits", "rewrite", "chunk", "text")
REQUEST_TYPES = ("dataset", "script", "file_structure", "library", "resources", "question")
MOST_SUMMARY = 200  # characters, as of the expected effect
MOST_EDITS = 50
MOST_REQUESTS = 5
_MOST_ANSWER = 400_000  # characters: twice what a genome's source may have
_MOST_WORDS = 20_000  # of reasoning
_MOST_REASON = 2_000
_MOST_CONTENT = 50_000  # of a request, cut nowhere: half a file is none
_NO_OBJECT = "the answer holds no JSON object"
_MOST_STARTS = 200  # braces at which an object is looked for
_PAYLOADS = {"edits": "edits", "rewrite": "files", "chunk": "text", "text": "edits"}

_THOUGHT = re.compile(r"\s*<(think|thinking)>.*?</\1>", re.DOTALL)
_WHOLE_FILE = re.compile(
    r"^=== file: (.+?) ===\n(.*?)^=== end of \1 ===$", re.DOTALL | re.MULTILINE
)
_FENCE = re.compile(r"^```[\w+-]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
_NAMED_LINE = r"^[^\w\n]*{}[^\w\n]*:[^\w\n]*(.+)$"
_PATH_LINE = re.compile(
    r"[^\w./-]*(?:file[^\w./-]+)?([\w./-]+\.(?:py|json|toml|ya?ml|txt))[^\w./-]*", re.I
)
_SEARCH, _MIDDLE, _REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"


@dataclass(frozen=True)
class Answer:
    """What a language model answered, read.

    Attributes:
        reasoning: how it got there, for people.
        summary: one line for memory.
        expected_effect: one line; empty where it did not say.
        edits: of the forms "edits" and "text".
        files: whole texts by path, of the form "rewrite".
        text: the new source, of the form "chunk".
        requests: what it asks people for.
    """

    reasoning: str
    summary: str
    expected_effect: str
    edits: tuple[FileEdit, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    requests: tuple[Mapping[str, str], ...] = ()

    @property
    def changes(self) -> tuple[FileEdit, ...]:
        """Its edits; a whole file is an edit with an empty search."""
        return (*self.edits, *(FileEdit(path, "", text) for path, text in self.files))


def schema_of(form: str) -> Mapping[str, Any] | None:
    """Return the JSON schema of a form; None for free text.

    Every property is required and no other allowed: strict servers take nothing else.

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"an answer's form is one of {', '.join(FORMS)}, not {form!r}")
    if form == "text":
        return None
    payload = {
        "edits": _list_of(_object({"file": _TEXT, "search": _TEXT, "replace": _TEXT})),
        "rewrite": _list_of(_object({"file": _TEXT, "text": _TEXT})),
        "chunk": _TEXT,
    }[form]
    kind = {"type": "string", "enum": list(REQUEST_TYPES)}
    request = _object({"type": kind, "reason": _TEXT, "content": _TEXT})
    properties = {
        "reasoning": _TEXT,
        "summary": _TEXT,
        "expected_effect": _TEXT,
        _PAYLOADS[form]: payload,
        "requests": _list_of(request),
    }
    return {"title": form, **_object(properties)}


_TEXT: Mapping[str, Any] = {"type": "string"}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


# --- reading ----------------------------------------------------------------------------------


def read_answer(text: str, form: str) -> Answer:
    """Read an answer: JSON however it is wrapped, or the fenced text that stands for it.

    Keys that nobody asked for are ignored. Without "reasoning", "expected_effect" or "requests"
    an answer is still of use; without a summary or a change it is not.

    Raises:
        EditFailed: it is not of that form (MALFORMED), with a sentence that says what to mend.
    """
    if len(text) > _MOST_ANSWER:
        raise _malformed(f"the answer has {len(text):,} characters; {_MOST_ANSWER:,} may do")
    text = _without_thoughts(text)
    if form == "text" and _SEARCH in text and (answer := _from_text(text, form)) is not None:
        return answer
    found, complaint = _objects(text)
    fitting = [(content, end) for content, end in found if _PAYLOADS[form] in content]
    if fitting:
        content, end = fitting[-1]
        if re.search(rf'"{_PAYLOADS[form]}"\s*:', text[end:]):
            raise _malformed(complaint)  # a later answer, which is what it meant, is broken
        return _from_object(content, form)
    if not text.lstrip().startswith("{") and (answer := _from_text(text, form)) is not None:
        return answer
    if found and complaint == _NO_OBJECT:  # it can be read, and is something else
        keys = one_line(", ".join(found[-1][0]), 120) or "none"
        raise _malformed(
            f'the JSON object of the answer has no "{_PAYLOADS[form]}"; its keys are {keys}'
        )
    raise _malformed(complaint)


def _without_thoughts(text: str) -> str:
    """Drop what a model thought aloud before it answered."""
    if (thought := _THOUGHT.match(text)) is not None:
        return text[thought.end() :]
    if text.lstrip().startswith(("<think>", "<thinking>")):
        raise _malformed("the answer never came to an end of its thinking")
    _, mark, after = text.rpartition("</think>")
    # Some servers swallow the opening mark. Within an object it would be a part of some text.
    is_thought = not text.lstrip().startswith(("{", "```")) and ("{" in after or _SEARCH in after)
    return after if mark and is_thought else text


def _objects(text: str) -> tuple[list[tuple[dict[str, Any], int]], str]:
    """Return the JSON objects in a text, where each ends, and what is wrong with the others."""
    decoder = json.JSONDecoder(strict=False)  # line breaks within strings: models write them
    found: list[tuple[dict[str, Any], int]] = []
    complaint, furthest = _NO_OBJECT, -1
    place = text.find("{")
    for _ in range(_MOST_STARTS):
        if place < 0:
            break
        try:
            content, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            if error.pos > furthest:
                furthest = error.pos
                near = one_line(text[max(0, error.pos - 30) : error.pos + 10], 60)
                complaint = f"its JSON cannot be read: {error.msg}, near {near!r}"
            place = text.find("{", place + 1)
        except (ValueError, RecursionError):  # a number of thousands of digits; too deep
            complaint, place = "its JSON cannot be read", text.find("{", place + 1)
        else:
            found.append((content, end))
            place = text.find("{", end)
    return found, complaint


def _from_object(content: Mapping[str, Any], form: str) -> Answer:
    # Of no use to the change itself: whatever is wrong with them costs nobody an answer.
    words = {
        name: value if isinstance(value := content.get(name), str) else ""
        for name in ("reasoning", "expected_effect")
    }
    edits: tuple[FileEdit, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    text = None
    if form in ("edits", "text"):
        entries = _entries(content, "edits", MOST_EDITS)
        edits = tuple(
            FileEdit(*(_string(entry, name) for name in ("file", "search", "replace")))
            for entry in entries
        )
    elif form == "rewrite":
        entries = _entries(content, "files", MOST_EDITS)
        files = tuple((_string(entry, "file"), _string(entry, "text")) for entry in entries)
    else:
        text = _unfenced(_string(content, "text"))
        if not text.strip():
            raise _malformed(
                '"text" is empty: to leave the chunk unchanged, return it as it stands'
            )
    return Answer(
        reasoning=_encodable(words["reasoning"][:_MOST_WORDS]),
        summary=_summary(_string(content, "summary")),
        expected_effect=one_line(_encodable(words["expected_effect"]), MOST_SUMMARY),
        edits=edits,
        files=files,
        text=text,
        requests=tuple(_requests(content)),
    )


def _requests(content: Mapping[str, Any]) -> Iterable[Mapping[str, str]]:
    """Yield what people are asked for; what is none of it, or too long, is passed over."""
    asked = content.get("requests")
    for entry in (asked if isinstance(asked, list) else [])[:MOST_REQUESTS]:
        if not isinstance(entry, dict) or entry.get("type") not in REQUEST_TYPES:
            continue
        reason, what = entry.get("reason"), entry.get("content")
        if isinstance(reason, str) and isinstance(what, str) and len(what) <= _MOST_CONTENT:
            told = {"reason": reason[:_MOST_REASON], "content": what}
            yield {"type": str(entry["type"]), **{k: _encodable(v) for k, v in told.items()}}


def _unfenced(source: str) -> str:
    """Return source without the fence that some put around it."""
    found = _FENCE.fullmatch(source.strip("\n") + "\n") or _FENCE.fullmatch(source.strip())
    return found[1] if found else source


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _entries(content: Mapping[str, Any], name: str, most: int) -> list[Mapping[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _malformed(f'"{name}" must be a list of objects')
    if len(entries) > most:
        raise _malformed(f'"{name}" holds {len(entries)} entries; {most} may do')
    return entries


def _string(content: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = content.get(name, default)
    if not isinstance(value, str):
        raise _malformed(f'"{name}" is missing' if value is None else f'"{name}" must be a string')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _malformed(f'"{name}" holds half a character (a lone surrogate)') from error
    return value


def _summary(text: str) -> str:
    summary = one_line(text, MOST_SUMMARY)
    if not summary:
        raise _malformed('"summary" is empty: say in one line what the change is')
    return summary


# --- text without JSON --------------------------------------------------------------------------


def _from_text(text: str, form: str) -> Answer | None:
    """Read the fenced forms; None where the text holds nothing of the kind.

    Edits stand in blocks of conflict markers, each below a line with the file's path.
    Source: the search/replace blocks of Aider.
    """
    text = text.replace("\r\n", "\n")
    edits: tuple[FileEdit, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    source = None
    if form in ("edits", "text"):
        edits = tuple(_blocks(text))
    elif form == "rewrite" and text.count("=== file:") <= MOST_EDITS:
        files = tuple(_WHOLE_FILE.findall(text))
        if files and len(files) != text.count("=== file:"):
            raise _malformed('a file is not closed by its "=== end of NAME ==="')
    elif form == "chunk" and text.count("```") == 2 and (fence := _FENCE.search(text)):
        source = fence[1]
    if len(edits) > MOST_EDITS:
        raise _malformed(f"the answer holds more than {MOST_EDITS} edits")
    if not edits and not files and source is None:
        return None
    before = re.split(r"^(?:<<<<<<<|=== file:|```)", text, maxsplit=1, flags=re.MULTILINE)[0]
    content = {
        "summary": _named(text, "summary"),
        "expected_effect": _named(text, "expected[ _]effect"),
    }
    return Answer(
        reasoning=before.strip()[:_MOST_WORDS],
        summary=_summary(_string(content, "summary")),
        expected_effect=one_line(_string(content, "expected_effect"), MOST_SUMMARY),
        edits=edits,
        files=files,
        text=source,
    )


def _named(text: str, name: str) -> str:
    found = re.search(_NAMED_LINE.format(name), text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""


def _blocks(text: str) -> Iterable[FileEdit]:
    file, part = "", ""
    search: list[str] = []
    replace: list[str] = []
    for line in text.split("\n"):
        bare = line.rstrip()
        if part == "":
            if bare.startswith(("<<<<<<<", ">>>>>>>")) and bare != _SEARCH:
                raise _malformed(f'{one_line(bare, 60)!r} is no mark of a block; use "{_SEARCH}"')
            if bare == _SEARCH:
                if not file:
                    raise _malformed("a SEARCH block has no line with its file's path before it")
                part, search, replace = "search", [], []
            elif (path := _PATH_LINE.fullmatch(bare)) is not None:
                file = path[1]
        elif bare.startswith("<<<<<<<"):
            raise _malformed("a SEARCH block begins within another")
        elif part == "search":
            if bare == _MIDDLE:
                part = "replace"
            else:
                search.append(f"{line}\n")
        elif bare == _REPLACE:
            yield FileEdit(file, "".join(search), "".join(replace))
            part = ""
        else:
            replace.append(f"{line}\n")
    if part:
        raise _malformed(f'a block is not closed by "{_REPLACE}"')


def _malformed(message: str) -> EditFailed:
    return EditFailed(Reason.MALFORMED, message, again=True)
