"""G3: approved files stay inside the genome's tree, under names that mislead nobody."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.genome import Genome
from darwin_exp.hitl.paths import PathRefused, all_allowed, allowed

TREE = ("train.py", "model.py", "layers/attention.py", "résumé.txt")
ODD = [
    *("", ".", "..", "/", "//", "/etc/passwd.py", "/model.py", "//host/model.py", "~/x.py"),
    *("../x.py", "layers/../../x.py", "layers/./x.py", "./x.py", "layers//x.py", "layers/x.py/"),
    *("layers/..", "a/../x.py", "..\\x.py", "layers\\x.py", "C:x.py", "C:\\x.py", "x.py:stream"),
    *("x\x00.py", "x\n.py", "x\t.py", "x\x1b[0m.py", "x\u202e.py", "x\u200b.py", "x\ufeff.py"),
    *(" x.py", "x.py ", "x y.py", "x.py.", "%2e%2e/x.py", "-x.py", ".hidden.py", "a/.git/x.py"),
    *("re\u0301sume\u0301.py", "r\u00e9sume.py", "mod\u0435l2.py", "\uff58.py", "x\u2215y.py"),
    *("x.so", "x.pth", "x", "out/x.py", "job.json", "requirements.txt", "__pycache__/x.py"),
    *("x" * 300 + ".py", "/".join("abcdefghi") + ".py", "\ud800.py"),
]
TWINS = [
    *("Model.py", "MODEL.PY", "mOdel.py", "Layers/attention.py", "Layers/new.py"),
    *("layers/Attention.py", "LAYERS/x.py"),
]


@pytest.mark.parametrize("path", ["new.py", "layers/new.py", "a/b/c.json", "x-1_2.v3.yaml"])
def test_g3_plain_names_inside_the_tree_are_allowed(path: str) -> None:
    assert allowed(path, TREE) == path


@pytest.mark.parametrize("path", TREE)
def test_g3_what_is_there_may_be_written_under_its_own_name(path: str) -> None:
    assert allowed(path, TREE) == path


@pytest.mark.parametrize("path", ODD)
def test_g3_what_leaves_the_tree_or_is_no_plain_name_is_refused(path: str) -> None:
    with pytest.raises(PathRefused):
        allowed(path, TREE)


@pytest.mark.parametrize("path", TWINS)
def test_g3_twins_by_case_are_refused(path: str) -> None:
    with pytest.raises(PathRefused, match="reads like"):
        allowed(path, TREE)


def test_g3_twins_by_normalisation_are_refused() -> None:
    """The new name is the plain one; the tree holds the odd form, as a user's own may."""
    for there in ("ﬁle.py", "ｆile.py", "FILE.py"):
        with pytest.raises(PathRefused, match="reads like"):
            allowed("file.py", ["train.py", there])
    decomposed = unicodedata.normalize("NFD", "résumé.txt")
    assert decomposed != "résumé.txt"
    with pytest.raises(PathRefused):
        allowed(decomposed, TREE)


@pytest.mark.parametrize(
    ("path", "why"), [("layers.py/x.py", None), ("model.py/x.py", "file"), ("layers", "folder")]
)
def test_g3_a_file_is_no_folder_and_a_folder_no_file(path: str, why: str | None) -> None:
    if why is None:
        assert allowed(path, TREE) == path
    else:
        with pytest.raises(PathRefused, match=why):
            allowed(path, TREE)


def test_g3_new_names_may_not_be_twins_of_one_another() -> None:
    assert all_allowed(["a.py", "b/c.py"], TREE) == ("a.py", "b/c.py")
    with pytest.raises(PathRefused, match="reads like"):
        all_allowed(["a.py", "A.py"], TREE)
    with pytest.raises(PathRefused, match="is a file"):
        all_allowed(["a.py", "a.py/b.py"], TREE)


@pytest.mark.parametrize("target", ["..", "/etc", "layers", "gone"])
def test_g3_no_part_of_a_path_may_be_a_link(tmp_path: Path, target: str) -> None:
    root = tmp_path / "code"
    (root / "layers").mkdir(parents=True)
    (root / "linked").symlink_to(target)
    assert allowed("layers/new.py", TREE, root) == "layers/new.py"
    with pytest.raises(PathRefused, match="symbolic link"):
        allowed("linked/new.py", TREE, root)


def test_g3_a_file_that_has_become_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").touch()
    root = tmp_path / "code"
    root.mkdir()
    (root / "model.py").symlink_to("../elsewhere.py")
    with pytest.raises(PathRefused, match="symbolic link"):
        allowed("model.py", TREE, root)


def test_g3_a_tree_that_is_itself_reached_by_a_link_is_no_attack(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "latest").symlink_to("code")
    assert allowed("new.py", TREE, tmp_path / "latest") == "new.py"


@given(path=st.text(st.sampled_from("ab./\\:~A-_ \n\u0301é") | st.characters(), max_size=12))
def test_g3_whatever_is_allowed_lies_in_the_tree_and_fits_a_genome(path: str) -> None:
    try:
        allowed(path, TREE)
    except PathRefused:
        return
    root = Path("/tree")
    assert Path("/tree", path).resolve().is_relative_to(root)
    held = Genome.of({**dict.fromkeys(TREE, ""), path: ""})
    assert path in held.as_dict
    folded = [name.casefold() for name in held.as_dict]
    assert len(set(folded)) == len(folded)
