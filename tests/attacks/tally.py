"""Counts attacks by case in the summary of a test run: what ran in containers, what was skipped.

A plugin of its own, brought in by tests/conftest.py, because the process that prints the summary
of a parallel run collects no tests, and so never loads the conftest.py beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

_NAME = re.compile(r"test_([abc]\d+)_")
_OF_A_KIND = re.compile(r"\[(?:[^\]]*-)?(process|bubblewrap|docker)(?:-[^\]]*)?\]$")


def case_of(name: str) -> str | None:
    """Return the case that a test is about, such as "A4", by its name; None for a control."""
    found = _NAME.match(name)
    return found[1].upper() if found else None


def summary(ran: Iterable[str], skipped: Iterable[tuple[str, str]]) -> str:
    """Say in one line what became of the cases.

    Args:
        ran: node ids of the tests that ran.
        skipped: node ids of those that did not, and why.
    """
    in_docker: set[str] = set()
    bare: set[str] = set()
    seen: set[str] = set()
    for node in ran:
        if case := _case_of_node(node):
            seen.add(case)
            kind = _OF_A_KIND.search(node)
            if kind is None:
                bare.add(case)
            elif kind[1] == "docker":
                in_docker.add(case)
    reasons: dict[str, set[str]] = {}
    for node, reason in skipped:
        case = _case_of_node(node)
        if case:
            seen.add(case)
            kind = _OF_A_KIND.search(node)
            if case not in in_docker | bare and (kind is None or kind[1] == "docker"):
                reasons.setdefault(reason, set()).add(case)
    left = {case for cases in reasons.values() for case in cases}
    parts = [f"{len(seen)} cases", f"{len(in_docker)} run on docker"]
    parts += [f"{len(bare - in_docker)} without a sandbox", f"{len(left)} skipped"]
    why = "; ".join(f"{', '.join(_sorted(cases))} ({why})" for why, cases in reasons.items())
    return f"attacks: {', '.join(parts)}{f': {why}' if why else ''}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the line, where any attack was carried out."""
    stats: Mapping[str, list[Any]] = terminalreporter.stats
    ran = [one.nodeid for key in ("passed", "failed", "error") for one in _tests(stats, key)]
    skipped = [(one.nodeid, _reason(one)) for one in _tests(stats, "skipped")]
    if any(map(_case_of_node, [*ran, *(node for node, _ in skipped)])):
        terminalreporter.write_line(summary(ran, skipped))


def _tests(stats: Mapping[str, list[Any]], key: str) -> list[pytest.TestReport]:
    return [one for one in stats.get(key, []) if isinstance(one, pytest.TestReport)]


def _reason(report: pytest.TestReport) -> str:
    place = report.longrepr
    reason = place[2] if isinstance(place, tuple) else str(place)
    return reason.removeprefix("Skipped: ")


def _case_of_node(node: str) -> str | None:
    path, _, name = node.partition("::")
    return case_of(name.rpartition("::")[2]) if "attacks/" in path else None


def _sorted(cases: Iterable[str]) -> list[str]:
    return sorted(cases, key=lambda case: (case[0], int(case[1:])))
