"""The threat model's table says what the tests try, and the tests leave no case out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from tests.attacks.tally import case_of, summary

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "threat-model.md"
CASES = [
    f"{letter}{n}" for letter, last in (("A", 20), ("B", 29), ("C", 9)) for n in range(1, last + 1)
]


def _tests() -> list[str]:
    names = []
    for path in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names += [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return names


def test_every_case_of_the_catalogue_has_a_test_and_a_promise(promises: dict[str, Any]) -> None:
    assert {case for name in _tests() if (case := case_of(name))} == set(CASES)
    assert set(promises) == set(CASES)


def test_as_many_defences_are_switched_off_as_is_told() -> None:
    controlled = {name.split("_")[2] for name in _tests() if name.startswith("test_control_")}
    assert {case.lower() for case in CASES} >= controlled
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    told = re.search(r"for (\d+) of these (\d+) cases", text)
    assert told is not None
    assert [int(number) for number in told.groups()] == [len(controlled), len(CASES)]


def test_the_threat_model_promises_what_is_tested_and_nothing_else(
    promises: dict[str, Any],
) -> None:
    rows: dict[str, tuple[str, ...]] = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"[ABC]\d+", cells[0]):
            assert cells[0] not in rows, f"{cells[0]} stands in two rows"
            rows[cells[0]] = tuple(cells[2:])
    expected = {}
    for case, promise in promises.items():
        cells = ["yes" if kind in promise.kinds else "no" for kind in ("process", "bubblewrap")]
        if promise.as_root:
            cells[0] = "root"
        cells.append("yes" if "docker" in promise.kinds else "no")
        expected[case] = (*cells, promise.otherwise)
    assert rows == expected


def test_the_summary_counts_every_case_once() -> None:
    place = "tests/attacks/test_attacks_on_the_sandbox.py::test_"
    ran = [f"{place}a1_x[docker]", f"{place}a1_x[process]", f"{place}a2_x[process]"]
    ran += [f"{place}b13_x", f"{place}b8_x[docker-model]", f"{place}control_a4_x", "tests/a.py::b"]
    skipped = [(f"{place}a2_x[docker]", "no engine"), (f"{place}a16_x[docker]", "no GPU")]
    skipped += [(f"{place}a3_x[docker]", "no engine"), (f"{place}a1_x[bubblewrap]", "no bwrap")]
    assert summary(ran, skipped) == (
        "attacks: 6 cases, 2 run on docker, 1 without a sandbox, 3 skipped: "
        "A2, A3 (no engine); A16 (no GPU)"
    )
