"""The stub's answers: each kind does what it says, to the base's code and to evolved code."""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml

from darwin_exp.gates import objection
from darwin_exp.individual import (
    Evaluation,
    Genome,
    Individual,
    JobResult,
    Proposal,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.mutation.answer import read_answer
from darwin_exp.mutation.chunks import chunks_of_file
from darwin_exp.mutation.prompt import (
    Surroundings,
    chunk_prompt,
    draft_prompt,
    objection_messages,
    repair_prompt,
)
from darwin_exp.mutation.rewriting import FileEdit, apply
from darwin_exp.protocols import EditFailed, EditRequest, Message
from darwin_exp.stub_llm import ANSWERS, MODELS, Answer, Author, Completion, Kind
from darwin_exp.stub_llm.answers_broken import BROKEN_ANSWERS
from darwin_exp.stub_llm.answers_good import GOOD_ANSWERS
from darwin_exp.stub_llm.answers_unusable import UNUSABLE_ANSWERS
from darwin_exp.stub_llm.answers_useless import USELESS_ANSWERS
from darwin_exp.stub_llm.prompts import Prompt
from darwin_exp.stub_llm.repairs import CURES, WRONG_REPAIRS
from darwin_exp.stub_llm.source import DoesNotFit, replacements
from darwin_exp.tokens import TokenCounter

ROOT = Path(__file__).resolve().parents[2]
TRACEBACK = "Traceback (most recent call last):\n"
ABOUT = Surroundings("cpu, 1 thread", 12.0, None, 4096, 64, 96, 1_000_000, "perplexity", "Keep it.")


def base_genome() -> Genome:
    settings = yaml.safe_load((ROOT / "conf/trainer/baseline.yaml").read_text())["settings"]
    text = json.dumps(settings, indent=2) + "\n"
    return Genome.from_folder(ROOT / "trainer_base").with_files({"settings.json": text})


BASE = base_genome()


def agent(genome: Genome, name: str = "g00-i00") -> Individual:
    return Individual(name, generation=0, slot=0, genome=genome)


def as_body(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]


count = TokenCounter.estimating()


def draft_of(genome: Genome, form: str = "edits", ordinal: int = 0) -> list[dict[str, str]]:
    """The harness's own question for a rewrite."""
    parent = agent(genome)
    request = EditRequest(parent, parent, individual_id="g01-i00", ordinal=ordinal)
    return as_body(draft_prompt(request, ABOUT, form, 100_000, count).messages)


def repair_of(
    genome: Genome, status: Status, reason: Reason, message: str, log: str, ordinal: int = 0
) -> list[dict[str, str]]:
    """The harness's own question for a repair."""
    parent = agent(BASE)
    request = EditRequest(parent, parent, individual_id=f"g01-i{ordinal:02d}", attempt=1)
    failed = Proposal(genome, (), 0, "a change")
    training = TrainingRun(status, reason, message, log_tail=log)
    scored = Evaluation(status, reason, message) if status is Status.REJECTED else None
    prompt = repair_prompt(
        request, failed, JobResult("job", training, scored), ABOUT, "edits", 100_000, count
    )
    return as_body(prompt.messages)


def written(answer: Answer, genome: Genome, form: str = "edits", seed: int = 0) -> Completion:
    return answer.write(Prompt.of(draft_of(genome, form)), Random(seed))


def applied(completion: Completion, genome: Genome, form: str = "edits") -> Genome:
    """Apply an answer as the harness does."""
    assert completion.text is not None
    return apply(genome, read_answer(completion.text, form).changes)


def rewritten(answer: Answer, genome: Genome, seed: int = 0) -> Genome:
    return applied(written(answer, genome, seed=seed), genome)


def named(answers: Sequence[Answer]) -> list[Any]:
    return [pytest.param(answer, id=answer.name) for answer in answers]


def check_settings(genome: Genome) -> None:
    """Check that train.py would read the settings: the same names in both."""
    tree = ast.parse(genome.as_dict["train.py"])
    (declared,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Settings"]
    names = {
        line.target.id
        for line in declared.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    settings = json.loads(genome.as_dict["settings.json"])
    assert set(settings) == names
    assert settings["width"] % settings["n_heads"] == 0


class TestTheTable:
    def test_there_are_enough_answers_of_every_kind(self) -> None:
        kinds = Counter(answer.kind for answer in ANSWERS.values())
        least = {
            Kind.GOOD: 18,
            Kind.USELESS: 6,
            Kind.MALFORMED: 5,
            Kind.REFUSAL: 3,
            Kind.BROKEN: 8,
            Kind.REPAIR: 8,
            Kind.WRONG_REPAIR: 3,
        }
        assert sum(kinds.values()) >= 45
        assert all(kinds[kind] >= n for kind, n in least.items())

    def test_no_two_answers_share_a_name(self) -> None:
        parts = (
            GOOD_ANSWERS,
            USELESS_ANSWERS,
            UNUSABLE_ANSWERS,
            BROKEN_ANSWERS,
            CURES,
            WRONG_REPAIRS,
        )
        assert len(ANSWERS) == sum(map(len, parts))


class TestGoodAnswers:
    @pytest.mark.parametrize("answer", named(GOOD_ANSWERS))
    def test_it_applies_to_the_base_and_passes_the_gates(self, answer: Answer) -> None:
        for seed in range(4):
            child = rewritten(answer, BASE, seed)
            assert objection(child, BASE) is None
            check_settings(child)

    @pytest.mark.parametrize("answer", named(GOOD_ANSWERS))
    def test_every_form_says_the_same(self, answer: Answer) -> None:
        whole = applied(written(answer, BASE, "rewrite"), BASE, "rewrite")
        assert whole == rewritten(answer, BASE)
        assert applied(written(answer, BASE, "text"), BASE, "text") == whole

    @pytest.mark.parametrize("answer", named(GOOD_ANSWERS))
    def test_its_model_is_rebuilt_causal_and_the_same_twice(self, answer: Answer) -> None:
        check_model(rewritten(answer, BASE))

    def test_control_a_model_that_is_not_causal_is_seen(self) -> None:
        with pytest.raises(AssertionError):
            check_model(broken_by("non_causal"))

    @pytest.mark.parametrize("seed", range(3))
    def test_they_fit_code_that_others_have_changed_or_say_that_they_do_not(
        self, seed: int
    ) -> None:
        rng = Random(seed)
        genome, n_fitting = BASE, 0
        for answer in rng.sample(GOOD_ANSWERS, len(GOOD_ANSWERS)):
            try:
                child = rewritten(answer, genome, seed)
            except DoesNotFit:
                continue
            n_fitting += 1
            assert objection(child, genome) is None, answer.name
            check_settings(child)
            genome = child
        assert n_fitting >= 20
        check_model(genome)

    def test_some_change_several_files_together(self) -> None:
        n_files = {
            answer.name: len(
                read_answer(written(answer, BASE, "rewrite").text or "", "rewrite").files
            )
            for answer in GOOD_ANSWERS
        }
        assert n_files["hidden_ratio"] == 3
        assert sum(n > 1 for n in n_files.values()) >= 4

    def test_none_fits_code_that_is_nothing_like_the_base(self) -> None:
        strange = Genome.of({"train.py": "print('hello')\n", "model.py": "x = 1\n"})
        for answer in GOOD_ANSWERS:
            with pytest.raises(DoesNotFit):
                written(answer, strange)


def check_model(genome: Genome) -> None:
    """Build the model, and check what the contract says of it."""
    import torch

    settings = json.loads(genome.as_dict["settings.json"])
    module = ModuleType("model_of_an_answer")
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look for the module they are in
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(genome.as_dict["model.py"], "model.py", "exec"), module.__dict__)
    names = module.GPTConfig.__dataclass_fields__
    arguments = {"vocab_size": 13, "context_length": 8} | {
        name: settings[name] for name in names if name in settings
    }
    torch.manual_seed(0)
    model, other = module.build_model(arguments).eval(), module.build_model(arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero projections would hide what is beyond them
            parameter.add_(0.05 * torch.randn_like(parameter))
        other.load_state_dict(model.state_dict(), strict=True)
        tokens = torch.randint(13, (2, 8))
        logits = model(tokens)
        assert logits.shape == (2, 8, 13)
        assert torch.equal(logits, model(tokens))
        assert torch.allclose(other(tokens), logits)
        later = tokens.clone()
        later[:, 5:] = (later[:, 5:] + 1) % 13
        assert torch.allclose(model(later)[:, :5], logits[:, :5], atol=1e-4)
        assert not torch.allclose(model(later)[:, 5:], logits[:, 5:], atol=1e-4)
        for length in (1, 3):
            assert torch.allclose(model(tokens[:, :length]), logits[:, :length], atol=1e-4)


class TestUselessAnswers:
    @pytest.mark.parametrize("name", ["comment_only", "docstring_only", "seed_only", "same_value"])
    def test_what_changes_nothing_that_runs_is_turned_down_as_no_edit(self, name: str) -> None:
        child = rewritten(ANSWERS[name], BASE)
        assert child != BASE
        assert (objection(child, BASE) or (None,))[0] is Reason.NO_OP

    @pytest.mark.parametrize("name", ["renamed_variable", "extra_logging", "unused_function"])
    def test_what_looks_like_a_change_passes_the_gates(self, name: str) -> None:
        assert objection(rewritten(ANSWERS[name], BASE), BASE) is None

    def test_an_answer_without_edits_changes_nothing(self) -> None:
        with pytest.raises(EditFailed) as caught:
            rewritten(ANSWERS["no_edits"], BASE)
        assert caught.value.reason is Reason.NO_OP


class TestUnusableAnswers:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("wrong_schema", Reason.MALFORMED),
            ("prose_only", Reason.MALFORMED),
            ("bare_diff", Reason.MALFORMED),
            ("unclosed_json", Reason.MALFORMED),
            ("truncated", Reason.MALFORMED),
            ("refusal_in_words", Reason.MALFORMED),
            ("search_nowhere", Reason.DOES_NOT_APPLY),
            ("search_twice", Reason.DOES_NOT_APPLY),
            ("evil_path", Reason.FORBIDDEN_PATH),
            ("contract_edit", Reason.FORBIDDEN_PATH),
            ("job_edit", Reason.FORBIDDEN_PATH),
        ],
    )
    def test_f8_the_harness_turns_it_down(self, name: str, reason: Reason) -> None:
        with pytest.raises(EditFailed) as caught:
            rewritten(ANSWERS[name], BASE)
        assert caught.value.reason is reason

    def test_how_an_answer_ends_says_what_it_is(self) -> None:
        ends = {
            name: (made.finish_reason, made.text, made.refusal)
            for name in ("refusal_field", "content_filter", "empty_text")
            if (made := written(ANSWERS[name], BASE))
        }
        assert ends["content_filter"] == ("content_filter", None, None)
        assert ends["empty_text"] == ("stop", "", None)
        assert ends["refusal_field"][1] is None
        assert ends["refusal_field"][2]
        assert written(ANSWERS["truncated"], BASE).finish_reason == "length"


LOGS: Mapping[str, tuple[Status, Reason, str, str]] = {
    "name_error": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: NameError: name 'warmup_fraction' is not defined",
        TRACEBACK + '  File "/box/code/train.py", line {line}, in learning_rate\n'
        "    if progress < warmup_fraction:\n"
        "NameError: name 'warmup_fraction' is not defined\n",
    ),
    "late_name_error": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: NameError: name 'settle_factor' is not defined",
        TRACEBACK + '  File "/box/code/train.py", line 273, in <module>\n'
        "    rate *= settle_factor\n            ^^^^^^^^^^^^^\n"
        "NameError: name 'settle_factor' is not defined\n",
    ),
    "wrong_shape": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(512x128 and 256x128)",
        TRACEBACK + "RuntimeError: mat1 and mat2 shapes cannot be multiplied (512x128 and 256x128)",
    ),
    "wrong_keyword": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: TypeError: AdamW.__init__() got an unexpected keyword "
        "argument 'momentum'",
        TRACEBACK + "TypeError: AdamW.__init__() got an unexpected keyword argument 'momentum'\n",
    ),
    "missing_import": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: ModuleNotFoundError: No module named 'einops'",
        TRACEBACK + "ModuleNotFoundError: No module named 'einops'\n",
    ),
    "endless_loop": (
        Status.TIMED_OUT,
        Reason.NO_CHECKPOINT,
        "frozen at its budget without a complete checkpoint: there is no model.json",
        "warming up for 20 passes\n",
    ),
    "out_of_memory": (
        Status.OUT_OF_MEMORY,
        Reason.MEMORY,
        "the run went past its memory limit",
        TRACEBACK + "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. "
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes.",
    ),
    "late_crash": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: IndexError: Dimension out of range",
        TRACEBACK + "IndexError: Dimension out of range (expected to be in range of [-1, 0], but "
        "got 1)\n",
    ),
    "no_checkpoint": (
        Status.CRASHED,
        Reason.NO_CHECKPOINT,
        "the run ended by itself and left no complete checkpoint: there are no weights",
        "saved weights.safetensors\nstep    100  loss 2.4130  11.8 s\n",
    ),
    "non_causal": (
        Status.REJECTED,
        Reason.CAUSALITY,
        "the model sees what comes later",
        "step     50  loss 1.1021  6.0 s\nstep    100  loss 0.0131  11.8 s\n",
    ),
    "exploding_rate": (
        Status.REJECTED,
        Reason.NONFINITE,
        "the weights are not finite",
        "step      4  loss nan  0.6 s\nstep    100  loss nan  11.8 s\n",
    ),
    "no_build_model": (
        Status.CRASHED,
        Reason.EXCEPTION,
        "the run ended with exit status 1: ImportError: cannot import name 'build_model'",
        TRACEBACK
        + "ImportError: cannot import name 'build_model' from 'model' (/box/code/model.py)",
    ),
}


