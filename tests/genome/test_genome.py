"""Genomes are known by their content, and their patches apply."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.gates import objection
from darwin_exp.genome import Genome, parse_python
from darwin_exp.individual import Reason

BASE = {"train.py": "x = 1\n", "model.py": "y = 2\n", "settings.json": '{"a": 1}'}
# A form feed and a line separator end a line for Python's splitlines, and for no patch.
TEXTS = st.text(alphabet="abc \n\f\u2028", max_size=30)
TREES = st.dictionaries(
    st.sampled_from(["train.py", "new.py", "lib/with space.py", "lib/empty.py"]), TEXTS, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(before=TREES, after=TREES)
def test_a_patch_turns_one_genome_into_the_other_by_either_tool(
    tmp_path_factory: pytest.TempPathFactory, before: dict[str, str], after: dict[str, str]
) -> None:
    old, new = Genome.of({**BASE, **before}), Genome.of({**BASE, **after})
    patch = new.patch_from(old)
    assert (patch == "") == (old == new)
    if not patch:
        return
    for command in (["git", "apply", "-"], ["patch", "-p1", "-s"]):
        folder = tmp_path_factory.mktemp("genome")
        old.write_to(folder)
        subprocess.run(command, input=patch.encode(), cwd=folder, check=True)
        assert Genome.from_folder(folder) == new


def test_a_genome_is_the_same_after_a_round_trip_through_a_folder(tmp_path: Path) -> None:
    genome = Genome.of({**BASE, "lib/extra.py": "z = 3\n"})
    genome.write_to(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "train.py").write_text("stale")
    (tmp_path / "README.md").write_text("prose is no code")
    (tmp_path / "champion.patch").write_text("neither is a patch")
    assert Genome.from_folder(tmp_path) == genome
    assert Genome.from_folder(tmp_path).id == genome.id


def test_what_a_training_by_hand_leaves_is_no_part_of_the_genome(tmp_path: Path) -> None:
    genome = Genome.of({**BASE, "lib/out/code.py": "z = 3\n"})
    genome.write_to(tmp_path)
    (tmp_path / "out").mkdir()
    left = ["job.json", "requirements.txt", "model.json", "champion.patch", "README.md"]
    left += ["out/model.json", "out/notes.txt", "out/progress.jsonl", "out/model.safetensors"]
    for name in left:
        (tmp_path / name).write_text("left behind")
    assert Genome.from_folder(tmp_path) == genome


def test_line_breaks_of_other_systems_are_the_same_genome(tmp_path: Path) -> None:
    plain = Genome.of({**BASE, "train.py": "x = 1\ny = 2\n"})
    foreign = Genome.of({**BASE, "train.py": "x = 1\r\ny = 2\r"})
    assert foreign == plain
    plain.write_to(tmp_path)
    (tmp_path / "train.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert Genome.from_folder(tmp_path) == plain


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../train.py", "a/../../b.py", "", "a\\b.py", "./a.py", "a//b.py"),
        *("job.json", "lib/model.json", "out/a.py", ".hidden.py", "__pycache__/a.py"),
        *("notes.md", "weights.bin", "a\nb.py"),
    ],
)
def test_a_path_that_would_not_be_read_back_is_refused(path: str) -> None:
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


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param('"' + "Know then " * 300 + '"', id="a_long_text"),
        pytest.param(repr(bytes(range(256)) * 9), id="bytes"),
        pytest.param(hex(2**20_000), id="one_long_number"),
        pytest.param("[" + "0.25, " * 300 + "]", id="a_list_of_numbers"),
        pytest.param("{" + "".join(f"{k}: [1, 2], " for k in range(200)) + "}", id="a_table"),
        pytest.param(
            "[" + ", ".join(f"x{k} == {'ab' * 60!r}" for k in range(150)) + "]", id="many"
        ),
    ],
)
def test_b26_data_in_the_place_of_code_is_refused_before_it_trains(hidden: str) -> None:
    parent = Genome.of(BASE)
    found = objection(parent.with_files({"model.py": f"y = {hidden}\n"}), parent)
    assert found is not None
    assert found[0] is Reason.HIDDEN_DATA
    # What a base genome brings is its own affair, and its children may keep it.
    bearer = Genome.of({**BASE, "model.py": f"y = {hidden}\n"})
    assert objection(bearer.with_files({"train.py": "x = 5\n"}), bearer) is None


def test_b26_a_genome_cannot_grow_without_end_nor_hide_data_in_its_settings() -> None:
    parent = Genome.of(BASE)
    for changed in (
        {"train.py": "".join(f"x{k} = y + {k}\n" for k in range(15_000))},
        {"settings.json": json.dumps({"a": [0.5] * 5_000})},
    ):
        found = objection(parent.with_files(changed), parent)
        assert found is not None
        assert found[0] is Reason.HIDDEN_DATA


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import socket\n", "socket"),
        ("def f():\n    from urllib.request import urlopen\n", "urllib"),
        ("try:\n    import subprocess as s\nexcept ImportError:\n    pass\n", "subprocess"),
        ("import transformers\n", "not installed"),
        ("from flash_attn.ops import fused\n", "not installed"),
    ],
)
def test_f9_an_import_that_training_code_has_no_need_of_is_turned_down(
    code: str, named: str
) -> None:
    parent = Genome.of(BASE)
    found = objection(parent.with_files({"train.py": code}), parent)
    assert found is not None
    assert found[0] is Reason.FORBIDDEN_IMPORT
    assert named in found[1]
    # A base genome's own imports are its own affair.
    bearer = Genome.of({**BASE, "model.py": code})
    assert objection(bearer.with_files({"train.py": code}), bearer) is None


def test_a_rewrite_may_import_its_own_files_and_what_is_installed() -> None:
    parent = Genome.of(BASE)
    code = "import math\nimport torch.nn.functional as F\nimport layers\nfrom .parts import x\n"
    child = parent.with_files({"train.py": code, "layers.py": "y = 1\n", "parts/x.py": "z = 1\n"})
    assert objection(child, parent) is None


@pytest.mark.parametrize("code", ["-" * 7000 + "1", "not " * 7000 + "1", "(" * 300 + ")" * 300])
def test_code_that_is_nested_too_deeply_is_turned_down_and_breaks_nothing(code: str) -> None:
    parent = Genome.of(BASE)
    found = objection(parent.with_files({"train.py": f"x = {code}\n"}), parent)
    assert found is not None
    assert found[0] is Reason.SYNTAX


def test_a_parsing_that_another_thread_disturbed_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, disturbed = ast.parse, [SystemError("recursion depth mismatch")] * 3

    def parse(text: str) -> ast.Module:
        if disturbed:
            raise disturbed.pop()
        return real(text)

    monkeypatch.setattr(ast, "parse", parse)
    assert isinstance(parse_python("x = 1"), ast.Module)
    disturbed += [SystemError("recursion depth mismatch")] * 100
    with pytest.raises(SystemError):
        parse_python("x = 1")
