"""Counts what was tried of compositions of edits."""

from __future__ import annotations

import pytest

COMPOSITIONS = "test_a_composition_trains_and_serves["


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
