"""How long the report of a long run takes: `make bench` prints it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.report.long_journal import LongJournal


def test_the_report_of_a_thousand_individuals(benchmark: Any, tmp_path: Path) -> None:
    """Time the command as it is typed: a process of its own, its imports and all pictures."""
    run = LongJournal(tmp_path / "long", 1000).write()
    command = [sys.executable, "-m", "darwin_exp.report", str(run)]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=3)
    assert len(list((run / "plots").iterdir())) == 6
    benchmark.extra_info["page bytes"] = (run / "report.html").stat().st_size
