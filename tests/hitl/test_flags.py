"""What is out of the ordinary in a rewrite, however its lines are written."""

from __future__ import annotations

import pytest

from darwin_exp.hitl.flags import ORDINARY_WIDTH, why_flagged
from darwin_exp.individual import Genome

PARENT = Genome.of({"train.py": "import model\n\nrate = 1\n", "model.py": "x = 1\n"})


def rewritten(added: str) -> Genome:
    return PARENT.with_files({"train.py": PARENT.as_dict["train.py"] + added})


@pytest.mark.parametrize("sign", ["", "+", "++ ", "-- ", "+++ ", "--- ", "@@ -1 +1 @@ ", "\\ "])
def test_g2_lines_count_whatever_they_look_like_in_a_patch(sign: str) -> None:
    added = "".join(f"{sign}f({k})\n" for k in range(500))
    assert why_flagged(rewritten(added), PARENT, 80) == "500 changed lines"


def test_g2_removed_lines_that_look_like_a_head_count() -> None:
    long = rewritten("".join(f"-- f({k})\n" for k in range(500)))
    assert why_flagged(PARENT, long, 80) == "500 changed lines"


def test_g2_one_line_that_holds_a_program_is_flagged() -> None:
    added = "; ".join(f"f({k})" for k in range(2_000)) + "\n"
    words = why_flagged(rewritten(added), PARENT, 80)
    assert words == f"{len(added):,} characters in 1 changed lines"


def test_g2_control_an_ordinary_rewrite_is_not_flagged() -> None:
    ordinary = "x = 'a line as wide as lines are, and still an ordinary one'  # with its reason\n"
    assert len(ordinary) <= ORDINARY_WIDTH
    assert why_flagged(rewritten(80 * ordinary), PARENT, 80) == ""
    assert why_flagged(rewritten(81 * ordinary), PARENT, 80) == "81 changed lines"
    assert why_flagged(PARENT, PARENT, 80) == ""


def test_a_changed_line_counts_on_both_sides() -> None:
    changed = PARENT.with_files({"model.py": "x = 2\n"})
    assert why_flagged(changed, PARENT, 1) == "2 changed lines"
    assert why_flagged(changed, PARENT, 2) == ""


def test_files_that_come_and_go_are_named() -> None:
    changed = PARENT.with_files({"loss.py": "y = 1\n"}, ["model.py"])
    assert why_flagged(changed, PARENT, 80) == "a new file, loss.py; model.py is deleted"
