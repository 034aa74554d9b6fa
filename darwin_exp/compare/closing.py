"""What is compared and where it is left: at the end of a sweep, and from the command line.

Reads: a sweep's folder, its runs' journals.
Writes: comparison.json, comparison.md, comparison.csv and curves.png; the sweep's run in MLflow.
Never: changes a run, or an exit code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from darwin_exp import summary
from darwin_exp.chronicle import Chronicle
from darwin_exp.compare.comparison import Comparison, compare
from darwin_exp.compare.curves import draw_curves
from darwin_exp.compare.tables import as_json, csv, markdown, rich_table
from darwin_exp.journal import JournalError
from darwin_exp.sweep import members, read_plan
from darwin_exp.tracking import SweepRecord, publish_sweep, store_of

Say = Callable[[str], None]
MLFLOW_STATUS = {
    summary.OK: "FINISHED",
    summary.LOST: "FINISHED",
    summary.CAPPED: "KILLED",
    summary.BY_SIGNAL: "KILLED",
}
WHAT_IS_PUBLISHED = ("improvement_percent", "test_perplexity", "mfu_percent", "best_val_perplexity")


@dataclass(frozen=True)
class Reading:
    """Chronicles that could be read, and a sentence on each that could not."""

    chronicles: tuple[Chronicle, ...]
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, run_folders: Iterable[Path]) -> Reading:
        """Read every run once."""
        chronicles, remarks = [], []
        for run_folder in dict.fromkeys(run_folders):
            try:
                chronicles.append(Chronicle.read(run_folder))
            except (JournalError, ValueError) as error:
                remarks.append(f"{run_folder.name} is left out: {error}")
        return cls(tuple(chronicles), tuple(remarks))

    @classmethod
    def of_sweeps(cls, folders: Sequence[Path]) -> Reading:
        """Read the newest run of every job of some sweeps."""
        runs: list[Path] = []
        remarks: list[str] = []
        for folder in folders:
            newest = {one.job: one.run_folder for one in members(folder)}
            runs += newest.values()
            plan = read_plan(folder)
            missing = [job for job in plan.jobs if job not in newest] if plan else []
            if plan and missing:
                labels = "; ".join(plan.label(job) for job in missing[:3])
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                remarks.append(
                    f"{len(missing)} of {len(plan.jobs)} jobs have no run: {labels}{more}"
                )
        reading = cls.of(runs)
        return cls(reading.chronicles, (*remarks, *reading.remarks))


def title_of(folder: Path) -> str:
    """Return a sweep's name and id."""
    plan = read_plan(folder)
    return f"sweep {folder.name} ({plan.name})" if plan else f"sweep {folder.name}"


def leave(comparison: Comparison, folder: Path) -> list[Path]:
    """Write a comparison's files into a folder and return them.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": json.dumps(as_json(comparison), indent=2) + "\n",
        "comparison.md": markdown(comparison),
        "comparison.csv": csv(comparison),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), draw_curves(comparison, folder / "curves.png")]


def close_sweep(folder: Path, code: int | None, console: Console | None, say: Say) -> None:
    """Compare a sweep, and let its run in MLflow end as the sweep did.

    Args:
        code: the sweep's exit code; None for one that may be going on elsewhere.
        console: where the table is shown; None leaves the comparing out.

    Raises:
        OSError: the sweep's folder cannot be written.
    """
    reading = Reading.of_sweeps([folder])
    if not reading.chronicles:
        return
    comparison, files = None, list[Path]()
    if console is not None:
        comparison = compare(reading.chronicles, title_of(folder), reading.remarks)
        files = leave(comparison, folder)
        console.print()
        console.print(rich_table(comparison, console.width))
        console.print(f"{folder}: comparison.md, .json, .csv and curves.png", style="dim")
    if any(one.config.get("tracking.name") == "mlflow" for one in reading.chronicles):
        _publish(folder, code, comparison, files, say)


def _publish(
    folder: Path, code: int | None, comparison: Comparison | None, files: list[Path], say: Say
) -> None:
    runs = {one.run_folder.parent for one in members(folder)}
    for place in runs:
        if not (place / "mlflow.sqlite").is_file():
            continue
        record = SweepRecord(
            status=None if code is None else MLFLOW_STATUS.get(code, "FAILED"),
            tags={} if code is None else {"darwin.exit_code": str(code)},
            curves={} if comparison is None else _curves(comparison),
            files=files,
            at=_written_at(folder),
        )
        try:
            publish_sweep(store_of(place), folder.name, record)
        except Exception as error:  # the files say the same, and the runs are safe
            say(f"MLflow was not told of the comparison: {type(error).__name__}: {error}")


def _curves(comparison: Comparison) -> dict[str, list[tuple[int, float]]]:
    """Return what MLflow draws; since points are kept, a name says which state it is about."""
    curves: dict[str, list[tuple[int, float]]] = {}
    several = len(comparison.cohorts) > 1
    for cohort in comparison.cohorts:
        for setting in cohort.settings:
            state = "".join(f"{run.run_id}{len(run.curve)}" for run in setting.finished)
            digest = hashlib.sha256(state.encode()).hexdigest()[:4]
            which = f"{setting.label}/{len(setting.finished)} runs {digest}"
            which += f" in {cohort.environment_id}" if several else ""
            curves[f"best_so_far/{which}"] = [
                (point.rewrites, point.mean) for point in setting.curve()
            ]
            for measure in WHAT_IS_PUBLISHED:
                mean = setting.spread(measure).mean
                curves[f"{measure}/{which}"] = [] if mean is None else [(0, mean)]
    return curves


def _written_at(folder: Path) -> int:
    """Return when the sweep's list last grew, in milliseconds, so that telling twice is once."""
    return int(1000 * (folder / "runs.jsonl").stat().st_mtime)
