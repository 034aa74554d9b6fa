"""What a person sees: lines that grep finds, a picture that fits, a table that says '-'."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from darwin_exp.display import LiveDisplay, PlainDisplay, Watch, watch_for
from darwin_exp.individual import Genome, Individual, Reason, Status
from darwin_exp.wording import clean, closing_table, duration, number

GENOME = Genome.of({"train.py": "", "model.py": ""})


def individual(
    name: str, perplexity: float | None, status: Status = Status.OK, **more: Any
) -> Individual:
    known = perplexity is not None
    return Individual(
        name,
        generation=1,
        slot=int(name[-2:]),
        genome=GENOME,
        status=status,
        metrics={"val_perplexity": perplexity} if perplexity is not None else {},
        rates={"mfu": 0.21} if known else {},
        fitness=-perplexity if perplexity is not None else None,
        **more,
    )


BASE = individual("g00-i00", 9.82, summary="base")
CRASHED = individual(
    "g01-i02",
    None,
    Status.CRASHED,
    reason=Reason.EXCEPTION,
    message="RuntimeError: \x1b[2Jshapes\ndo not match",
    summary="wider",
)


def plain(width: int = 80, verbose: bool = False) -> tuple[PlainDisplay, io.StringIO]:
    out = io.StringIO()
    return PlainDisplay(Console(file=out, width=width, force_terminal=False), verbose), out


def terminal(width: int) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, height=40, force_terminal=True, record=True), out


def play(watch: Watch) -> None:
    watch.run_started("2026-01-02-baseline", ["shakespeare, characters", "sandbox process"], 26)
    watch.note("bubblewrap is not installed")
    watch.generation_started(1, 5)
    watch.slot(0, "g01-i03 training")
    watch.slot(1, "")
    watch.individual_finished(BASE, BASE)
    watch.individual_finished(individual("g01-i03", 9.41, summary="squared ReLU " * 20), BASE)
    watch.individual_finished(CRASHED, BASE)
    watch.progress(0, 26)
    watch.progress(13, 26, 95.0)


def test_an_individual_is_one_line_that_grep_finds() -> None:
    display, out = plain(width=60)
    play(display)
    lines = out.getvalue().splitlines()
    found = next(line for line in lines if line.startswith("g01-i03"))
    assert found.startswith(
        "g01-i03   OK             perplexity 9.410 (-4.2 % vs base)  mfu 0.210  squared ReLU"
    )
    assert found.endswith("** best so far")
    assert next(line for line in lines if "CRASHED" in line).startswith("g01-i02")
    assert "generation 1/5" in lines
    assert "NOTE  bubblewrap is not installed" in lines


def test_a_plain_display_says_what_slots_do_only_when_verbose() -> None:
    for verbose in (False, True):
        display, out = plain(verbose=verbose)
        play(display)
        assert ("slot 0  g01-i03 training" in out.getvalue()) is verbose


def test_a_failed_individual_shows_why_and_no_number() -> None:
    display, out = plain()
    display.individual_finished(CRASHED, BASE)
    assert "exception: RuntimeError:  [2Jshapes do not match" in out.getvalue()
    assert "perplexity" not in out.getvalue()


@pytest.mark.parametrize("hostile", ["\x1b]0;title\x07", "\x9b31m", "a\rb", "\u202eabc", "\x00"])
def test_nothing_that_a_terminal_obeys_gets_through(hostile: str) -> None:
    display, out = plain()
    display.individual_finished(individual("g01-i03", 9.0, summary=hostile), BASE)
    display.note(hostile)
    shown = out.getvalue().replace("\n", "")
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e\x00")
    assert clean("[red]kept as it is[/red] é") == "[red]kept as it is[/red] é"


def test_markup_in_a_summary_is_only_text() -> None:
    display, out = plain()
    display.individual_finished(individual("g01-i03", 9.0, summary="[bold]x[/nonsense]"), BASE)
    assert "[bold]x[/nonsense]" in out.getvalue()


@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_the_picture_fits_its_terminal_and_shows_every_part(width: int) -> None:
    console, _ = terminal(width)
    display = LiveDisplay(console)
    with display:
        play(display)
    picture = Console(width=width, file=io.StringIO(), record=True)
    picture.print(display._picture())
    text = picture.export_text()
    lines = text.splitlines()
    assert {len(line) for line in lines} == {width}
    assert all(line[0] in "╭│╰" and line[-1] in "╮│╯" for line in lines)
    for wanted in ("2026-01-02-baseline", "generation 1/5", "13/26 candidates", "g01-i03 training"):
        assert wanted in text
    if width >= 80:
        for wanted in ("idle", "CRASHED", "-4.2 %", "best so far  g01-i03", "1 crashed", "1 min 3"):
            assert wanted in text


def test_only_the_last_eight_individuals_stay_in_the_picture() -> None:
    console, _ = terminal(100)
    display = LiveDisplay(console)
    for slot in range(12):
        display.individual_finished(individual(f"g01-i{slot:02d}", 9.5 + slot / 100), BASE)
    picture = Console(width=100, file=io.StringIO(), record=True)
    picture.print(display._picture())
    text = picture.export_text()
    assert "g01-i11" in text
    assert "g01-i03  OK" not in text
    assert "g01-i04  OK" in text
    assert "best so far  g01-i00" in text


def test_the_terminal_is_given_back_when_a_run_fails() -> None:
    console, out = terminal(80)
    display = LiveDisplay(console)

    def interrupted_run() -> None:
        with display:
            play(display)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().rindex(shown) > out.getvalue().rindex(hidden)
    at_the_end = out.tell()
    time.sleep(1.2)  # more than two refreshes
    assert out.tell() == at_the_end, "it still draws"


def test_many_threads_may_show_things_at_once() -> None:
    console, _ = terminal(80)
    display = LiveDisplay(console)

    def chatter(slot: int) -> None:
        for count in range(30):
            display.slot(slot, f"step {count}")
            display.individual_finished(individual(f"g01-i{slot:02d}", 9.0), BASE)
            display.progress(count, 30)
            display.note("hello")

    with display:
        display.run_started("r", [], 30)
        threads = [threading.Thread(target=chatter, args=(slot,), daemon=True) for slot in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not [thread for thread in threads if thread.is_alive()], "the display locked up"


def test_time_left_counts_only_what_this_session_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display, out = plain(verbose=True)
    display.progress(10, 20)
    now[0] += 60
    display.progress(15, 20)
    assert "progress  15/20 candidates, about 1 min 00 s left" in out.getvalue()


def test_the_kind_of_display_follows_the_console() -> None:
    assert isinstance(watch_for(terminal(80)[0]), LiveDisplay)
    assert isinstance(watch_for(Console(file=io.StringIO())), PlainDisplay)
    assert isinstance(watch_for(terminal(80)[0], verbose=True), PlainDisplay)


# --- the closing table ----------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "run_id": "2026-01-02-baseline",
    "status": "finished",
    "requested": 26,
    "ok": 20,
    "failed": {"CRASHED": 2, "TIMED_OUT": 1},
    "lost": 0,
    "duplicates": 3,
    "not_started": 0,
    "repaired": 1,
    "error_rate": 0.17,
    "resolution_rate": 0.25,
    "baseline": {"individual_id": "g00-i00", "val_perplexity": 9.83, "val_bpb": 2.05,
                 "test_perplexity": 10.01, "mfu": 0.213, "replicates": 4},
    "champion": {"individual_id": "g03-i02", "val_perplexity": 8.11, "val_bpb": 1.88,
                 "test_perplexity": 8.3, "mfu": 0.2, "replicates": 4},
    "improvement": {"perplexity_percent": 17.08, "mfu_percent": -6.1, "ci95": [14.1, 19.9],
                    "p_value": 0.00012, "significant": True,
                    "equal_steps": {"perplexity_percent": 1.2, "ci95": [-0.4, 2.9],
                                    "p_value": 0.12, "significant": False}},
    "seconds": {"total": 341.2, "per_generation": 68.1, "training": 500.0},
    "llm": None,
}  # fmt: skip


def shown(summary: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(closing_table(summary))
    return console.export_text()


def row(text: str, label: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"│ {label}"))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_closing_table_compares_base_and_selected() -> None:
    text = shown(SUMMARY)
    assert row(text, "val perplexity") == ["val perplexity", "9.830", "8.110", "-17.50 %"]
    assert row(text, "test perplexity") == ["test perplexity", "10.01", "8.300", "-17.08 %"]
    assert row(text, "mfu") == ["mfu", "0.213", "0.200", "-6.10 %"]
    assert row(text, "replicates") == ["replicates", "4", "4", ""]
    assert (
        "26 requested = 20 ok + 3 failed (2 CRASHED, 1 TIMED_OUT) + 3 duplicates + 0 lost" in text
    )
    assert "17.08 % lower, 95 % interval of the gain +14.10 to +19.90 %" in text
    assert "p = 0.12: no significant progress" in " ".join(text.split())
    assert "took 5 min 41 s" in text
    assert "scoring -" in text


def test_a_summary_without_measurements_shows_dashes_and_no_zeros() -> None:
    text = shown({"run_id": "r", "status": "failed", "requested": 5, "ok": 0, "failed": None})
    assert row(text, "val perplexity") == ["val perplexity", "-", "-", "-"]
    assert row(text, "agent") == ["agent", "-", "-", ""]
    assert "at equal time: not measured" in text
    assert "error rate -" in text


def test_a_run_without_a_claim_says_why_there_is_none() -> None:
    why = "the data set has no test split"
    gain = {"perplexity_percent": None, "why_none": why, "equal_steps": None}
    text = shown({**SUMMARY, "improvement": gain})
    assert f"at equal time, no claim: {why}" in text
    assert "at equal steps: not measured" in text


@pytest.mark.parametrize(
    ("status", "offered"), [("finished", False), ("interrupted", True), ("stopped", True)]
)
def test_a_run_that_can_go_on_says_how(status: str, offered: bool) -> None:
    text = shown({**SUMMARY, "status": status})
    assert ("python -m darwin_exp resume=2026-01-02-baseline" in text) is offered


@pytest.mark.parametrize("width", [80, 120])
def test_the_closing_table_fits(width: int) -> None:
    assert max(len(line) for line in shown(SUMMARY, width).splitlines()) <= width


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_a_duration_reads_at_a_glance(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "-"), (8.3, "8.300"), (4, "4"), (123456.7, "123,457"), (0.0, "0.000")],
)
def test_a_number_keeps_its_digits(value: float | None, words: str) -> None:
    assert number(value) == words
