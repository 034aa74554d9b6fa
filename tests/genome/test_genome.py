"""Genomes are known by their content, and their patches apply."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.gates import objection
from darwin_exp.genome import Genome
from darwin_exp.individual import Reason

BASE = {"train.py": "x = 1\n", "model.py": "y = 2\n", "settings.json": '{"a": 1}'}
TEXTS = st.text(alphabet="abc \n", max_size=40)


@settings(max_examples=40, deadline=None)
@given(before=TEXTS, after=TEXTS)
def test_a_patch_turns_one_genome_into_the_other(
    tmp_path_factory: pytest.TempPathFactory, before: str, after: str
) -> None:
    old = Genome.of({**BASE, "train.py": before})
    new = Genome.of({**BASE, "train.py": after})
    patch = new.patch_from(old)
    assert (patch == "") == (before == after)
    if not patch:
        return
    folder = tmp_path_factory.mktemp("genome")
    old.write_to(folder)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=folder, check=True)
    assert (folder / "train.py").read_text() == after


def test_a_genome_is_the_same_after_a_round_trip_through_a_folder(tmp_path: Path) -> None:
    genome = Genome.of({**BASE, "lib/extra.py": "z = 3\n"})
    genome.write_to(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "train.py").write_text("stale")
    (tmp_path / "README.md").write_text("prose is no code")
    (tmp_path / "champion.patch").write_text("neither is a patch")
    assert Genome.from_folder(tmp_path) == genome
    assert Genome.from_folder(tmp_path).id == genome.id


@pytest.mark.parametrize("path", ["/etc/passwd", "../train.py", "a/../../b.py", "", "a\\b.py"])
def test_a_path_that_leaves_the_tree_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        Genome.of({**BASE, path: ""})


def test_a_folder_without_the_two_files_is_no_genome(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(ValueError, match=r"no model\.py"):
        Genome.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"train.py": "x ="}, Reason.SYNTAX),
        ({"settings.json": "{"}, Reason.SYNTAX),
        ({"train.py": "# a comment\nx = 1\n"}, Reason.NO_OP),
        ({"settings.json": '{ "a" : 1 }'}, Reason.NO_OP),
    ],
)
def test_the_gates_refuse_what_cannot_be_trained_or_is_no_edit(
    changed: dict[str, str], reason: Reason
) -> None:
    parent = Genome.of(BASE)
    found = objection(parent.with_files(changed), parent)
    assert found is not None
    assert found[0] is reason


def test_the_gates_let_a_real_edit_pass_and_miss_a_removed_file() -> None:
    parent = Genome.of(BASE)
    assert objection(parent.with_files({"train.py": "x = 2\n"}), parent) is None
    found = objection(parent.with_files({}, removed=["model.py"]), parent)
    assert found is not None
    assert found[0] is Reason.CONTRACT
