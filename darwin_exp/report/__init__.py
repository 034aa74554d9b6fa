"""The report of a run: one self-contained page and its pictures, from what was recorded.

Reads: runs/RUN_ID/journal.sqlite, and ablation/summary.json where there is one.
Writes: runs/RUN_ID/report.html and runs/RUN_ID/plots/*.png.
Never: asks the network, MLflow or the run's other files for anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from darwin_exp.chronicle import Chronicle

FILE_NAME = "report.html"


def write_report(run_folder: Path, status: str | None = None) -> Path:
    """Write a run's page and pictures, also while the run goes on, and return the page's path.

    Args:
        status: how the run ended (finished, interrupted, stopped, failed), for a caller that has
            not journaled it yet; None takes what the journal says.

    Raises:
        JournalError: there is no journal, or it is damaged.
        ValueError: the run had not begun when its journal ends.
        OSError: the folder cannot be written.
    """
    return write_from(Chronicle.read(run_folder), run_folder, status)


def write_from(chronicle: Chronicle, run_folder: Path, status: str | None = None) -> Path:
    """Write page and pictures of a chronicle that was read already; see `write_report`.

    Raises:
        OSError: the folder cannot be written.
    """
    from darwin_exp.report.facts import gather
    from darwin_exp.report.page import render
    from darwin_exp.report.pictures import draw

    facts = gather(chronicle, run_folder, status)
    page = run_folder / FILE_NAME
    # Readers see the old page or the new one, also when two processes write at once.
    fresh = page.with_name(f".{page.name}.{os.getpid()}")
    try:
        fresh.write_text(render(facts), encoding="utf-8", errors="replace")
        fresh.replace(page)
    finally:
        fresh.unlink(missing_ok=True)
    draw(facts, run_folder / "plots")
    return page
