"""What a person sees of an ablation: a line per training, a bar on a terminal, a table at the end.

Reads: what the ablation tells it, and its summary. Writes: the terminal.
Never: decides anything, or passes on control characters that code or a model wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from darwin_exp.ablate.verdicts import PERPLEXITY
from darwin_exp.wording import clean, number

STYLES = {"pays": "green", "costs": "red", "fails": "yellow"}


class Display:
    """Shows an ablation. Safe to call from any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._mutex = threading.Lock()
        self._done = self._total = 0
        self._bar: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("trainings"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("trainings", total=None)

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def note(self, message: str) -> None:
        """Say something that must not be missed."""
        self._line(f"NOTE  {message}")

    def began(self, lines: list[str]) -> None:
        """Show what is about to be done."""
        for line in lines:
            self._line(line)
        if self._bar is not None:
            self._bar.start()

    def slot(self, slot: int, what: str) -> None:
        """Take note of what a slot does; a line comes when the training has ended."""

    def expect(self, n: int) -> None:
        """Show that so many more trainings belong to it."""
        with self._mutex:
            self._total += n
            if self._bar is not None:
                self._bar.update(self._task, total=self._total)

    def trained(self, what: str, seed: int, outcome: str, recorded: bool) -> None:
        """Show what a training came to; one that was recorded earlier only counts."""
        with self._mutex:
            self._done += 1
            if self._bar is not None:
                self._bar.advance(self._task)
            count = f"{self._done}/{self._total}"
        if not recorded:
            self._line(f"{count:>7}  {what:<32}  seed {seed + 1}  {outcome}")

    def finished(self, summary: Mapping[str, Any], sentences: list[str]) -> None:
        """Show the closing table and what follows from it."""
        self.close()
        self._console.print(closing_table(summary))
        for sentence in sentences:
            self._console.print(Text(clean(sentence)))

    def close(self) -> None:
        """Give the terminal back. Idempotent."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        self._console.print(Text(clean(text)), soft_wrap=True)


def closing_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the table of an ablation's summary; what was not measured is shown as '-'."""
    base, champion = summary["base"], summary["champion"]
    table = Table(
        title=f"ablation of {clean(summary['run_id'])}, champion {clean(summary['champion_id'])}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("part", min_width=20)
    for heading in ("without it", "contributes", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for part in summary["parts"]:
        percent, interval = part["contribution_percent"], part["ci95"]
        words = Text(clean(part["name"]), style="bold")
        where = "" if part["name"].startswith(part["file"]) else f"{part['file']}: "
        words.append(f"\n{clean(where + part['what'])}", style="not bold")
        if part["note"]:
            words.append(f"\n{clean(part['note'])}", style="not bold dim")
        contributes = "-" if percent is None else f"{percent:+.2f} %"
        if interval is not None:
            contributes += f"\n{interval[0]:+.2f} to {interval[1]:+.2f}"
        table.add_row(
            words,
            f"{number(part['perplexity'])}\nn={part['n']}",
            contributes,
            "-" if part["p_value"] is None else f"{part['p_value']:.2g}",
            Text(part["verdict"], style=STYLES.get(part["verdict"], "")),
        )
    sides = (
        f"Perplexity on {summary['split']}: base {_side(base)}, champion {_side(champion)}. What a "
        "part contributes is how much lower the champion's perplexity is than without it, with the "
        "part's own 95 % interval; the verdicts allow for how many parts are compared (Holm), so "
        "that an interval just beside zero can be unclear."
    )
    if summary["fitness"] != PERPLEXITY:
        sides += (
            f" The run's fitness is {clean(summary['fitness'])}: what a part contributes to that, "
            "beyond perplexity, is not measured here."
        )
    return Group(table, Text(sides))


def _side(side: Mapping[str, Any]) -> str:
    note = f"; {clean(side['note'])}" if side["note"] else ""
    return f"{number(side['perplexity'])} (n={side['n']}{note})"
