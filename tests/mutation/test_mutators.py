"""The contract of every mutator, and what each of them promises beyond it."""

from __future__ import annotations

import ast
import json
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import (
    Edit,
    Genome,
    Individual,
    JobResult,
    Proposal,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.mutation import (
    EDITS,
    NoMutation,
    Operators,
    Scripted,
    ScriptedStep,
    edit_weights,
    reapply,
)
from darwin_exp.mutation.operators import EXPLORATION, LARGEST_Z
from darwin_exp.protocols import EditFailed, EditRequest, Lesson, Mutator

ROOT = Path(__file__).resolve().parents[2]
CRASH = JobResult("job", TrainingRun(Status.CRASHED, Reason.EXCEPTION, "it fell over"))


def seed_genome() -> Genome:
    recipe = yaml.safe_load((ROOT / "conf/trainer/baseline.yaml").read_text())["settings"]
    settings = {**recipe, "learning_rate": 0.004}
    genome = Genome.from_folder(ROOT / "trainer_base")
    return genome.with_files({"settings.json": json.dumps(settings, indent=2) + "\n"})


BASE = seed_genome()
BASE_AGENT = Individual("g0-0", generation=0, slot=0, genome=BASE)
RATE = Edit("higher_rate", "settings.json", "why", {"factor": 1.5})
WARM_UP = Edit("warm_up", "settings.json", "why", {"value": 0.02})
CLIP = Edit("gradient_clip", "settings.json", "why", {"value": 2.0})
SQUARED = Edit("squared_relu", "model.py", "why")
UNTIED = Edit("untied_head", "settings.json", "why")


def agent(name: str, *edits: Edit) -> Individual:
    genome = BASE
    for edit in edits:
        genome = EDITS[edit.operator].apply(genome, edit.parameters)
    return Individual(name, generation=1, slot=0, genome=genome, edits=edits)


def request(parent: Individual = BASE_AGENT, **more: Any) -> EditRequest:
    return EditRequest(parent=parent, editor=parent, **more)


def settings_of(proposal: Proposal) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(proposal.genome.as_dict["settings.json"])
    return settings


def operators_of(edits: Sequence[Edit]) -> list[str]:
    return [edit.operator for edit in edits]


def a_script() -> Scripted:
    return Scripted(
        [
            ScriptedStep(operator="higher_rate", parameters={"factor": 1.5}),
            ScriptedStep(file="model.py", search="F.gelu", replace="F.relu"),
            ScriptedStep(file="note.txt", text="hello\n"),
            ScriptedStep(copy=True),
        ],
        [ScriptedStep(file="note.txt", text="mended\n")],
    )


MUTATORS: dict[str, Mutator] = {
    "operators": Operators(),
    "operators, many edits": Operators((3, 5)),
    "none": NoMutation(),
    "scripted": a_script(),
}


@pytest.mark.parametrize("mutator", MUTATORS.values(), ids=MUTATORS)
class TestEveryMutator:
    def test_proposals_parse_and_their_lineage_is_consistent(self, mutator: Mutator) -> None:
        parent = agent("g1-0", WARM_UP)
        for ordinal in range(4):
            proposal = mutator.propose(request(parent, ordinal=ordinal), Random(ordinal))
            assert proposal.edits[: len(parent.edits)] == parent.edits
            assert len(proposal.edits) == len(parent.edits) + proposal.n_new
            assert len(proposal.new_edits) == proposal.n_new
            assert (proposal.genome == parent.genome) == (proposal.n_new == 0)
            assert proposal.summary
            assert "\n" not in proposal.summary
            for path, text in proposal.genome.files:
                if path.endswith(".py"):
                    ast.parse(text)
                elif path.endswith(".json"):
                    json.loads(text)

    def test_the_same_random_numbers_give_the_same_proposal(self, mutator: Mutator) -> None:
        for ordinal in range(2):
            asked = request(ordinal=ordinal)
            assert mutator.propose(asked, Random(7)) == mutator.propose(asked, Random(7))

    def test_the_parent_stays_as_it_was(self, mutator: Mutator) -> None:
        before = pickle.dumps(BASE_AGENT)
        mutator.propose(request(), Random(0))
        assert pickle.dumps(BASE_AGENT) == before

    def test_a_repair_is_another_proposal_or_a_typed_refusal(self, mutator: Mutator) -> None:
        asked = request()
        failed = mutator.propose(asked, Random(0))
        if isinstance(mutator, NoMutation) or (failed.n_new == 1 and mutator.trusted):
            with pytest.raises(EditFailed) as refusal:
                mutator.repair(asked, failed, CRASH, Random(1))
            assert refusal.value.reason is Reason.NOTHING_TO_EDIT
            return
        mended = mutator.repair(asked, failed, CRASH, Random(1))
        assert mended.genome != failed.genome
        assert len(mended.edits) == len(asked.parent.edits) + mended.n_new
        assert mended == mutator.repair(asked, failed, CRASH, Random(1))

    def test_it_and_its_proposals_travel_by_pickle(self, mutator: Mutator) -> None:
        twin = pickle.loads(pickle.dumps(mutator))
        proposal = twin.propose(request(), Random(3))
        assert pickle.loads(pickle.dumps(proposal)) == mutator.propose(request(), Random(3))

    def test_it_says_whether_it_is_trusted_and_how_often_it_drafts(self, mutator: Mutator) -> None:
        assert mutator.trusted is (not isinstance(mutator, Scripted))
        assert mutator.max_drafts >= 1


# --- the operators mutator --------------------------------------------------------------------


def test_other_random_numbers_give_other_proposals() -> None:
    drawn = {Operators().propose(request(), Random(seed)).genome.id for seed in range(10)}
    assert len(drawn) >= 7


def test_as_many_edits_are_drawn_as_asked_for_and_each_about_something_else() -> None:
    for seed in range(6):
        proposal = Operators((2, 4)).propose(request(), Random(seed))
        assert 2 <= proposal.n_new <= 4
        abouts = [EDITS[edit.operator].about for edit in proposal.new_edits]
        assert len(set(abouts)) == len(abouts)


def test_the_summary_and_the_hope_name_every_new_edit() -> None:
    proposal = Operators((2, 2)).propose(request(), Random(1))
    for edit in proposal.new_edits:
        assert EDITS[edit.operator].title in proposal.expected_effect
        assert EDITS[edit.operator].hope in proposal.expected_effect
    assert proposal.summary.count(";") == 1


def test_what_a_lineage_holds_is_not_drawn_again_unless_it_may_be_repeated() -> None:
    parent = agent("g1-0", SQUARED, UNTIED, RATE)
    drawn: set[str] = set()
    for seed in range(40):
        drawn.update(
            operators_of(Operators((1, 1)).propose(request(parent), Random(seed)).new_edits)
        )
    assert not drawn & {"squared_relu", "untied_head"}
    again = Lesson("x", 1, "p", "e", (RATE,), "", Status.OK, z_score=3.0)
    often = [
        operators_of(
            Operators((1, 1)).propose(request(parent, lessons=(again,) * 20), Random(s)).new_edits
        )
        for s in range(15)
    ]
    assert ["higher_rate"] in often


def test_lessons_steer_what_is_drawn() -> None:
    good = Lesson("x", 1, "p", "e", (UNTIED,), "", Status.OK, z_score=3.0)
    bad = Lesson("y", 1, "p", "e", (CLIP,), "", Status.CRASHED)
    asked = request(lessons=(good,) * 20 + (bad,) * 20)
    drawn = [
        Operators((1, 1)).propose(asked, Random(seed)).new_edits[0].operator for seed in range(30)
    ]
    assert drawn.count("untied_head") > 8
    assert drawn.count("gradient_clip") <= 3


def test_an_edit_that_does_not_fit_is_skipped_and_another_drawn() -> None:
    strange = BASE.with_files({"model.py": "x = 1\n", "train.py": "print()\n"})
    parent = Individual("g0-0", generation=0, slot=0, genome=strange)
    for seed in range(10):
        proposal = Operators((2, 2)).propose(request(parent), Random(seed))
        assert {edit.file for edit in proposal.new_edits} == {"settings.json"}


def test_code_that_no_edit_fits_is_refused() -> None:
    strange = Genome.of({"model.py": "x = 1\n", "train.py": "print()\n"})
    parent = Individual("g0-0", generation=0, slot=0, genome=strange)
    with pytest.raises(EditFailed) as refusal:
        Operators().propose(request(parent), Random(0))
    assert refusal.value.reason is Reason.NOTHING_TO_EDIT


def test_a_merge_makes_the_mates_edits_that_the_parent_lacks() -> None:
    parent = agent("g1-0", WARM_UP, SQUARED)
    mate = agent("g1-1", WARM_UP, UNTIED, RATE)
    proposal = Operators().propose(request(parent, mate=mate), Random(0))
    assert proposal.new_edits == (UNTIED, RATE) or operators_of(proposal.new_edits) == [
        "untied_head",
        "higher_rate",
    ]
    assert settings_of(proposal)["learning_rate"] == pytest.approx(0.006)
    assert settings_of(proposal)["tied_head"] is False
    assert proposal.genome.as_dict["model.py"] == parent.genome.as_dict["model.py"]
    assert "merged from g1-1" in proposal.summary


def test_a_merge_keeps_the_parents_way_where_both_changed_the_same_thing() -> None:
    parent = agent("g1-0", Edit("lower_rate", "settings.json", "why", {"factor": 0.5}))
    mate = agent("g1-1", RATE, UNTIED)
    proposal = Operators().propose(request(parent, mate=mate), Random(0))
    assert operators_of(proposal.new_edits) == ["untied_head"]
    assert settings_of(proposal)["learning_rate"] == pytest.approx(0.002)
    assert "kept its own peak rate" in proposal.summary


def test_a_merge_names_the_edits_that_no_longer_fit() -> None:
    foreign = Edit("gpt-oss", "model.py", "an idea")
    relu = BASE.with_files({"model.py": BASE.as_dict["model.py"].replace("gelu", "relu")})
    parent = Individual("g1-0", generation=1, slot=0, genome=relu)
    mate = agent("g1-1", SQUARED, UNTIED)
    mate = Individual("g1-1", 1, 1, mate.genome, edits=(*mate.edits, foreign))
    proposal = Operators().propose(request(parent, mate=mate), Random(0))
    assert operators_of(proposal.new_edits) == ["untied_head"]
    assert "left out squared ReLU in the MLP" in proposal.summary
    assert "left out gpt-oss" in proposal.summary


def test_a_merge_with_nothing_to_merge_draws_instead_and_says_so() -> None:
    parent = agent("g1-0", RATE, SQUARED)
    mate = agent("g1-1", RATE)
    proposal = Operators((1, 1)).propose(request(parent, mate=mate), Random(0))
    assert proposal.n_new == 1
    assert "nothing to merge from g1-1" in proposal.summary


def test_a_merge_that_was_objected_to_gets_a_drawn_edit_on_top() -> None:
    parent, mate = agent("g1-0", SQUARED), agent("g1-1", UNTIED)
    plain = Operators().propose(request(parent, mate=mate), Random(0))
    more = Operators().propose(request(parent, mate=mate, objections=("seen before",)), Random(1))
    assert more.n_new == plain.n_new + 1
    assert more.genome.id != plain.genome.id


def test_a_repair_drops_the_last_edit_and_makes_the_others_again() -> None:
    operators = Operators((3, 3))
    failed = operators.propose(request(), Random(4))
    mended = operators.repair(request(), failed, CRASH, Random(5))
    assert mended.new_edits == failed.new_edits[:-1]
    genome = BASE
    for edit in mended.new_edits:
        genome = EDITS[edit.operator].apply(genome, edit.parameters)
    assert mended.genome == genome
    assert f"dropped {EDITS[failed.new_edits[-1].operator].title}" in mended.summary


def test_a_repair_of_a_single_edit_has_nothing_left() -> None:
    operators = Operators((1, 1))
    failed = operators.propose(request(), Random(4))
    with pytest.raises(EditFailed) as refusal:
        operators.repair(request(), failed, CRASH, Random(5))
    assert refusal.value.reason is Reason.NOTHING_TO_EDIT


def test_a_repair_of_a_single_merged_edit_draws_another() -> None:
    asked = request(agent("g1-0", SQUARED), mate=agent("g1-1", UNTIED))
    operators = Operators((1, 1))
    failed = operators.propose(asked, Random(0))
    for seed in range(10):
        mended = operators.repair(asked, failed, CRASH, Random(seed))
        assert mended.n_new == 1
        assert mended.new_edits != failed.new_edits
        assert "dropped untied output head" in mended.summary


@pytest.mark.parametrize("numbers", [(0, 1), (2, 1), (-1, -1)])
def test_impossible_numbers_of_edits_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"mutator\.edits_per_child"):
        Operators(numbers)


