"""Rewrites: exactly what was asked for, all of it or nothing, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import Genome, Reason
from darwin_exp.mutation.rewriting import FileEdit, apply, replaced_once
from darwin_exp.protocols import EditFailed
from tests.mutation.at_hand import GENOME, MODEL, TRAIN


def refused(*edits: FileEdit, genome: Genome = GENOME) -> EditFailed:
    """Return how edits were refused, after checking that nothing came of them."""
    before = genome.files
    with pytest.raises(EditFailed) as refusal:
        apply(genome, edits)
    assert genome.files == before
    assert refusal.value.again
    assert str(refusal.value).partition("\n")[0]
    return refusal.value


def test_several_files_change_together_and_edits_of_one_file_follow_each_other() -> None:
    changed = apply(
        GENOME,
        [
            FileEdit("model.py", "F.gelu", "F.silu"),
            FileEdit("train.py", "RATE = 0.004\n", "RATE = 0.01\nFLOOR = 0.001\n"),
            FileEdit("train.py", "FLOOR = 0.001", "FLOOR = 0.002"),
            FileEdit("lib/extra.py", "", "x = 1\n"),
        ],
    )
    assert changed.as_dict["model.py"] == MODEL.replace("F.gelu", "F.silu")
    assert changed.as_dict["train.py"] == TRAIN.replace(
        "RATE = 0.004\n", "RATE = 0.01\nFLOOR = 0.002\n"
    )
    assert changed.as_dict["lib/extra.py"] == "x = 1\n"
    assert changed.as_dict["settings.json"] == GENOME.as_dict["settings.json"]


def test_an_empty_search_writes_the_whole_file() -> None:
    assert apply(GENOME, [FileEdit("train.py", "", "x = 1\n")]).as_dict["train.py"] == "x = 1\n"


def test_line_breaks_of_other_systems_are_read_as_the_genome_reads_them() -> None:
    edit = FileEdit("train.py", "WARM_UP = 0.05\r\nRATE", "WARM_UP = 0.1\r\nRATE")
    assert "WARM_UP = 0.1\nRATE" in apply(GENOME, [edit]).as_dict["train.py"]


def test_a_missing_last_line_break_is_the_only_leeway() -> None:
    assert replaced_once("a\nb", "b\n", "c\n", "x.py") == "a\nc"
    assert replaced_once("a\nb\n", "b", "c", "x.py") == "a\nc\n"
    for search in ("b \n", " b\n", "B\n", "\n\n"):
        with pytest.raises(EditFailed):
            replaced_once("a\nb", search, "c\n", "x.py")


@pytest.mark.parametrize(
    ("search", "told"),
    [
        ("RATE = 0.005\n", "closest is line 5 of train.py: 'RATE = 0.004'"),
        ("RATE=0.004\n", "line 5 of train.py differs from it in spaces alone"),
        ("        return RATE\n", "line 11 of train.py differs from it in spaces alone"),
        ("WARM_UP = 0.05\nimport sys\n", "not one after the other"),
        ("zzzzqqqq", "no line of train.py is like it"),
        ("RATE", "stands 3 times in train.py (from lines 5, 10, 11)"),
        ("e", "not once"),
    ],
)
def test_f8_a_search_that_does_not_fit_is_refused_with_what_would_mend_it(
    search: str, told: str
) -> None:
    refusal = refused(
        FileEdit("model.py", "F.gelu", "F.relu"), FileEdit("train.py", search, "x = 1\n")
    )
    assert refusal.reason is Reason.DOES_NOT_APPLY
    assert told in str(refusal)
    assert len(str(refusal)) < 1_000


def test_f8_of_several_edits_it_is_said_which_one_does_not_fit() -> None:
    fits, fails = FileEdit("model.py", "F.gelu", "F.relu"), FileEdit("model.py", "F.gulu", "F.x")
    whole = FileEdit("lib/extra.py", "", "x = 1\n")
    assert str(refused(fits, fails, whole)).startswith("edit 2 of 3: a search text stands nowhere")
    assert str(refused(whole, fits, FileEdit("/etc/x.py", "a", "b"))).startswith("edit 3 of 3: '/")
    # One alone needs no number, and whole files have their names.
    assert str(refused(fails)).startswith("a search text stands nowhere in model.py")
    assert str(refused(whole, whole)).startswith("an edit with an empty search writes all of lib/")


def test_f8_places_that_overlap_count_as_several() -> None:
    refusal = refused(FileEdit("x.py", "aa", "b"), genome=Genome.of({"x.py": "aaa"}))
    assert "stands 2 times" in str(refusal)


def test_f8_a_search_in_a_file_that_is_not_there_is_refused() -> None:
    refusal = refused(FileEdit("other.py", "x", "y"))
    assert refusal.reason is Reason.DOES_NOT_APPLY
    assert "no file other.py" in str(refusal)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../train.py",
        "a/../train.py",
        "./train.py",
        "a//b.py",
        "/etc/passwd.py",
        "/train.py",
        "train.py/",
        "a\\b.py",
        "CONTRACT.md",
        "run.sh",
        "train",
        ".hidden.py",
        "a/.git/config.txt",
        "__pycache__/x.py",
        "out/model.py",
        "job.json",
        "model.json",
        "requirements.txt",
        "Train.py",
        "TRAIN.PY",
        "ｔrain.py",
        "traın\u0301.py",
        "cafe\u0301.py",
        "train.py\n",
        "tr\u200bain.py",
        "tr\x00ain.py",
        "\ud800.py",
        "train.py/x.py",
        "x" * 300 + ".py",
        "Lib/y.py",
        "lib.py/z.py",
    ],
)
def test_f8_a_path_that_must_not_be_written_is_refused(path: str) -> None:
    genome = GENOME.with_files({"lib/x.py": "x = 1\n", "lib.py": ""})
    refusal = refused(
        FileEdit("model.py", "F.gelu", "F.relu"), FileEdit(path, "", "x = 2\n"), genome=genome
    )
    assert refusal.reason is Reason.FORBIDDEN_PATH
    assert len(str(refusal)) < 500


def test_f8_a_new_file_may_not_take_the_name_of_a_folder() -> None:
    genome = GENOME.with_files({"lib.py/x.py": "x = 1\n"})
    assert refused(FileEdit("lib.py", "", ""), genome=genome).reason is Reason.FORBIDDEN_PATH


def test_f8_two_new_files_may_not_differ_in_case_alone() -> None:
    refusal = refused(FileEdit("a.py", "", "x = 1\n"), FileEdit("A.py", "", "x = 2\n"))
    assert refusal.reason is Reason.FORBIDDEN_PATH


def test_new_files_that_training_code_may_have_are_allowed() -> None:
    paths = ["lib/deep/er.py", "extra.json", "a.toml", "b.yaml", "c.yml", "notes.txt", "é.py"]
    changed = apply(GENOME, [FileEdit(path, "", "1\n") for path in paths])
    assert set(paths) < changed.as_dict.keys()


@pytest.mark.parametrize(
    "edits",
    [
        [],
        [FileEdit("train.py", "RATE = 0.004", "RATE = 0.004")],
        [FileEdit("train.py", "", TRAIN)],
        [FileEdit("train.py", "", TRAIN.replace("\n", "\r\n"))],
        [FileEdit("train.py", "0.004", "0.1"), FileEdit("train.py", "0.1", "0.004")],
    ],
)
def test_f8_what_changes_nothing_is_refused(edits: list[FileEdit]) -> None:
    assert refused(*edits).reason is Reason.NO_OP


def test_f8_more_than_a_genome_holds_is_refused() -> None:
    refusal = refused(FileEdit("big.txt", "", "x" * 1_000_001))
    assert refusal.reason is Reason.DOES_NOT_APPLY


@pytest.mark.parametrize("line", ["=== end of train.py ===", "  === file: a.py ===", "===chunk: a"])
def test_f14_a_new_line_that_imitates_the_frame_of_a_file_is_refused(line: str) -> None:
    refusal = refused(FileEdit("train.py", "import sys\n", f"import sys\n'''\n{line}\n'''\n"))
    assert "mark of the prompt" in str(refusal)


def test_a_line_that_was_there_before_is_no_ones_doing_here() -> None:
    genome = Genome.of({"x.py": "'''\n=== end of x.py ===\n'''\na = 1\n"})
    assert "a = 2" in apply(genome, [FileEdit("x.py", "a = 1", "a = 2")]).as_dict["x.py"]


NAMES = st.sampled_from(["a.py", "b.py", "new.py", "A.py", "../c.py"])
TEXTS = st.text("ab\n", max_size=4)
EDITS = st.lists(st.builds(FileEdit, NAMES, TEXTS, TEXTS), max_size=5)


@given(st.dictionaries(st.sampled_from(["a.py", "b.py"]), TEXTS), EDITS)
def test_all_edits_are_made_or_none(files: dict[str, str], edits: list[FileEdit]) -> None:
    genome = Genome.of(files)
    before = files_of(genome)
    try:
        changed = apply(genome, edits)
    except EditFailed:
        assert files_of(genome) == before
        return
    expected = dict(files)
    for edit in edits:
        old = expected.get(edit.file)
        assert old is not None or not edit.search
        expected[edit.file] = _made(old or "", edit)
    assert changed == Genome.of(expected)
    assert changed != genome
    assert files_of(genome) == before


def _made(old: str, edit: FileEdit) -> str:
    """Return what one edit that was accepted must have made of a file."""
    if not edit.search:
        return edit.replace
    if edit.search in old:
        before, after = old.split(edit.search, 1)
        return before + edit.replace + after
    assert (old + "\n").endswith(edit.search)
    return (old + "\n").removesuffix(edit.search) + edit.replace.removesuffix("\n")


def files_of(genome: Genome) -> tuple[tuple[str, str], ...]:
    return tuple(genome.files)
