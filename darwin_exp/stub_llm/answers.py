"""What an answer is, and how a change of files is worded in the form that a prompt asks for.

Reads: a prompt.
Writes: the text of an answer.
Never: decides which answer is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from random import Random
from typing import Any

from darwin_exp.stub_llm.prompts import Chunk, Prompt
from darwin_exp.stub_llm.source import Code, DoesNotFit, Files, Replacement, replacements

Change = Callable[[Code], dict[str, str]]
Request = dict[str, str]


class Kind(Enum):
    """What an answer is good for."""

    GOOD = "good"  # a sensible change that runs
    USELESS = "useless"  # can be read and applied, and changes nothing that matters
    MALFORMED = "malformed"  # cannot be read, applied or allowed
    REFUSAL = "refusal"
    BROKEN = "broken"  # applies, and then the code fails
    REPAIR = "repair"  # the right cure
    WRONG_REPAIR = "wrong repair"


@dataclass(frozen=True)
class Completion:
    """What goes over the wire as the model's answer.

    Attributes:
        answer: name of the answer that was given.
        text: its content; None where there is none.
        finish_reason: as OpenAI's protocol words it.
        refusal: content of the message's own field for refusals.
        is_data: whether the text is JSON, which a server without formats puts into a fence.
    """

    answer: str
    text: str | None
    finish_reason: str = "stop"
    refusal: str | None = None
    is_data: bool = False


@dataclass(frozen=True)
class Answer:
    """A hand-written answer: `write` words it for a prompt, or raises DoesNotFit."""

    name: str
    kind: Kind
    summary: str
    write: Callable[[Prompt, Random], Completion]
    change: Change | None = None


def changes(
    name: str,
    kind: Kind,
    summary: str,
    why: str,
    hope: str = "",
    requests: Sequence[Request] = (),
) -> Callable[[Change], Answer]:
    """Make a function that changes files into an answer.

    The function returns the files that it changed, and raises DoesNotFit where it has no place
    in the code.
    """

    def answer_with(change: Change) -> Answer:
        def write(prompt: Prompt, rng: Random) -> Completion:
            told = {
                "reasoning": why,
                "summary": summary,
                "expected_effect": hope,
                "requests": list(requests),
            }
            return worded(name, prompt, lambda files: change(Code(files, rng)), told)

        return Answer(name, kind, summary, write, change)

    return answer_with


def worded(
    name: str, prompt: Prompt, change: Callable[[Files], dict[str, str]], told: Mapping[str, Any]
) -> Completion:
    """Return an answer that makes a change, in the form that was asked for.

    Raises:
        DoesNotFit: the change has no place in the files, or not within the chunk.
    """
    if prompt.form == "chunk":
        if prompt.chunk is None:
            raise DoesNotFit("a chunk is asked for, and none is shown")
        text = _within(prompt.chunk, prompt.files, change)
        return Completion(name, as_json({**told, "text": text}), is_data=True)
    changed = change(prompt.files)
    told = {**told, "summary": _with_values(str(told["summary"]), prompt.files, changed)}
    if prompt.form == "rewrite":
        files = [{"file": path, "text": text} for path, text in changed.items()]
        return Completion(name, as_json({**told, "files": files}), is_data=True)
    edits = [
        edit
        for path, text in changed.items()
        for edit in replacements(path, prompt.files.get(path, ""), text)
    ]
    if prompt.form == "text":
        return Completion(name, _as_blocks(told, edits))
    return Completion(name, as_json({**told, "edits": [asdict(e) for e in edits]}), is_data=True)


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _as_blocks(told: Mapping[str, Any], edits: Sequence[Replacement]) -> str:
    lines = [
        str(told["reasoning"]),
        "",
        f"Summary: {told['summary']}",
        f"Expected effect: {told['expected_effect']}",
    ]
    for edit in edits:
        body = f"<<<<<<< SEARCH\n{edit.search}=======\n{edit.replace}>>>>>>> REPLACE"
        lines += ["", f"file: {edit.file}", body]
    return "\n".join(lines) + "\n"


def _within(chunk: Chunk, files: Files, change: Callable[[Files], dict[str, str]]) -> str:
    """Return a chunk's new source; raises DoesNotFit if the change reaches beyond the chunk."""
    whole = files.get(chunk.path, "")
    if whole.count(chunk.text) != 1:
        # Only the chunk is known, so it has to do as the file.
        return change({chunk.path: chunk.text}).get(chunk.path, chunk.text)
    changed = change(files)
    if not changed:
        return chunk.text
    start, end = whole.split(chunk.text)
    new = changed.get(chunk.path, "")
    fits = new.startswith(start) and new.endswith(end) and len(new) >= len(start) + len(end)
    if set(changed) != {chunk.path} or not fits:
        raise DoesNotFit("the change reaches beyond the chunk")
    return new[len(start) : len(new) - len(end)]


def _with_values(summary: str, files: Files, changed: Files) -> str:
    """Return a summary that says which settings changed, and from what to what."""
    try:
        old = json.loads(files.get("settings.json", ""))
        new = json.loads(changed["settings.json"])
        values = [
            f"{name} {old.get(name)} -> {value}"
            for name, value in new.items()
            if old.get(name) != value
        ]
    except (KeyError, ValueError, AttributeError):
        return summary  # no settings are shown, or none are changed
    return f"{summary} ({', '.join(values)})" if values else summary
