"""A champion comes apart into its edits where they can be made again, else into hunks."""

import json
from pathlib import Path

import pytest

from darwin_exp.ablate.dissection import Dissection, take_apart
from darwin_exp.individual import Edit, Genome
from darwin_exp.mutation import EDITS, reapply

TRAINER = Path(__file__).parents[2] / "trainer_base"
SETTINGS = {
    "n_layers": 2, "n_heads": 2, "width": 32, "dropout": 0.0, "bias": False, "tied_head": True,
    "batch_size": 4, "accumulation_steps": 1, "learning_rate": 0.001, "final_rate_fraction": 0.1,
    "warmup_fraction": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1,
    "gradient_clip": 1.0, "precision": "float32", "compile": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Genome:
    trainer = Genome.from_folder(TRAINER)
    return trainer.with_files({"settings.json": json.dumps(SETTINGS, indent=2) + "\n"})


def edit(name: str, **parameters: object) -> Edit:
    return EDITS[name].recorded(parameters)


def part_names(dissection: Dissection) -> list[str]:
    return [part.name for part in dissection.parts]


def test_built_in_edits_are_parts_and_each_is_removed_alone(base: Genome) -> None:
    edits = [edit("higher_rate", factor=2.0), edit("squared_relu"), edit("lower_rate", factor=0.7)]
    champion, _ = reapply(base, edits)
    dissection = take_apart(base, champion, edits)
    assert part_names(dissection) == ["higher_rate", "squared_relu", "lower_rate"]
    for k, part in enumerate(dissection.parts):
        assert part.kind == "edit"
        assert part.without == reapply(base, edits[:k] + edits[k + 1 :])[0]
        assert (part.same, part.flaw, part.note) == (False, "", "")
    assert json.loads(dissection.parts[0].without.as_dict["settings.json"])["learning_rate"] == (
        pytest.approx(0.0007)
    )
    assert "0.001 -> 0.002" in dissection.parts[0].what
    assert dissection.rebuild(part_names(dissection)) == (base, [])
    assert dissection.rebuild([]) == (champion, [])


def test_an_edit_that_needs_the_removed_one_goes_with_it_and_is_named(base: Genome) -> None:
    # Without the first, the last would set what stands there already.
    edits = [edit("weight_decay", value=0.3), edit("untied_head"), edit("weight_decay", value=0.1)]
    champion, left_out = reapply(base, edits)
    assert left_out == []
    parts = {part.name: part for part in take_apart(base, champion, edits).parts}
    assert set(parts) == {"weight_decay 1", "untied_head", "weight_decay 2"}
    assert "takes weight_decay 2 with it" in parts["weight_decay 1"].note
    assert parts["weight_decay 1"].same, "both together change nothing"
    assert not parts["weight_decay 2"].same


def test_an_edit_that_a_later_one_overwrites_is_known_to_change_nothing(base: Genome) -> None:
    edits = [edit("weight_decay", value=0.3), edit("weight_decay", value=0.03)]
    champion, _ = reapply(base, edits)
    first, second = take_apart(base, champion, edits).parts
    assert first.same
    assert "same code" in first.note
    assert not second.same


def test_code_that_the_edits_do_not_lead_to_is_taken_apart_by_hunks(base: Genome) -> None:
    edits = [edit("higher_rate", factor=2.0)]
    champion, _ = reapply(base, edits)
    touched = champion.with_files({"train.py": champion.as_dict["train.py"] + "\nextra = 1\n"})
    kinds = {part.kind for part in take_apart(base, champion, edits).parts}
    assert kinds == {"edit"}
    dissection = take_apart(base, touched, edits)
    assert {part.kind for part in dissection.parts} == {"hunk"}
    assert {part.file for part in dissection.parts} == {"settings.json", "train.py"}
    written = [Edit("some-model", "train.py", "because")]
    assert {part.kind for part in take_apart(base, touched, written).parts} == {"hunk"}


def test_a_variant_that_does_not_parse_is_told_before_it_is_trained(base: Genome) -> None:
    far = "\n" * 10
    old = base.with_files({"extra.py": f"a = (\n1,\n{far}\n)\n"})
    new = base.with_files({"extra.py": f"a = [\n1,\n{far}\n]\n"})
    parts = take_apart(old, new, []).parts
    assert len(parts) == 2
    assert all("does not parse" in part.flaw for part in parts)
    assert not any(part.same for part in parts)


def test_a_comment_is_known_to_contribute_nothing(base: Genome) -> None:
    champion = base.with_files({"model.py": "# ours\n" + base.as_dict["model.py"]})
    (part,) = take_apart(base, champion, []).parts
    assert part.same
