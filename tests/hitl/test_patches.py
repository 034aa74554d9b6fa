"""Patches that people changed: what `patch_from` writes is applied exactly, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.hitl.asked import Refused, edit_content
from darwin_exp.hitl.patches import applied, check_change
from darwin_exp.individual import Genome

PARENT = Genome.of({"train.py": "a = 1\nb = 2\nc = 3\n", "model.py": "x = 1\n"})
LINES = st.lists(st.sampled_from(["a = 1\n", "b = 2\n", "\n", "- c\n", "+ d\n", "@@ e\n", " f\n"]))
ENDS = st.sampled_from(["", "last", "-- last"])
TEXTS = st.builds(lambda lines, end: "".join(lines) + end, LINES, ENDS)
TREES = st.dictionaries(st.sampled_from(["train.py", "model.py", "parts/a b.py"]), TEXTS)


@settings(max_examples=300, deadline=None)
@given(TREES, TREES)
def test_every_patch_between_two_genomes_leads_from_the_one_to_the_other(
    before: dict[str, str], after: dict[str, str]
) -> None:
    parent, child = Genome.of(before), Genome.of(after)
    if any(" " in path for path in after.keys() - before.keys()):
        return  # a new name with a space is refused: see test_paths.py
    assert applied(parent, child.patch_from(parent)) == child


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(
            "--- a/train.py\n+++ b/train.py\n@@ -1,2 +1,2 @@\n a = 1\n-b = 9\n+b = 3\n",
            id="other lines",
        ),
        pytest.param(
            "--- a/train.py\n+++ b/train.py\n@@ -2 +2 @@\n-a = 1\n+a = 2\n", id="another place"
        ),
        pytest.param(
            "--- a/train.py\n+++ b/train.py\n@@ -1,3 +1,1 @@\n-a = 1\n+a = 2\n", id="wrong count"
        ),
        pytest.param(
            "--- a/tune.py\n+++ b/tune.py\n@@ -1 +1 @@\n-a = 1\n+a = 2\n", id="no such file"
        ),
        pytest.param("--- /dev/null\n+++ b/model.py\n@@ -0,0 +1 @@\n+a = 2\n", id="there already"),
        pytest.param(
            "--- a/train.py\n+++ b/model.py\n@@ -1 +1 @@\n-a = 1\n+a = 2\n", id="over another"
        ),
        pytest.param("please use a larger batch\n", id="no diff"),
        pytest.param("--- a/train.py\n+++ b/train.py\n", id="no hunk"),
        pytest.param("--- a/train.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a = 1\n", id="half deleted"),
        pytest.param(
            "--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-a = 1\n+a = 2\n"
            "--- a/train.py\n+++ b/train.py\n@@ -2 +2 @@\n-b = 2\n+b = 3\n",
            id="twice",
        ),
        pytest.param("--- /dev/null\n+++ b/../evil.py\n@@ -0,0 +1 @@\n+a = 2\n", id="outside"),
        pytest.param("--- /dev/null\n+++ b//etc/evil.py\n@@ -0,0 +1 @@\n+a = 2\n", id="absolute"),
        pytest.param("--- /dev/null\n+++ b/Train.py\n@@ -0,0 +1 @@\n+a = 2\n", id="a twin"),
    ],
)
def test_g3_a_patch_that_does_not_fit_exactly_is_refused(patch: str) -> None:
    with pytest.raises(Refused):
        applied(PARENT, patch)


def test_a_change_keeps_the_lines_that_say_whose_it_is() -> None:
    child = PARENT.with_files({"model.py": "x = 2\n"})
    before = edit_content("g01-i00", "g00-i00", child.id, child.patch_from(PARENT))
    check_change(before.replace("+x = 2", "+x = 3"), before)
    with pytest.raises(Refused, match="first lines"):
        check_change(before.replace("g01-i00", "g01-i01"), before)
    with pytest.raises(Refused, match="unified diff"):
        check_change(f"{before}and make it faster\n", before)
    with pytest.raises(Refused, match="no change"):
        check_change(before.partition("---")[0], before)
