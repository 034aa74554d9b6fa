"""Answers: what is read of them, however they are wrapped, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import Reason
from darwin_exp.mutation.answer import (
    FORMS,
    MOST_SUMMARY,
    REQUEST_TYPES,
    Answer,
    read_answer,
    schema_of,
)
from darwin_exp.mutation.answer_forms import FORM_TEXTS
from darwin_exp.mutation.rewriting import FileEdit
from darwin_exp.protocols import EditFailed

EDIT = {"file": "train.py", "search": "a = 1\n", "replace": "a = 2\n"}
WORDS = {
    "reasoning": "because",
    "summary": "a is 2",
    "expected_effect": "lower loss",
    "requests": [],
}
CONTENT: dict[str, dict[str, Any]] = {
    "edits": {**WORDS, "edits": [EDIT]},
    "rewrite": {**WORDS, "files": [{"file": "train.py", "text": "a = 2\n"}]},
    "chunk": {**WORDS, "text": "a = 2\n"},
    "text": {**WORDS, "edits": [EDIT]},
}
READ = Answer("because", "a is 2", "lower loss", (FileEdit("train.py", "a = 1\n", "a = 2\n"),))
BLOCKS = """\
I change one number.

Summary: a is 2
Expected effect: lower loss

file: train.py
<<<<<<< SEARCH
a = 1
=======
a = 2
>>>>>>> REPLACE
"""


def answer(form: str = "edits", **changed: Any) -> str:
    return json.dumps({**CONTENT[form], **changed})


def complaint_about(text: str, form: str = "edits") -> str:
    """Return why an answer was refused, after checking that it may be mended."""
    with pytest.raises(EditFailed) as refusal:
        read_answer(text, form)
    assert refusal.value.reason is Reason.MALFORMED
    assert refusal.value.again
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300
    return str(refusal.value)


# --- forms ------------------------------------------------------------------------------------


def objects_in(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, list):
        return [found for part in schema for found in objects_in(part)]
    if not isinstance(schema, dict):
        return []
    below = [found for part in schema.values() for found in objects_in(part)]
    return [schema, *below] if schema.get("type") == "object" else below


@pytest.mark.parametrize("form", ["edits", "rewrite", "chunk"])
def test_schemas_are_such_as_strict_servers_take(form: str) -> None:
    schema = schema_of(form)
    assert schema is not None
    assert schema["title"] == form
    for found in objects_in(schema):
        assert found["required"] == list(found["properties"])
        assert found["additionalProperties"] is False
    assert schema["properties"].keys() == CONTENT[form].keys()
    json.dumps(schema)


def test_the_schemas_of_calls_do_not_share_what_could_be_changed() -> None:
    one = schema_of("edits")
    assert one is not None
    one["properties"]["reasoning"] = 3
    assert schema_of("edits") != one


def test_free_text_has_no_schema_and_there_are_no_other_forms() -> None:
    assert schema_of("text") is None
    with pytest.raises(ValueError, match="one of edits, rewrite, chunk, text"):
        schema_of("poem")


@pytest.mark.parametrize("form", FORMS)
def test_what_a_model_is_told_names_every_key_that_is_read(form: str) -> None:
    if (schema := schema_of(form)) is not None:
        for key in schema["properties"]:
            assert f'"{key}"' in FORM_TEXTS[form]
        for kind in REQUEST_TYPES:
            assert kind in FORM_TEXTS[form]


# --- what is read -----------------------------------------------------------------------------


def test_each_form_gives_its_own_changes() -> None:
    assert read_answer(answer("edits"), "edits") == READ
    rewrite = read_answer(answer("rewrite"), "rewrite")
    assert rewrite.files == (("train.py", "a = 2\n"),)
    assert rewrite.changes == (FileEdit("train.py", "", "a = 2\n"),)
    assert read_answer(answer("chunk"), "chunk").text == "a = 2\n"


@pytest.mark.parametrize(
    "text",
    [
        answer(),
        json.dumps(CONTENT["edits"], indent=2),
        f"```json\n{answer()}\n```",
        f"```\n{answer()}\n```\nI hope that this helps {{you}}.",
        f"Certainly! Here is my answer, with {{braces}}:\n\n{answer()}\n",
        f"<think>\nMaybe {answer(summary='something else')}?\n</think>\n{answer()}",
        f"Hm, let me think aloud.\n</think>\n\n{answer()}",
        f"First thought: {answer(summary='something else')} but no: {answer()}",
        answer(confidence=0.9, notes={"edits": []}),
        f'{{"scratch": [1, 2]}}\n{answer()}',
        f"\ufeff{answer()}",
        BLOCKS.replace("I change one number.", "because"),
        BLOCKS.replace("I change one number.", "because").replace("\n", "\r\n"),
    ],
)
def test_an_answer_is_read_however_it_is_wrapped(text: str) -> None:
    read = read_answer(text, "edits")
    assert (read.summary, read.expected_effect) == (READ.summary, READ.expected_effect)
    assert read.edits == READ.edits
    assert "because" in read.reasoning


def test_line_breaks_within_strings_are_read_as_they_stand() -> None:
    text = answer().replace("\\n", "\n")
    assert read_answer(text, "edits") == READ


def test_code_that_looks_like_a_fence_or_a_thought_is_left_alone() -> None:
    tricky = "x = '''\n```\n</think>\n{}\n'''\n"
    edits = [{**EDIT, "replace": tricky}]
    assert read_answer(answer(edits=edits), "edits").edits[0].replace == tricky


def test_requests_to_people_are_read() -> None:
    asked = [{"type": "library", "reason": "faster", "content": "triton", "more": 1}]
    read = read_answer(answer(requests=asked), "edits")
    assert read.requests == ({"type": "library", "reason": "faster", "content": "triton"},)


def test_what_an_answer_can_do_without_may_be_missing() -> None:
    bare = json.dumps({"summary": "a is 2", "edits": [EDIT]})
    assert read_answer(bare, "edits") == Answer("", "a is 2", "", READ.edits)


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning": ["x"]},
        {"expected_effect": None},
        {"requests": "none"},
        {"requests": ["none"]},
        {"requests": [{"type": "money", "reason": "", "content": ""}]},
        {"requests": [{"type": "script", "reason": None, "content": ""}]},
    ],
)
def test_what_is_beside_the_change_costs_nobody_an_answer(extra: dict[str, Any]) -> None:
    read = read_answer(answer(**extra), "edits")
    assert read.edits == READ.edits
    assert read.requests == ()


def test_no_more_requests_are_read_than_people_would() -> None:
    asked = [{"type": "script", "reason": "", "content": str(n)} for n in range(6)]
    assert len(read_answer(answer(requests=asked), "edits").requests) == 5


@given(st.text())
def test_a_summary_is_one_short_line_for_everybody(text: str) -> None:
    try:
        summary = read_answer(answer(summary=text), "edits").summary
    except EditFailed:
        assert not [letter for letter in text if letter.isprintable() and letter != " "][:1] or (
            "\x1b" in text
        )
        return
    assert 0 < len(summary) <= MOST_SUMMARY
    assert summary.isprintable()


# --- text without JSON ------------------------------------------------------------------------


def test_blocks_name_their_file_or_stay_with_the_last_one() -> None:
    text = (
        "**Summary:** two files\n\n`train.py`\n<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n"
        "then\n<<<<<<< SEARCH\nc\n=======\n>>>>>>> REPLACE\n"
        "=== file: model.py ===\n```python\n<<<<<<< SEARCH\n=======\nwhole\n>>>>>>> REPLACE\n```\n"
    )
    read = read_answer(text, "text")
    assert read.summary == "two files"
    assert read.edits == (
        FileEdit("train.py", "a\n", "b\n"),
        FileEdit("train.py", "c\n", ""),
        FileEdit("model.py", "", "whole\n"),
    )


def test_a_path_that_leaves_the_tree_is_not_made_into_another_one() -> None:
    text = BLOCKS.replace("file: train.py", "file: ../train.py")
    assert read_answer(text, "text").edits[0].file == "../train.py"


def test_whole_files_and_a_chunk_are_read_from_plain_text_too() -> None:
    files = "Summary: new\n=== file: a.py ===\nx = 1\n=== end of a.py ===\nthat is all"
    assert read_answer(files, "rewrite").files == (("a.py", "x = 1\n"),)
    chunk = "Summary: new\nHere:\n```python\ndef f():\n    return {}\n```\n"
    assert read_answer(chunk, "chunk").text == "def f():\n    return {}\n"
    with pytest.raises(EditFailed, match="not closed"):
        read_answer(f"{files}\n=== file: b.py ===\ny = 1\n", "rewrite")


def test_a_chunk_may_stand_in_a_fence_but_not_be_empty() -> None:
    assert read_answer(answer("chunk", text="```python\na = 2\n```"), "chunk").text == "a = 2\n"
    with pytest.raises(EditFailed, match="return it as it stands"):
        read_answer(answer("chunk", text=" \n"), "chunk")


def test_f6_a_swallowed_mark_of_thinking_does_not_bring_a_thought_into_the_answer() -> None:
    thought = f"I could {{try}} this:\n{BLOCKS}\nor rather not.\n</think>\n"
    assert read_answer(thought + BLOCKS, "text").edits == read_answer(BLOCKS, "text").edits
    braces = "{ " * 300
    assert read_answer(f"Hm, {braces}?\n</think>{answer()}", "edits").edits == READ.edits


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BLOCKS.replace(">>>>>>> REPLACE\n", ""), "not closed"),
        (BLOCKS.replace("=======\n", ""), "not closed"),
        (BLOCKS.replace("file: train.py\n", ""), "no line with its file's path"),
        (BLOCKS.replace("Summary: a is 2\n", ""), "summary"),
        (f"{BLOCKS}file: b.py\n<<<<<<<SEARCH\na\n=======\nb\n>>>>>>> REPLACE\n", "no mark"),
        (BLOCKS.replace("=======\n", "<<<<<<< SEARCH\n"), "within another"),
        ("Summary: nothing else", "holds no JSON object"),
    ],
)
def test_f5_blocks_that_are_not_whole_are_refused(text: str, told: str) -> None:
    assert told in complaint_about(text, "text")


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no JSON object"),
        ("I would raise the learning rate.", "holds no JSON object"),
        ("[1, 2]", "holds no JSON object"),
        (answer()[:-30], "cannot be read"),
        (f"Maybe {answer()}, or rather {answer()[:-30]}", "cannot be read"),
        (answer().replace('"summary":', '"summary"'), "cannot be read"),
        ("<think>on and on", "never came to an end"),
        ('{"summary": ' + "[" * 100_000, "cannot be read"),
        ('{"summary": ' + "9" * 10_000 + "}", "cannot be read"),
        ("{" * 100_000, "cannot be read"),
        ("x" * 500_000, "may do"),
        (json.dumps(WORDS), 'has no "edits"'),
        (answer(edits=None), '"edits" must be a list'),
        (answer(edits="x"), '"edits" must be a list'),
        (answer(edits=["x"]), '"edits" must be a list of objects'),
        (answer(edits=[{"file": "a.py"}]), '"search" is missing'),
        (answer(edits=[{**EDIT, "replace": 3}]), '"replace" must be a string'),
        (answer(edits=[{**EDIT, "replace": None}]), '"replace" is missing'),
        (answer(edits=[EDIT] * 51), "holds 51 entries"),
        (answer(edits=[{**EDIT, "replace": "\ud800"}]), "lone surrogate"),
        (answer(summary=3), '"summary" must be a string'),
        (answer(summary=" \n\t"), '"summary" is empty'),
        (json.dumps({"edits": [EDIT]}), '"summary" is missing'),
    ],
)
def test_f5_an_answer_that_cannot_be_used_is_refused_with_what_would_mend_it(
    text: str, told: str
) -> None:
    assert told in complaint_about(text)


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(st.sampled_from('{}[]":,ab\n`<=>'), max_size=60) | st.text(max_size=60))
def test_f5_whatever_comes_is_read_or_refused_and_nothing_else(form: str, text: str) -> None:
    for whole in (text, answer(form) + text, text + answer(form)):
        try:
            assert isinstance(read_answer(whole, form), Answer)
        except EditFailed as refusal:
            reason = refusal.reason
            assert reason is Reason.MALFORMED


@given(st.data())
def test_f6_of_an_object_that_was_cut_off_nothing_is_used(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["edits", "rewrite", "chunk"]))
    text = answer(form)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    assert complaint_about(cut, form)
