"""Leaves out what is marked `edits` unless it is asked for, and counts what was tried of it."""

from __future__ import annotations

import pytest

COMPOSITIONS = "test_a_composition_trains_and_serves["


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the compositions, which take minutes, unless `-m` names them."""
    if "edits" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("edits")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many compositions were tried, and how many of them did not fit."""
    counts = {
        outcome: sum(
            COMPOSITIONS in report.nodeid for report in terminalreporter.getreports(outcome)
        )
        for outcome in ("passed", "skipped", "failed", "error")
    }
    if tried := sum(counts.values()):
        terminalreporter.write_line(
            f"{tried} compositions of edits tried: {counts['passed']} trained and served,"
            f" {counts['skipped']} did not fit, {counts['failed'] + counts['error']} failed"
        )
