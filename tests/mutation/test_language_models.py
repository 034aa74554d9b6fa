"""The mutator that asks language models: what it asks, when, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from darwin_exp.individual import (
    Edit,
    Genome,
    JobResult,
    ModelSpec,
    Proposal,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.mutation import LanguageModelMutator
from darwin_exp.mutation.answer import schema_of
from darwin_exp.mutation.chunks import chunks_of
from darwin_exp.protocols import (
    EditFailed,
    EditRequest,
    Finish,
    Mutator,
    Query,
    Reply,
    Stopped,
)
from darwin_exp.tokens import TokenCounter
from tests.mutation.at_hand import ABOUT, PARENT, changed, request

CHOSEN = ModelSpec("chosen", "http://127.0.0.1:1/v1", 0.7)
OWNED = ModelSpec("owned", "http://127.0.0.1:1/v1")
CRASH = JobResult(
    "job",
    TrainingRun(
        Status.CRASHED,
        Reason.EXCEPTION,
        "exit code 1",
        log_tail="Traceback (most recent call last):\nNameError: name 'progres'\n",
    ),
)
WORDS = {"reasoning": "because", "expected_effect": "lower loss", "requests": []}


class ScriptedModels:
    """Answers by key, each question once: asked again, the question must be the same."""

    def __init__(self, answers: Mapping[str, str | Reply]) -> None:
        self.answers = answers
        self.asked: dict[str, Query] = {}
        self.n_paid = 0

    def choose(self, request: EditRequest) -> ModelSpec:
        return CHOSEN

    def ask(self, query: Query) -> Reply:
        if query.key not in self.asked:
            self.n_paid += 1
        assert self.asked.setdefault(query.key, query) == query
        answer = self.answers[query.key]
        if isinstance(answer, str):
            return Reply(answer, Finish.COMPLETE, 100, 10)
        return answer


class NoModels:
    """Refuses to ask anything."""

    def choose(self, request: EditRequest) -> ModelSpec:
        return CHOSEN

    def ask(self, query: Query) -> Reply:
        raise Stopped("no money")


def edits(*changes: tuple[str, str, str], summary: str = "a change", **more: Any) -> str:
    """Return an answer of search and replace."""
    told = [{"file": f, "search": s, "replace": r} for f, s, r in changes]
    return json.dumps({**WORDS, "summary": summary, "edits": told, **more})


def piece(text: str, summary: str) -> str:
    """Return an answer for one chunk."""
    return json.dumps({**WORDS, "summary": summary, "text": text})


def mutator(models: Any, form: str = "edits", probability: float = 1.0) -> LanguageModelMutator:
    return LanguageModelMutator(
        models, ABOUT, form, probability, 2, 8_000, 1_000, TokenCounter.estimating()
    )


def refused(models: ScriptedModels, asked: EditRequest, form: str = "edits") -> EditFailed:
    with pytest.raises(EditFailed) as refusal:
        mutator(models, form).propose(asked, Random(0))
    return refusal.value


GOOD = edits(("train.py", "WARM_UP = 0.05", "WARM_UP = 0.1"), ("model.py", "F.gelu", "F.relu"))
GOOD_GENOME = changed(
    PARENT.genome,
    ("train.py", "WARM_UP = 0.05", "WARM_UP = 0.1"),
    ("model.py", "F.gelu", "F.relu"),
)
FAILED = Proposal(
    changed(PARENT.genome, ("train.py", "* progress /", "* progres /")),
    (Edit("chosen", "train.py", "plainer warm-up", {"exchange": "g02-i03/0/0"}),),
    1,
    "plainer warm-up",
    "faster",
    OWNED,
    ({"type": "question", "reason": "r", "content": "c"},),
)


# --- drafts -----------------------------------------------------------------------------------


def test_a_draft_is_asked_for_once_and_applied() -> None:
    models = ScriptedModels({"g02-i03/0/0": GOOD})
    made: Mutator = mutator(models)
    proposal = made.propose(request(), Random(0))
    assert proposal.genome == GOOD_GENOME
    assert proposal.edits == (
        Edit("chosen", "model.py, train.py", "a change", {"exchange": "g02-i03/0/0"}),
    )
    assert proposal.n_new == 1
    assert (proposal.summary, proposal.expected_effect) == ("a change", "lower loss")
    assert not made.trusted
    assert made.max_drafts == 2
    query = models.asked["g02-i03/0/0"]
    assert (query.individual_id, query.purpose, query.model) == ("g02-i03", "draft", CHOSEN)
    assert query.schema == schema_of("edits")
    assert query.max_tokens == 1_000
    assert [message.role for message in query.messages] == ["system", "user"]


def test_a_child_inherits_its_parents_model_or_gets_the_one_that_was_chosen() -> None:
    models = ScriptedModels({"g02-i03/0/0": GOOD})
    assert mutator(models).propose(request(), Random(0)).model == CHOSEN
    parent = replace(PARENT, model=OWNED)
    assert mutator(models).propose(request(parent=parent), Random(0)).model == OWNED


def test_requests_to_people_travel_with_the_proposal() -> None:
    asked = [{"type": "resources", "reason": "small", "content": "more memory"}]
    models = ScriptedModels(
        {"g02-i03/0/0": edits(("model.py", "F.gelu", "F.relu"), requests=asked)}
    )
    assert mutator(models).propose(request(), Random(0)).requests == tuple(asked)


def test_whole_files_and_plain_text_are_forms_too() -> None:
    files = [{"file": "train.py", "text": "x = 1\n"}]
    whole = ScriptedModels(
        {"g02-i03/0/0": json.dumps({**WORDS, "summary": "anew", "files": files})}
    )
    made = mutator(whole, "rewrite").propose(request(), Random(0))
    assert made.genome == PARENT.genome.with_files({"train.py": "x = 1\n"})
    text = (
        "Summary: ReLU\nfile: model.py\n<<<<<<< SEARCH\n"
        "        return self.down(F.gelu(self.up(x)))\n=======\n"
        "        return self.down(F.relu(self.up(x)))\n>>>>>>> REPLACE\n"
    )
    plain = ScriptedModels({"g02-i03/0/0": text})
    made = mutator(plain, "text").propose(request(), Random(0))
    assert made.genome == changed(PARENT.genome, ("model.py", "F.gelu", "F.relu"))
    assert plain.asked["g02-i03/0/0"].schema is None


def test_what_the_models_raise_is_passed_on() -> None:
    with pytest.raises(Stopped):
        mutator(NoModels()).propose(request(), Random(0))


# --- answers that cannot be used --------------------------------------------------------------


def test_f5_a_malformed_answer_may_be_mended_by_another_draft() -> None:
    failure = refused(ScriptedModels({"g02-i03/0/0": '{"summary": "cut'}), request())
    assert failure.reason is Reason.MALFORMED
    assert failure.again


def test_f6_of_a_truncated_answer_nothing_is_used_even_if_it_could_be_read() -> None:
    cut = Reply(GOOD, Finish.LENGTH, 100, 1_000)
    failure = refused(ScriptedModels({"g02-i03/0/0": cut}), request())
    assert failure.reason is Reason.TRUNCATED
    assert failure.again
    # Control: the same text, had it come to its end, would have been applied.
    whole = ScriptedModels({"g02-i03/0/0": GOOD})
    assert mutator(whole).propose(request(), Random(0)).genome == GOOD_GENOME


@pytest.mark.parametrize(
    "reply",
    [
        Reply("", Finish.REFUSED, 100, 0),
        Reply("I cannot help with that.", Finish.REFUSED, 100, 6),
        Reply(" \n", Finish.COMPLETE, 100, 0),
    ],
)
def test_f7_a_refusal_and_an_empty_answer_are_typed(reply: Reply) -> None:
    failure = refused(ScriptedModels({"g02-i03/0/0": reply}), request())
    assert failure.reason is Reason.REFUSED
    assert failure.again


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (edits(("train.py", "no such line", "x")), Reason.DOES_NOT_APPLY),
        (edits(("../evil.py", "", "x = 1\n")), Reason.FORBIDDEN_PATH),
        (edits(("CONTRACT.md", "", "none")), Reason.FORBIDDEN_PATH),
        (
            edits(("model.py", "F.gelu", "F.relu"), ("model.py", "F.gelu", "")),
            Reason.DOES_NOT_APPLY,
        ),
        (edits(("model.py", "F.gelu", "F.gelu")), Reason.NO_OP),
        (edits(), Reason.NO_OP),
    ],
)
def test_f8_an_answer_that_does_not_fit_is_typed(answer: str, reason: Reason) -> None:
    failure = refused(ScriptedModels({"g02-i03/0/0": answer}), request())
    assert failure.reason is reason
    assert failure.again


def test_code_far_beyond_the_budget_is_refused_before_anything_is_asked() -> None:
    long = PARENT.genome.with_files({"long.py": "x = 1\n" * 20_000})
    models = ScriptedModels({})
    parent = replace(PARENT, genome=long)
    failure = refused(models, request(parent=parent))
    assert failure.reason is Reason.NOTHING_TO_EDIT
    assert not models.asked


# --- objections -------------------------------------------------------------------------------


def test_f5_a_second_draft_sees_its_first_answer_and_why_it_was_turned_down() -> None:
    models = ScriptedModels({"g02-i03/0/0": "no JSON here", "g02-i03/0/1": GOOD})
    failure = refused(models, request())
    proposal = mutator(models).propose(request(objections=(str(failure),)), Random(1))
    assert proposal.genome == GOOD_GENOME
    assert proposal.edits[-1].parameters == {"exchange": "g02-i03/0/1"}
    first, second = models.asked["g02-i03/0/0"], models.asked["g02-i03/0/1"]
    assert second.messages[:2] == first.messages
    assert [message.role for message in second.messages[2:]] == ["assistant", "user"]
    assert second.messages[2].text == "no JSON here"
    assert f"| {failure}" in second.messages[3].text


def test_f11_drafts_in_another_process_ask_nothing_twice() -> None:
    answers = {"g02-i03/0/0": "no", "g02-i03/0/1": "no again", "g02-i03/0/2": GOOD}
    models = ScriptedModels(answers)
    objections = ("first objection", "second\nobjection")
    for n in range(3):  # as a run does, and then a resumed one
        asked = request(objections=objections[:n])
        if n == 2:
            mutator(models).propose(asked, Random(n))
        else:
            refused(models, asked)
    assert models.n_paid == 3
    again = mutator(models).propose(request(objections=objections), Random(99))
    assert models.n_paid == 3
    assert again.genome == GOOD_GENOME
    assert len(models.asked["g02-i03/0/2"].messages) == 6


def test_a_truncated_answer_is_shown_shortened_to_the_next_draft() -> None:
    cut = Reply("{" + "x" * 50_000, Finish.LENGTH, 100, 1_000)
    models = ScriptedModels({"g02-i03/0/0": cut, "g02-i03/0/1": GOOD})
    mutator(models).propose(request(objections=("cut off",)), Random(0))
    assert len(models.asked["g02-i03/0/1"].messages[2].text) < 9_000


# --- repairs ----------------------------------------------------------------------------------

MENDING = edits(("train.py", "* progres /", "* progress * 1.0 /"), summary="the name is progress")


def test_a_repair_is_an_edit_of_the_failed_code() -> None:
    models = ScriptedModels({"g02-i03/1/0": MENDING})
    mended = mutator(models).repair(request(attempt=1), FAILED, CRASH, Random(0))
    assert mended.genome == changed(
        FAILED.genome, ("train.py", "* progres /", "* progress * 1.0 /")
    )
    assert mended.n_new == 2
    assert mended.edits == (
        *FAILED.edits,
        Edit("chosen", "train.py", "repair: the name is progress", {"exchange": "g02-i03/1/0"}),
    )
    assert mended.summary == "plainer warm-up; repair: the name is progress"
    assert mended.expected_effect == "faster"
    assert mended.model == OWNED
    assert mended.requests == FAILED.requests
    query = models.asked["g02-i03/1/0"]
    assert query.purpose == "repair"
    assert "| NameError: name 'progres'" in query.messages[1].text


@pytest.mark.parametrize("form", ["rewrite", "chunks"])
def test_a_repair_is_made_of_edits_whatever_the_drafts_are(form: str) -> None:
    models = ScriptedModels({"g02-i03/1/0": MENDING})
    mutator(models, form).repair(request(attempt=1), FAILED, CRASH, Random(0))
    assert models.asked["g02-i03/1/0"].schema == schema_of("edits")


def test_f8_a_repair_that_changes_nothing_is_none() -> None:
    models = ScriptedModels({"g02-i03/1/0": edits(("train.py", "import sys", "import sys"))})
    with pytest.raises(EditFailed) as refusal:
        mutator(models).repair(request(attempt=1), FAILED, CRASH, Random(0))
    assert refusal.value.reason is Reason.NO_OP


def test_f6_a_truncated_repair_is_not_used() -> None:
    models = ScriptedModels({"g02-i03/2/0": Reply(MENDING, Finish.LENGTH, 1, 1)})
    with pytest.raises(EditFailed) as refusal:
        mutator(models).repair(request(attempt=2), FAILED, CRASH, Random(0))
    assert refusal.value.reason is Reason.TRUNCATED


def test_a_second_try_at_a_repair_goes_on_in_the_same_conversation() -> None:
    models = ScriptedModels({"g02-i03/1/0": "sorry", "g02-i03/1/1": MENDING})
    asked = request(attempt=1, objections=("no JSON",))
    mended = mutator(models).repair(asked, FAILED, CRASH, Random(0))
    assert mended.edits[-1].parameters == {"exchange": "g02-i03/1/1"}


# --- chunks -----------------------------------------------------------------------------------

EDITABLE = [chunk for chunk in chunks_of(PARENT.genome) if chunk.is_editable]


def answers_for_all(first: int = 0) -> dict[str, str | Reply]:
    return {
        f"g02-i03/0/{first + place}": piece(
            chunk.text.replace("0.05", "0.1").replace("gelu", "relu"), f"chunk {chunk.name}"
        )
        for place, chunk in enumerate(EDITABLE)
    }


def test_each_chunk_is_asked_for_and_told_what_changed_before() -> None:
    models = ScriptedModels(answers_for_all())
    proposal = mutator(models, "chunks").propose(request(), Random(0))
    assert proposal.genome == GOOD_GENOME
    assert proposal.n_new == 1
    assert proposal.edits[-1].file == "model.py, train.py"
    assert proposal.edits[-1].parameters == {"exchange": "g02-i03/0/0", "calls": len(EDITABLE)}
    assert list(models.asked) == [f"g02-i03/0/{n}" for n in range(len(EDITABLE))]
    last = models.asked[f"g02-i03/0/{len(EDITABLE) - 1}"]
    for chunk in EDITABLE[:-1]:
        assert f"| {chunk.name} ({chunk.kind}): chunk {chunk.name}\n" in last.messages[1].text
    assert last.schema == schema_of("chunk")
    shown = "".join(query.messages[1].text for query in models.asked.values())
    assert "(imports)" not in shown


def test_chunks_are_drawn_with_their_probability_and_at_least_one_is() -> None:
    counts = []
    for seed in range(60):
        drawn = AnyChunk()
        with pytest.raises(EditFailed):  # it changes nothing
            mutator(drawn, "chunks", 0.5).propose(request(), Random(seed))
        counts.append(drawn.n_asked)
    assert 0.35 < sum(counts) / (60 * len(EDITABLE)) < 0.65
    assert min(counts) >= 1
    never = AnyChunk()
    with pytest.raises(EditFailed):
        mutator(never, "chunks", 0.0).propose(request(), Random(0))
    assert never.n_asked == 1


class AnyChunk:
    """Answers every question with the chunk as it stands."""

    def __init__(self) -> None:
        self.n_asked = 0

    def choose(self, request: EditRequest) -> ModelSpec:
        return CHOSEN

    def ask(self, query: Query) -> Reply:
        self.n_asked += 1
        shown = query.messages[1].text.partition("=== chunk: ")[2].partition("=== end of ")[0]
        return Reply(piece(shown.partition("\n")[2], "as it was"), Finish.COMPLETE, 1, 1)


def test_f6_one_chunk_that_fails_leaves_the_others_unused() -> None:
    answers = answers_for_all()
    answers[f"g02-i03/0/{len(EDITABLE) - 1}"] = Reply("{", Finish.LENGTH, 1, 1)
    failure = refused(ScriptedModels(answers), request(), "chunks")
    assert failure.reason is Reason.TRUNCATED


def test_an_objected_rewrite_in_chunks_goes_on_with_fresh_calls() -> None:
    models = ScriptedModels(answers_for_all(first=len(EDITABLE)))
    asked = request(objections=("it changed nothing",))
    proposal = mutator(models, "chunks").propose(asked, Random(0))
    assert proposal.genome == GOOD_GENOME
    first = models.asked[f"g02-i03/0/{len(EDITABLE)}"]
    assert "| it changed nothing\n" in first.messages[1].text


def test_code_of_nothing_but_imports_has_no_chunk_to_edit() -> None:
    bare = Genome.of({"train.py": "import os\n", "model.py": "import sys\n"})
    parent = replace(PARENT, genome=bare)
    failure = refused(ScriptedModels({}), request(parent=parent), "chunks")
    assert failure.reason is Reason.NOTHING_TO_EDIT


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("form", "poem", r"mutator\.form"),
        ("chunk_probability", 1.5, r"mutator\.chunk_probability"),
        ("chunk_probability", float("nan"), r"mutator\.chunk_probability"),
        ("max_drafts", 0, r"mutator\.max_drafts"),
        ("prompt_tokens", 0, r"mutator\.prompt_tokens"),
        ("answer_tokens", -1, r"mutator\.answer_tokens"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: Any, complaint: str) -> None:
    known: dict[str, Any] = {
        "models": NoModels(),
        "about": ABOUT,
        "form": "edits",
        "chunk_probability": 0.5,
        "max_drafts": 2,
        "prompt_tokens": 8_000,
        "answer_tokens": 1_000,
        "count": TokenCounter.estimating(),
    }
    with pytest.raises(ValueError, match=complaint):
        LanguageModelMutator(**{**known, name: value})
