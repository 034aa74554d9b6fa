"""A comparison as people and programs read it: on a terminal, in Markdown, as JSON.

Reads: a Comparison. Writes: nothing; it returns what is to be shown.
Never: shows a number for what was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from darwin_exp.compare.comparison import MEASURES, Cohort, Comparison, Measure, Setting
from darwin_exp.wording import clean

READING_AID = (
    "Mean ± sample standard deviation over finished runs; a gain is positive when better; "
    "– is unknown. No significance is tested here."
)
UNKNOWN = "–"
SHOWN = ("improvement_percent", "test_perplexity", "equal_steps_percent", "mfu_percent")
COUNTS = ("ok", "failed", "duplicates")
BY_NAME = {measure.name: measure for measure in MEASURES}
HEADINGS = (
    "setting",
    "runs",
    *(BY_NAME[name].heading for name in SHOWN),
    BY_NAME["best_val_perplexity"].heading,
    " / ".join(COUNTS),
    BY_NAME["seconds"].heading,
)

BRIEF_HEADINGS = (
    "runs",
    "test ppl, gain %",
    "test ppl",
    "at equal steps %",
    "MFU, change %",
    "best val ppl",
    "ok/failed/dupl.",
    "seconds",
)
WIDE = 130  # columns that a line of the table takes where nothing is broken


def rich_table(comparison: Comparison, columns: int = WIDE) -> RenderableType:
    """Return the comparison for a terminal of so many columns: on a narrow one, turned on its side.

    On a wide one a setting is a row, as in Markdown.
    """
    parts: list[RenderableType] = []
    for cohort in comparison.cohorts:
        table = Table(
            title=Text(clean(_title(comparison, cohort))),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        rows = [[clean(cell) for cell in row_of(setting)] for setting in cohort.settings]
        if columns >= WIDE:
            headings: Sequence[str] = HEADINGS
        else:
            headings = ["", *(_broken(row[0]) for row in rows)]
            cells = zip(BRIEF_HEADINGS, *(row[1:] for row in rows), strict=True)
            rows = [list(row) for row in cells]
        for k, heading in enumerate(headings):
            table.add_column(Text(heading), justify="right" if k else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    parts.append(Text(READING_AID, style="dim"))
    parts += [Text(f"Note: {clean(note)}", style="yellow") for note in comparison.notes]
    return Group(*parts)


def _broken(label: str) -> str:
    """Break a setting's name where a reader would, so that its column stays narrow."""
    words = label.split(" ")
    return "\n".join(word.replace("=", "=\n", 1) if len(word) > 14 else word for word in words)


def markdown(comparison: Comparison) -> str:
    """Return the same for docs."""
    lines: list[str] = []
    for cohort in comparison.cohorts:
        lines += [f"### {_title(comparison, cohort)}", ""]
        lines.append(_markdown_row(HEADINGS))
        lines.append("|---|" + "---:|" * (len(HEADINGS) - 1))
        lines += [_markdown_row(row_of(setting)) for setting in cohort.settings]
        lines.append("")
    lines += [READING_AID, ""]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join(lines).rstrip() + "\n"


def csv(comparison: Comparison) -> str:
    """Return every mean, spread and n as comma-separated values, a setting a line."""
    import csv as csv_module
    import io

    file = io.StringIO()
    writer = csv_module.writer(file)
    parts = ("mean", "sd", "n")
    own = [f"{measure.name}_{part}" for measure in MEASURES for part in parts]
    writer.writerow(["environment_id", "setting", "runs", "finished", *own])
    for cohort in comparison.cohorts:
        for setting in cohort.settings:
            spreads = [asdict(setting.spread(measure.name)) for measure in MEASURES]
            numbers = [spread[part] for spread in spreads for part in parts]
            counts = [len(setting.runs), len(setting.finished)]
            writer.writerow([cohort.environment_id, setting.label, *counts, *numbers])
    return file.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything that is known, run by run; what was not measured is None."""
    return {
        "title": comparison.title,
        "notes": list(comparison.notes),
        "cohorts": [
            {
                "environment_id": cohort.environment_id,
                "peak_flops": cohort.peak_flops,
                "settings": [_setting_as_json(setting) for setting in cohort.settings],
            }
            for cohort in comparison.cohorts
        ],
    }


def _setting_as_json(setting: Setting) -> dict[str, Any]:
    return {
        "label": setting.label,
        "keys": dict(setting.keys),
        "n_runs": len(setting.runs),
        "n_finished": len(setting.finished),
        "measures": {one.name: asdict(setting.spread(one.name)) for one in MEASURES},
        "best_so_far": [asdict(point) for point in setting.curve()],
        "runs": [asdict(run) for run in setting.runs],
    }


def row_of(setting: Setting) -> list[str]:
    """Return a setting's cells, in the order of HEADINGS."""
    n_finished, n_runs = len(setting.finished), len(setting.runs)
    counts = [setting.spread(name).mean for name in COUNTS]
    return [
        setting.label,
        str(n_runs) if n_finished == n_runs else f"{n_finished} of {n_runs}",
        *(_cell(setting, BY_NAME[name]) for name in SHOWN),
        _cell(setting, BY_NAME["best_val_perplexity"]),
        " / ".join(UNKNOWN if mean is None else f"{mean:.4g}" for mean in counts),
        _cell(setting, BY_NAME["seconds"]),
    ]


def _cell(setting: Setting, measure: Measure) -> str:
    spread = setting.spread(measure.name)
    if spread.mean is None:
        return UNKNOWN
    sign = "+" if measure.signed else ""
    words = f"{spread.mean:{sign}.{measure.digits}f}"
    if spread.sd is not None:
        words += f" ± {spread.sd:.{measure.digits}f}"
    return words if spread.n == len(setting.finished) else f"{words} (n={spread.n})"


def _title(comparison: Comparison, cohort: Cohort) -> str:
    if len(comparison.cohorts) == 1:
        return comparison.title
    return f"{comparison.title}, environment {cohort.environment_id}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
