"""What a person sees while an evolution runs: a live picture, or one line per happening.

Reads: what the evolution tells it.
Writes: the terminal, or lines of text where there is none.
Never: decides anything, or passes on control characters that a genome or a model wrote.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from darwin_exp.individual import Individual, Status
from darwin_exp.wording import (
    clean,
    closing_table,
    duration,
    failure_in_words,
    gain_percent,
    number,
    outcome_in_words,
)

N_RECENT = 8
REFRESHES_PER_SECOND = 2.0
SECONDS_BETWEEN_PROGRESS_LINES = 30.0
STYLES = {Status.OK: "green", Status.DUPLICATE: "dim", Status.INFRA_LOST: "yellow"}


def watch_for(console: Console, verbose: bool = False) -> Watch:
    """Return the live display where the console is a terminal, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal and not verbose:
        return LiveDisplay(console)
    return PlainDisplay(console, verbose)


class Watch:
    """Looks on and shows nothing; the base of the displays. Safe to call from any thread."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run_started(self, run_id: str, title_lines: Sequence[str], total_candidates: int) -> None:
        """Show what is about to run, and how many candidates it will ask for."""

    def generation_started(self, generation: int, n_generations: int) -> None:
        """Show that a generation begins; 0 is the filling of the first population."""

    def slot(self, slot: int, what: str) -> None:
        """Show what a slot is doing from now on; empty when it is idle."""

    def individual_finished(self, individual: Individual, base: Individual | None) -> None:
        """Show what became of an individual, compared with the base."""

    def note(self, message: str) -> None:
        """Say something that must not be missed, such as a fallback."""

    def people_wait(self, n: int) -> None:
        """Show how many requests wait for an answer, where that has changed."""

    def progress(self, done: int, total: int, seconds_left: float | None = None) -> None:
        """Show how many candidates are finished; without an estimate one is made from them."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Show the closing table of a run's `summary.json`."""

    def close(self) -> None:
        """Give the terminal back. Idempotent."""


class _Counting(Watch):
    """What both displays keep count of."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._mutex = threading.RLock()
        self._began = time.monotonic()
        self._first_done: tuple[int, float] | None = None
        self._done = self._total = 0
        self._best: Individual | None = None
        self._n_waiting = 0

    def _note_waiting(self, n: int) -> bool:
        """Take note of how many requests wait, and tell whether that is news."""
        with self._mutex:
            is_news, self._n_waiting = n != self._n_waiting, n
        return is_news

    def _count(self, done: int, total: int, seconds_left: float | None) -> float | None:
        """Note progress and return the seconds left, if anything is known of them."""
        now = time.monotonic()
        if self._first_done is None:
            # A resumed run starts with candidates of an earlier session, which took it no time.
            self._first_done = (done, now)
        self._done, self._total = done, total
        before, since = self._first_done
        if seconds_left is None and done >= before + 2:  # one alone says too little
            seconds_left = (now - since) / (done - before) * (total - done)
        return seconds_left

    def _note_best(self, individual: Individual) -> bool:
        if not individual.is_ok or individual.fitness is None:
            return False
        best = self._best
        if best is not None and (best.fitness or 0.0) >= individual.fitness:
            return False
        self._best = individual
        return True


class PlainDisplay(_Counting):
    """One line per happening, each made to be found with grep; `verbose` adds what slots do."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        super().__init__(console)
        self._verbose = verbose
        self._said_progress = -float("inf")

    def run_started(self, run_id: str, title_lines: Sequence[str], total_candidates: int) -> None:
        self._line(f"run {run_id}  {total_candidates} candidates")
        for line in title_lines:
            self._line(f"    {line}")

    def generation_started(self, generation: int, n_generations: int) -> None:
        self._line(f"generation {generation}/{n_generations}")

    def slot(self, slot: int, what: str) -> None:
        if self._verbose and what:
            self._line(f"slot {slot}  {what}")

    def individual_finished(self, individual: Individual, base: Individual | None) -> None:
        with self._mutex:
            is_best = self._note_best(individual)
            cells = [
                f"{individual.individual_id:<8}",
                f"{individual.status.value:<13}",
                outcome_in_words(individual, base),
                individual.summary,
                "contended" if individual.contended else "",
                "** best so far" if is_best else "",
            ]
            self._line("  ".join(cell for cell in cells if cell.strip()))

    def note(self, message: str) -> None:
        self._line(f"NOTE  {message}")

    def people_wait(self, n: int) -> None:
        if self._note_waiting(n):
            self._line(f"PEOPLE  {waiting_in_words(n)}")

    def progress(self, done: int, total: int, seconds_left: float | None = None) -> None:
        with self._mutex:
            left = self._count(done, total, seconds_left)
            now = time.monotonic()
            due = now - self._said_progress >= SECONDS_BETWEEN_PROGRESS_LINES
            if not (due or self._verbose) or not done:
                return
            self._said_progress = now
            about = "" if left is None else f", about {duration(left)} left"
            self._line(f"progress  {done}/{total} candidates{about}")

    def finished(self, summary: Mapping[str, Any]) -> None:
        with self._mutex:
            self._console.print(closing_table(summary))

    def _line(self, text: str) -> None:
        with self._mutex:
            self._console.print(Text(clean(text)), soft_wrap=True)


