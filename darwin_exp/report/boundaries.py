"""Where one environment ends and the next begins, in words and on a chart.

Reads: a chronicle. Writes: markup and words.
Never: lets a line run on from one environment into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from darwin_exp.chronicle import Agent, Chronicle, Environment
from darwin_exp.report.svg import Plane, tag

WHAT_CHANGED = {
    "extra_train": "data",
    "image": "library",
    "libraries": "library",
    "budget_seconds": "time",
    "max_steps": "steps",
    "memory_mb": "memory",
}
LABEL_WIDTH, LABEL_HEIGHT = 130, 13  # pixels that a label takes


@dataclass(frozen=True)
class Stretch:
    """An environment's part of an axis that counts generations."""

    environment: Environment
    begin: float
    end: float


def stretches(chronicle: Chronicle, begin: float, end: float) -> list[Stretch]:
    """Return the part of each environment of an axis from `begin` to `end`."""
    known = chronicle.environments
    begins = [begin, *(max(begin, one.generation - 0.5) for one in known[1:])]
    return [Stretch(*told) for told in zip(known, begins, [*begins[1:], end], strict=True)]


def difference(chronicle: Chronicle, environment: Environment) -> str:
    """Say in a word or two what an environment changed against the one before it."""
    before = chronicle.environments[chronicle.environments.index(environment) - 1].changed
    now = environment.changed
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    words = (WHAT_CHANGED.get(key, key.replace("_", " ")) for key in keys)
    return ", ".join(dict.fromkeys(words))


def name_of(chronicle: Chronicle, environment: Environment) -> str:
    """Return an environment's name with what it changed, as "environment 1: data"."""
    what = difference(chronicle, environment) if environment.index else ""
    return f"environment {environment.index}" + (f": {what}" if what else "")


def lines(chronicle: Chronicle, plane: Plane, places: Sequence[float]) -> list[Markup]:
    """Draw a line where each environment but the first was opened.

    Args:
        places: of each of them on the horizontal axis, in its unit.
    """
    drawn, labels = [], []
    for k, (environment, place) in enumerate(zip(chronicle.environments[1:], places, strict=True)):
        x, top = plane.x(place), plane.y.end
        drawn.append(tag("line", class_="opened", x1=x, x2=x, y1=top, y2=plane.y.start))
        is_left = x + LABEL_WIDTH < plane.x.end
        labels.append(
            tag(
                "text",
                name_of(chronicle, environment),
                class_="opened-label",
                x=x + (5 if is_left else -5),
                y=top + 10 + LABEL_HEIGHT * k,
                text_anchor="start" if is_left else "end",
            )
        )
    return drawn + labels


def measured_again(chronicle: Chronicle, environment: Environment) -> list[Agent]:
    """Return those of earlier environments who were measured again in one, as it knows them."""
    k = environment.index
    return [
        agent.seen_in(k)
        for agent in chronicle.agents
        if k in agent.measurements and k != agent.made_in
    ]