def broken_by(name: str) -> Genome:
    return rewritten(ANSWERS[name], BASE)


def failure_of(name: str, ordinal: int = 0) -> list[dict[str, str]]:
    genome = broken_by(name)
    status, reason, message, log = LOGS[name]
    lines = genome.as_dict["train.py"].splitlines()
    line = lines.index("    if progress < warmup_fraction:") + 1 if name == "name_error" else 0
    return repair_of(genome, status, reason, message, log.replace("{line}", str(line)), ordinal)


def without_log(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Cut out what the failed run printed, as if the harness had lost it."""
    *first, last = messages
    start = last["content"].index("The end of what it printed")
    end = last["content"].index("\n## ", start)
    cut = last["content"][:start] + last["content"][end:]
    return [*first, {**last, "content": cut}]


class TestBrokenAnswersAndRepairs:
    @pytest.mark.parametrize("answer", named(BROKEN_ANSWERS))
    def test_f9_broken_code_applies_and_what_can_be_seen_without_running_it_is_stopped(
        self, answer: Answer
    ) -> None:
        found = objection(rewritten(answer, BASE), BASE)
        seen = {"indentation": Reason.SYNTAX, "missing_import": Reason.FORBIDDEN_IMPORT}
        assert (found and found[0]) == seen.get(answer.name)

    def test_all_that_fails_at_run_time_has_a_cure(self) -> None:
        runtime = {answer.name for answer in BROKEN_ANSWERS} - {"indentation"}
        assert runtime == set(LOGS)
        assert {answer.name for answer in CURES} == {f"cure_{name}" for name in runtime}

    @pytest.mark.parametrize("name", LOGS)
    def test_the_careful_model_mends_it_when_it_is_shown_the_log(self, name: str) -> None:
        broken = broken_by(name)
        for ordinal in range(3):
            completion = Author().answer("stub-careful", failure_of(name, ordinal))
            assert completion.answer == f"cure_{name}"
            mended = applied(completion, broken)
            assert objection(mended, broken) is None
            check_settings(mended)

    @pytest.mark.parametrize(
        "name",
        [
            "name_error",
            "wrong_shape",
            "wrong_keyword",
            "missing_import",
            "out_of_memory",
            "non_causal",
            "no_build_model",
        ],
    )
    def test_where_only_the_mistake_was_new_the_cure_leads_back(self, name: str) -> None:
        completion = Author().answer("stub-careful", failure_of(name))
        mended = applied(completion, broken_by(name)).as_dict
        assert {p: ast.dump(ast.parse(mended[p])) for p in ("train.py", "model.py")} == {
            p: ast.dump(ast.parse(BASE.as_dict[p])) for p in ("train.py", "model.py")
        }

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("name", LOGS)
    def test_control_without_the_log_no_repair_is_right(self, name: str, model: str) -> None:
        for ordinal in range(8):
            messages = without_log(failure_of(name, ordinal))
            given = Author().answer(model, messages).answer
            assert ANSWERS[given].kind is Kind.WRONG_REPAIR

    def test_the_log_of_another_failure_is_no_help(self) -> None:
        status, reason, message, log = LOGS["wrong_shape"]
        messages = repair_of(broken_by("missing_import"), status, reason, message, log)
        given = Author().answer("stub-careful", messages).answer
        assert ANSWERS[given].kind is Kind.WRONG_REPAIR

    def test_the_sloppy_model_is_right_about_half_the_time(self) -> None:
        given = [
            Author().answer("stub-sloppy", failure_of("wrong_shape", ordinal)).answer
            for ordinal in range(60)
        ]
        assert 18 <= given.count("cure_wrong_shape") <= 42

    def test_wrong_repairs_leave_the_mistake_or_do_not_apply(self) -> None:
        broken = broken_by("wrong_shape")
        mistake = "nn.Linear(2 * config.width, config.width"
        for answer in WRONG_REPAIRS:
            if answer.name == "repair_does_not_apply":
                with pytest.raises(EditFailed) as caught:
                    rewritten(answer, broken)
                assert caught.value.reason is Reason.DOES_NOT_APPLY
            else:
                child = rewritten(answer, broken)
                assert objection(child, broken) is None
                assert mistake in child.as_dict["model.py"]


class TestChoosing:
    def test_the_same_question_gets_the_same_answer(self) -> None:
        for ordinal in range(10):
            messages = draft_of(BASE, ordinal=ordinal)
            assert Author().answer("stub-bold", messages) == Author().answer("stub-bold", messages)

    def test_another_question_model_or_seed_gets_other_answers(self) -> None:
        def given(model: str = "stub-careful", seed: int = 0, first: int = 0) -> list[str]:
            author = Author(seed)
            asked = [draft_of(BASE, ordinal=first + i) for i in range(12)]
            return [author.answer(model, messages).answer for messages in asked]

        assert len(set(given())) > 5
        assert given() != given(seed=1)
        assert given() != given(model="stub-bold")
        assert given() != given(first=100)

    def test_models_differ_in_how_good_they_are(self) -> None:
        def share(model: str, kind: Kind) -> float:
            asked = [draft_of(BASE, ordinal=ordinal) for ordinal in range(80)]
            kinds = [ANSWERS[Author().answer(model, m).answer].kind for m in asked]
            return kinds.count(kind) / len(kinds)

        assert share("stub-careful", Kind.GOOD) > 0.55
        assert share("stub-sloppy", Kind.GOOD) < 0.45
        assert share("stub-bold", Kind.BROKEN) > share("stub-careful", Kind.BROKEN)

    def test_an_objection_is_mostly_followed_by_a_good_answer(self) -> None:
        kinds = Counter(
            ANSWERS[given.answer].kind
            for ordinal in range(40)
            for given in [
                Author().answer(
                    "stub-careful",
                    draft_of(BASE, ordinal=ordinal)
                    + as_body(objection_messages("Here you are.", "it holds no JSON object")),
                )
            ]
        )
        assert kinds[Kind.GOOD] >= 32

    def test_only_named_answers_are_given_and_kinds_can_be_left_out(self) -> None:
        author = Author(only=("token_shift", "repair_makes_it_worse"))
        assert author.answer("stub-sloppy", draft_of(BASE)).answer == "token_shift"
        assert author.answer("stub-careful", failure_of("late_crash")).answer == (
            "repair_makes_it_worse"
        )
        calm = Author(without=(Kind.BROKEN, Kind.MALFORMED, Kind.REFUSAL, Kind.USELESS))
        for ordinal in range(10):
            given = calm.answer("stub-sloppy", draft_of(BASE, ordinal=ordinal)).answer
            assert ANSWERS[given].kind is Kind.GOOD

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no answer no_such_answer"):
            Author(only=("no_such_answer",))

    def test_f14_what_is_quoted_is_never_taken_for_the_prompt(self) -> None:
        messages = draft_of(BASE)
        fake = (
            "\n| ## What went wrong\n| status: CRASHED (exception)\n| === file: model.py ===\n"
            "| import os\n| === end of model.py ===\n| Form: rewrite\n"
        )
        prompt = Prompt.of(
            [*messages[:-1], {**messages[-1], "content": fake + messages[-1]["content"]}]
        )
        assert prompt == Prompt.of(messages)
        assert prompt.files == BASE.as_dict

    def test_a_prompt_without_code_gets_an_answer_without_edits(self) -> None:
        given = Author(only=("squared_relu",)).answer(
            "stub-careful", [{"role": "user", "content": "Hello!"}]
        )
        assert given.answer == "no_edits"


class TestChunks:
    def chunk_question(self, kind: str) -> tuple[str, list[dict[str, str]]]:
        parent = agent(BASE)
        request = EditRequest(parent, parent, individual_id="g01-i00")
        for path, text in BASE.files:
            for chunk in chunks_of_file(path, text):
                if chunk.kind == kind:
                    prompt = chunk_prompt(request, chunk, (), ABOUT, 100_000, count)
                    return chunk.text, as_body(prompt.messages)
        raise AssertionError(f"there is no {kind}")

    def new_text(self, author: Author, messages: list[dict[str, str]]) -> str:
        given = author.answer("stub-careful", messages)
        text = read_answer(given.text or "", "chunk").text
        assert text is not None
        return text

    @pytest.mark.parametrize(
        ("kind", "name", "new"),
        [
            ("function loss_of", "z_loss", "logsumexp"),
            ("function learning_rate", "linear_schedule", "(1.0 - decayed)"),
            ("class MLP", "swiglu", "F.silu(gate)"),
            ("class GPT", "logit_bias", "+ self.logit_bias"),
        ],
    )
    def test_a_change_that_fits_into_the_chunk_is_made_in_it(
        self, kind: str, name: str, new: str
    ) -> None:
        old, messages = self.chunk_question(kind)
        text = self.new_text(Author(only=(name,)), messages)
        assert new in text
        assert new not in old
        whole = next(t for t in BASE.as_dict.values() if old in t)
        ast.parse(whole.replace(old, text))

    def test_the_chunk_alone_is_enough_where_the_file_is_not_shown(self) -> None:
        _, messages = self.chunk_question("function loss_of")
        user = messages[-1]["content"]
        start, end = user.index("=== file: train.py"), user.index("=== end of train.py ===")
        messages[-1]["content"] = user[:start] + user[end + len("=== end of train.py ===") :]
        assert "logsumexp" in self.new_text(Author(only=("z_loss",)), messages)

    def test_a_change_that_reaches_further_leaves_the_chunk_as_it_is(self) -> None:
        old, messages = self.chunk_question("function loss_of")
        assert self.new_text(Author(only=("hidden_ratio",)), messages) == old


class TestReplacements:
    def both(self, old: str, new: str) -> Genome:
        genome = Genome.of({"train.py": old, "model.py": ""})
        edits = [FileEdit(e.file, e.search, e.replace) for e in replacements("train.py", old, new)]
        return apply(genome, edits)

    def cases(self) -> Iterator[tuple[str, str]]:
        rng = Random(0)
        for _ in range(200):
            old = [rng.choice(["a\n", "b\n", "\n", "  c\n"]) for _ in range(rng.randint(1, 12))]
            new = [line for line in old if rng.random() > 0.2]
            for _ in range(rng.randint(0, 3)):
                new.insert(rng.randint(0, len(new)), rng.choice(["a\n", "d\n", "\n"]))
            if new != old:
                yield "".join(old), "".join(new)

    def test_edits_lead_from_one_text_to_the_other_however_often_lines_repeat(self) -> None:
        for old, new in self.cases():
            assert self.both(old, new).as_dict["train.py"] == new

    def test_nothing_to_change_takes_no_edit(self) -> None:
        assert replacements("train.py", "a\n", "a\n") == []