# --- how edits are weighted -------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]
SCORES = st.none() | st.floats(-50, 50) | st.just(math.nan)
LESSONS = st.lists(
    st.builds(
        lambda names, status, z: Lesson(
            "i", 1, "p", "e", tuple(Edit(n, "f", "w") for n in names), "", status, z_score=z
        ),
        st.lists(st.sampled_from([*NAMES, "unknown"]), max_size=3),
        st.sampled_from(Status),
        SCORES,
    ),
    max_size=12,
)


def lesson(name: str, z_score: float | None, status: Status = Status.OK) -> Lesson:
    return Lesson("i", 1, "p", "e", (Edit(name, "f", "w"),), "", status, z_score=z_score)


def test_without_lessons_every_edit_is_as_likely() -> None:
    assert edit_weights(NAMES, []) == pytest.approx(dict.fromkeys(NAMES, 0.25))


@given(LESSONS)
def test_weights_sum_to_one_and_no_edit_falls_below_its_floor(lessons: list[Lesson]) -> None:
    weights = edit_weights(NAMES, lessons)
    assert weights.keys() == set(NAMES)
    assert math.fsum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= EXPLORATION / len(NAMES)


@given(LESSONS, st.sampled_from(NAMES), st.floats(-10, 10), st.floats(0, 10))
def test_a_better_outcome_never_makes_an_edit_less_likely(
    lessons: list[Lesson], name: str, z_score: float, more: float
) -> None:
    worse = edit_weights(NAMES, [*lessons, lesson(name, z_score)])
    better = edit_weights(NAMES, [*lessons, lesson(name, z_score + more)])
    assert better[name] >= worse[name] - 1e-12
    for other in set(NAMES) - {name}:
        assert better[other] <= worse[other] + 1e-12


