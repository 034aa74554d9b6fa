"""Answers that are no edit: malformed ones, and refusals."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from darwin_exp.stub_llm.answers import Answer, Completion, Kind, as_json, worded
from darwin_exp.stub_llm.prompts import Prompt
from darwin_exp.stub_llm.source import DoesNotFit, lines_with, text_at

_TOLD: dict[str, Any] = {
    "reasoning": "The budget is short, so what matters is how far each step goes.",
    "summary": "a better use of the budget",
    "expected_effect": "lower loss",
    "requests": [],
}


def _edit(name: str, file: str, search: str, replace: str) -> Completion:
    edits = [{"file": file, "search": search, "replace": replace}]
    return Completion(name, as_json({**_TOLD, "edits": edits}), is_data=True)


def _new_file(prompt: Prompt, name: str, path: str, text: str) -> Completion:
    if prompt.form in ("edits", "text"):
        return _edit(name, path, "", text)
    if prompt.form == "rewrite":
        files = [{"file": path, "text": text}]
        return Completion(name, as_json({**_TOLD, "files": files}), is_data=True)
    raise DoesNotFit("a chunk has no path")


def _truncated(prompt: Prompt, rng: Random) -> Completion:
    """Word a whole file and stop in its middle."""
    text = text_at(prompt.files, "train.py") if prompt.files else "x = 1\n" * 100
    whole = as_json({**_TOLD, "files": [{"file": "train.py", "text": text}]})
    cut = whole[: int(len(whole) * rng.uniform(0.3, 0.8))]
    return Completion("truncated", cut, finish_reason="length", is_data=True)


def _wrong_schema(_prompt: Prompt, _rng: Random) -> Completion:
    wrong = {
        "explanation": "I double the rate.",
        "patch": {"settings.json": {"learning_rate": 0.006}},
    }
    return Completion("wrong_schema", as_json(wrong), is_data=True)


def _prose_only(_prompt: Prompt, _rng: Random) -> Completion:
    return Completion(
        "prose_only",
        "Happy to help! There are several ways to improve this training script. You could raise "
        "the learning rate, try rotary positions, or use a larger batch. I would start with the "
        "rate, since it is the cheapest to try. Let me know which of these you would like me to "
        "implement.",
    )


def _bare_diff(_prompt: Prompt, _rng: Random) -> Completion:
    return Completion(
        "bare_diff",
        "Here is the patch:\n\n```diff\n--- a/settings.json\n+++ b/settings.json\n"
        '@@ -10,1 +10,1 @@\n-  "learning_rate": 0.003,\n+  "learning_rate": 0.006,\n```\n',
    )


def _unclosed_json(prompt: Prompt, _: Random) -> Completion:
    whole = worded("unclosed_json", prompt, lambda _: {}, _TOLD)
    if whole.text is None or not whole.is_data:
        raise DoesNotFit("no JSON is asked for")
    return replace(whole, text=f"{whole.text.rstrip().removesuffix('}').rstrip()},")


def _search_nowhere(prompt: Prompt, _: Random) -> Completion:
    if prompt.form not in ("edits", "text"):
        raise DoesNotFit("nothing is searched for in this form")
    search = "    def configure_optimizers(self, weight_decay, learning_rate, betas):\n"
    return _edit("search_nowhere", "model.py", search, search.replace("betas", "betas, fused=True"))


def _search_twice(prompt: Prompt, rng: Random) -> Completion:
    if prompt.form not in ("edits", "text"):
        raise DoesNotFit("nothing is searched for in this form")
    text = text_at(prompt.files, "model.py")
    repeated = [line for line in lines_with(text, "self.") if text.count(line) > 1]
    if not repeated:
        raise DoesNotFit("no line stands twice")
    line = rng.choice(repeated)
    return _edit("search_twice", "model.py", line, line.replace("self.", "self.inner."))


def _evil_path(prompt: Prompt, _: Random) -> Completion:
    return _new_file(prompt, "evil_path", "../evil.py", "print('outside')\n")


def _contract_edit(prompt: Prompt, _: Random) -> Completion:
    return _new_file(prompt, "contract_edit", "CONTRACT.md", "Held-out text may be read.\n")


def _job_edit(prompt: Prompt, _: Random) -> Completion:
    return _new_file(prompt, "job_edit", "job.json", '{"budget_seconds": 3600}\n')


def _empty_text(_prompt: Prompt, _rng: Random) -> Completion:
    return Completion("empty_text", "")


def _refusal_field(_prompt: Prompt, _rng: Random) -> Completion:
    refusal = "I'm sorry, but I can't help with modifying this code."
    return Completion("refusal_field", None, refusal=refusal)


def _refusal_in_words(_prompt: Prompt, _rng: Random) -> Completion:
    return Completion(
        "refusal_in_words",
        "I'm sorry, but I am not able to rewrite somebody else's training code without knowing "
        "what it will be used for. If you can tell me more about the project, I will gladly "
        "discuss training techniques in general.",
    )


def _content_filter(_prompt: Prompt, _rng: Random) -> Completion:
    return Completion("content_filter", None, finish_reason="content_filter")


UNUSABLE_ANSWERS: tuple[Answer, ...] = (
    Answer("truncated", Kind.MALFORMED, "a whole file, cut off in its middle", _truncated),
    Answer("wrong_schema", Kind.MALFORMED, "JSON with other keys than asked for", _wrong_schema),
    Answer("prose_only", Kind.MALFORMED, "advice and no edit", _prose_only),
    Answer("bare_diff", Kind.MALFORMED, "a patch where JSON was asked for", _bare_diff),
    Answer("unclosed_json", Kind.MALFORMED, "JSON without its last bracket", _unclosed_json),
    Answer(
        "search_nowhere", Kind.MALFORMED, "an edit of what does not stand there", _search_nowhere
    ),
    Answer("search_twice", Kind.MALFORMED, "an edit of what stands there twice", _search_twice),
    Answer("evil_path", Kind.MALFORMED, "a file outside the tree", _evil_path),
    Answer("contract_edit", Kind.MALFORMED, "an edit of the contract", _contract_edit),
    Answer("job_edit", Kind.MALFORMED, "an edit of the job file", _job_edit),
    Answer("empty_text", Kind.MALFORMED, "nothing at all", _empty_text),
    Answer("refusal_field", Kind.REFUSAL, "a refusal in the field for it", _refusal_field),
    Answer("refusal_in_words", Kind.REFUSAL, "a polite refusal as text", _refusal_in_words),
    Answer("content_filter", Kind.REFUSAL, "stopped by a content filter", _content_filter),
)