class LiveDisplay(_Counting):
    """A picture of the run that keeps itself up to date on a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._run_id = ""
        self._title: list[str] = []
        self._generation: tuple[int, int] | None = None
        self._slots: dict[int, tuple[str, float]] = {}
        self._recent: deque[tuple[Individual, Individual | None]] = deque(maxlen=N_RECENT)
        self._statuses: Counter[Status] = Counter()
        self._base: Individual | None = None
        self._left: tuple[float, float] | None = None
        self._live = Live(
            get_renderable=self._picture,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def run_started(self, run_id: str, title_lines: Sequence[str], total_candidates: int) -> None:
        with self._mutex:
            self._run_id, self._title = clean(run_id), [clean(line) for line in title_lines]
            self._total = total_candidates
        # Never under the mutex: the refreshing thread takes Live's lock first, then the mutex.
        self._live.start()

    def generation_started(self, generation: int, n_generations: int) -> None:
        with self._mutex:
            self._generation = (generation, n_generations)

    def slot(self, slot: int, what: str) -> None:
        with self._mutex:
            self._slots[slot] = (clean(what), time.monotonic())

    def individual_finished(self, individual: Individual, base: Individual | None) -> None:
        with self._mutex:
            self._note_best(individual)
            self._base = base or self._base
            self._statuses[individual.status] += 1
            self._recent.append((individual, base))

    def note(self, message: str) -> None:
        self._console.print(Text(f"NOTE  {clean(message)}", style="bold yellow"))

    def people_wait(self, n: int) -> None:
        self._note_waiting(n)  # the picture shows it for as long as it is so

    def progress(self, done: int, total: int, seconds_left: float | None = None) -> None:
        with self._mutex:
            left = self._count(done, total, seconds_left)
            self._left = None if left is None else (left, time.monotonic())

    def finished(self, summary: Mapping[str, Any]) -> None:
        self.close()
        self._console.print(closing_table(summary))

    def close(self) -> None:
        self._live.stop()

    # --- the picture ----------------------------------------------------------------------------

    def _picture(self) -> RenderableType:
        with self._mutex:
            parts: list[RenderableType] = [self._header()]
            if self._slots:
                parts += [Rule("slots", style="dim", align="left"), self._slot_table()]
            if self._recent:
                parts += [Rule("finished", style="dim", align="left"), self._recent_table()]
                parts += [Rule(style="dim"), self._best_line()]
            return Panel(Group(*parts), title=f"DARWIN  {self._run_id}", title_align="left")

    def _header(self) -> RenderableType:
        now = time.monotonic()
        words = []
        if self._generation is not None:
            words.append("generation {}/{}".format(*self._generation))
        words.append(f"{self._done}/{self._total} candidates")
        words.append(f"elapsed {duration(now - self._began)}")
        if self._left is not None and self._done < self._total:
            left, said = self._left
            words.append(f"about {duration(max(0.0, left - (now - said)))} left")
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=max(1, self._total), completed=self._done))
        lines = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._title]
        waiting = []
        if self._n_waiting:
            told = waiting_in_words(self._n_waiting)
            waiting = [Text(told, style="bold yellow", no_wrap=True, overflow="ellipsis")]
        return Group(*lines, Text("   ".join(words), style="bold"), bar, *waiting)

    def _slot_table(self) -> Table:
        table = _bare_table()
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", style="dim", no_wrap=True)
        for slot, (what, since) in sorted(self._slots.items()):
            spent = duration(time.monotonic() - since) if what else ""
            table.add_row(str(slot), Text(what or "idle", style="" if what else "dim"), spent)
        return table

    def _recent_table(self) -> Table:
        table = _bare_table(show_header=True)
        table.add_column("agent", no_wrap=True)
        table.add_column("status", no_wrap=True)
        table.add_column("perplexity", justify="right", no_wrap=True)
        table.add_column("vs base", justify="right", no_wrap=True)
        table.add_column("mfu", justify="right", no_wrap=True)
        table.add_column("what was changed", ratio=1, no_wrap=True, overflow="ellipsis")
        for individual, base in self._recent:
            style = STYLES.get(individual.status, "red")
            gain = gain_percent(individual, base)
            why = individual.summary if individual.is_ok else failure_in_words(individual)
            table.add_row(
                individual.individual_id,
                Text(individual.status.value, style=style),
                number(individual.measured("val_perplexity")),
                Text(
                    "" if gain is None else f"{-gain:+.1f} %",
                    style="green" if gain is not None and gain > 0 else "",
                ),
                number(individual.measured("mfu"), 3),
                Text(clean(why)),
            )
        return table

    def _best_line(self) -> RenderableType:
        counts = "  ".join(
            f"{count} {status.value.lower().replace('_', ' ')}"
            for status, count in self._statuses.most_common()
        )
        line = Text(no_wrap=True, overflow="ellipsis")
        if self._best is not None:
            best = self._best
            line.append(f"best so far  {best.individual_id}  ", style="bold")
            line.append(outcome_in_words(best, self._base), style="bold green")
            line.append(f"  {clean(best.summary)}")
        return Group(line, Text(counts, style="dim"))


def waiting_in_words(n: int) -> str:
    """Say how many requests wait for people, and where they are read."""
    if not n:
        return "no request waits any more"
    what = "1 request waits" if n == 1 else f"{n} requests wait"
    return f"{what}: python -m darwin_exp.hitl list"


def _bare_table(show_header: bool = False) -> Table:
    return Table(box=None, show_header=show_header, expand=True, pad_edge=False, header_style="dim")