def test_what_helped_is_likelier_than_the_untried_and_that_than_what_failed() -> None:
    weights = edit_weights(NAMES, [lesson("a", 2.5), lesson("b", None, Status.CRASHED)])
    assert weights["a"] > weights["c"] == weights["d"] > weights["b"]


def test_one_wild_outcome_counts_no_more_than_a_clear_one() -> None:
    assert edit_weights(NAMES, [lesson("a", 1e9)]) == edit_weights(NAMES, [lesson("a", LARGEST_Z)])


def test_what_was_tried_without_effect_is_less_likely_than_the_untried() -> None:
    weights = edit_weights(NAMES, [lesson("a", 0.0)])
    assert weights["a"] < weights["b"] == weights["c"]


CHEAP = ["higher_rate", "lower_rate", "betas", "weight_decay", "untied_head"]  # settings alone


def drawn_with(*lessons: Lesson) -> Counter[str]:
    operators = Operators((1, 1), only=CHEAP)
    return Counter(
        operators.propose(request(lessons=lessons), Random(seed)).new_edits[0].operator
        for seed in range(150)
    )


def test_without_lessons_draws_are_even() -> None:
    """memory=off offers no lessons, and lessons are all that the rule looks at."""
    drawn = drawn_with()
    assert set(drawn) == set(CHEAP)
    assert 12 < min(drawn.values()) <= max(drawn.values()) < 50  # an even draw gives 30 each


