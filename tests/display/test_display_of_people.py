"""While a run goes on, its display says that requests wait, and where they are read."""

from __future__ import annotations

import io

from rich.console import Console

from darwin_exp.display import LiveDisplay, PlainDisplay, Watch


def shown(display: PlainDisplay, *counts: int) -> list[str]:
    for n in counts:
        display.people_wait(n)
    file = display._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().splitlines()


def test_a_line_is_written_once_per_change() -> None:
    display = PlainDisplay(Console(file=io.StringIO(), width=120))
    assert shown(display, 0, 0, 1, 1, 2, 0, 0) == [
        "PEOPLE  1 request waits: python -m darwin_exp.hitl list",
        "PEOPLE  2 requests wait: python -m darwin_exp.hitl list",
        "PEOPLE  no request waits any more",
    ]


def test_the_picture_shows_it_for_as_long_as_it_is_so() -> None:
    console = Console(file=io.StringIO(), width=120)
    display = LiveDisplay(console)

    def picture() -> str:
        with console.capture() as capture:
            console.print(display._picture())
        return capture.get()

    assert "waits" not in picture()
    display.people_wait(1)
    assert "1 request waits: python -m darwin_exp.hitl list" in picture()
    display.people_wait(0)
    assert "wait" not in picture()


def test_who_shows_nothing_says_nothing() -> None:
    Watch().people_wait(3)