def test_what_helped_is_drawn_often_and_what_harmed_seldom() -> None:
    drawn = drawn_with(lesson("betas", 5.0), lesson("untied_head", -5.0))
    assert drawn["betas"] > 75 > 20 > drawn["untied_head"]


# --- fewer edits ------------------------------------------------------------------------------


def test_only_the_edits_that_are_named_are_drawn() -> None:
    by_name = Operators((1, 1), only=["squared_relu", "rotary"])
    assert set(by_name.names) == {"squared_relu", "rotary"}
    by_topic = Operators((1, 2), only=["peak rate", "betas"])
    assert set(by_topic.names) == {"higher_rate", "lower_rate", "betas"}
    for seed in range(10):
        drawn = by_topic.propose(request(), Random(seed))
        assert set(operators_of(drawn.new_edits)) <= set(by_topic.names)


def test_edits_can_be_left_out_by_name_or_topic() -> None:
    names = Operators(without=["batch", "rotary"]).names
    assert set(EDITS) - set(names) >= {"larger_batch", "smaller_batch", "rotary"}
    assert "higher_rate" in names


@pytest.mark.parametrize(
    ("only", "without", "told"),
    [
        (["no_such_edit"], [], r"mutator\.only: 'no_such_edit'"),
        ([], ["batsh"], r"mutator\.without: 'batsh'"),
        (["rotary"], ["rotary"], "leave no edit"),
    ],
)
def test_names_of_no_edit_are_refused(only: list[str], without: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Operators(only=only, without=without)


def test_recorded_edits_are_made_again_and_those_that_do_not_fit_are_named() -> None:
    unknown = Edit("gpt", "model.py", "why")
    genome, left_out = reapply(BASE, [SQUARED, RATE, SQUARED, unknown])
    assert genome == agent("x", SQUARED, RATE).genome
    assert left_out == [SQUARED, unknown]


def test_repeated_evidence_counts_for_more_than_one_outcome() -> None:
    once = edit_weights(NAMES, [lesson("a", 2.0)])
    thrice = edit_weights(NAMES, [lesson("a", 2.0)] * 3)
    assert thrice["a"] > once["a"] > 0.25


@pytest.mark.parametrize("status", [Status.INFRA_LOST, Status.DUPLICATE])
def test_what_says_nothing_about_the_edit_changes_nothing(status: Status) -> None:
    assert edit_weights(NAMES, [lesson("a", None, status)]) == edit_weights(NAMES, [])


# --- no mutation ------------------------------------------------------------------------------


def test_no_mutation_hands_on_the_parent() -> None:
    parent = agent("g1-0", RATE)
    proposal = NoMutation().propose(request(parent), Random(0))
    assert proposal.genome is parent.genome
    assert proposal.edits == parent.edits
    assert proposal.n_new == 0
    with pytest.raises(EditFailed):
        NoMutation().repair(request(parent), proposal, CRASH, Random(0))


# --- scripts ----------------------------------------------------------------------------------


def test_a_script_plays_its_steps_by_ordinal_over_and_over() -> None:
    script = a_script()
    played = [script.propose(request(ordinal=n), Random(n)) for n in range(8)]
    assert settings_of(played[0])["learning_rate"] == pytest.approx(0.006)
    assert "F.relu" in played[1].genome.as_dict["model.py"]
    assert played[2].genome.as_dict["note.txt"] == "hello\n"
    assert played[3].genome == BASE
    assert [proposal.n_new for proposal in played[:4]] == [1, 1, 1, 0]
    assert played[4:] == played[:4]


def test_a_script_of_built_in_edits_alone_is_trusted() -> None:
    built_in = ScriptedStep(operator="squared_relu")
    free = ScriptedStep(file="model.py", text="x = 1\n")
    assert Scripted([built_in, ScriptedStep(copy=True)]).trusted
    assert not Scripted([built_in, free]).trusted
    assert not Scripted([built_in], [free]).trusted


def test_a_script_repairs_the_failed_code_or_says_that_it_cannot() -> None:
    script = a_script()
    failed = script.propose(request(ordinal=2), Random(0))
    mended = script.repair(request(ordinal=2), failed, CRASH, Random(0))
    assert mended.genome.as_dict["note.txt"] == "mended\n"
    assert mended.n_new == 2
    with pytest.raises(EditFailed):
        Scripted([ScriptedStep(copy=True)]).repair(request(), failed, CRASH, Random(0))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (ScriptedStep(file="model.py", search="no such text", replace=""), Reason.DOES_NOT_APPLY),
        (ScriptedStep(file="model.py", search="self", replace=""), Reason.DOES_NOT_APPLY),
        (ScriptedStep(file="gone.py", search="self", replace=""), Reason.DOES_NOT_APPLY),
        (ScriptedStep(file="../away.py", text=""), Reason.FORBIDDEN_PATH),
        (ScriptedStep(operator="higher_rate", parameters={"factor": 1e9}), Reason.DOES_NOT_APPLY),
        (ScriptedStep(operator="higher_rate"), Reason.DOES_NOT_APPLY),
        (ScriptedStep(operator="qk_norm", parameters={"norm": "x)"}), Reason.DOES_NOT_APPLY),
        (ScriptedStep(operator="muon"), Reason.DOES_NOT_APPLY),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_its_reason(
    step: ScriptedStep, reason: Reason
) -> None:
    with pytest.raises(EditFailed) as refusal:
        Scripted([step]).propose(request(), Random(0))
    assert refusal.value.reason is reason


def test_a_script_is_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(
        """
        steps:
          - {operator: higher_rate, parameters: {factor: 1.5}}
          - {file: model.py, search: F.gelu, replace: F.relu}
          - file: note.txt
            text: |
              hello
          - {copy: true}
        repairs:
          - file: note.txt
            text: |
              mended
        """
    )
    script = Scripted.from_file(file)
    assert script.steps == a_script().steps
    assert script.repairs == a_script().repairs
    file.write_text("- {copy: true}\n")
    assert Scripted.from_file(file).steps == (ScriptedStep(copy=True),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("steps: [", "script.yaml"),
        ("steps: []", "holds no step"),
        ("steps: 3", "steps is not a list"),
        ("step: []", "expected `steps`"),
        ("3", "expected `steps`"),
        ("- {copy: true}\n- {operator: fly}", r"steps 2: there is no built-in edit 'fly'"),
        ("- 3", "steps 1: a step is a mapping, not int"),
        ("- {file: a.py}", "steps 1: a step holds one of"),
        ("- {file: a.py, text: x, search: y}", "steps 1: a step holds one of"),
        ("- {file: 3, text: x}", "steps 1: file cannot be 3"),
        ("- {copy: false}", "steps 1: a step holds one of"),
        ("- {operater: muon}", "steps 1: a step knows no key operater"),
        ("steps: [{copy: true}]\nrepairs: [{operator: fly}]", "repairs 1: there is no"),
    ],
)
def test_a_wrong_script_is_refused_naming_file_and_step(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "script.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=complaint) as refusal:
        Scripted.from_file(file)
    assert str(file) in str(refusal.value)


def test_a_missing_script_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.yaml"):
        Scripted.from_file(tmp_path / "gone.yaml")
