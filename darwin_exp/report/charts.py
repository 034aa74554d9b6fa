"""The charts of a report: agents by generation, best so far, trade-offs.

Reads: facts. Writes: markup.
Never: tells things apart by colour alone; marks have shapes, and tables stand beside them.

A mark that stands for an agent is a link to its row in the table of individuals; the page's
script shows on hover what that row says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from darwin_exp.chronicle import Agent
from darwin_exp.report.boundaries import Stretch, lines, measured_again, name_of, stretches
from darwin_exp.report.effects import MFU, PERPLEXITY
from darwin_exp.report.facts import Facts
from darwin_exp.report.progress import progress
from darwin_exp.report.svg import (
    HEIGHT,
    WIDTH,
    Plane,
    Scale,
    picture,
    robust_limits,
    steps,
    tag,
    whole_ticks,
)

GLYPHS = {
    "CRASHED": "×",
    "TIMED_OUT": "◷",
    "OUT_OF_MEMORY": "■",
    "INVALID": "+",
    "DUPLICATE": "=",
    "REJECTED": "◆",
    "QUARANTINED": "▲",
    "INFRA_LOST": "?",
}
LEFT, BELOW, RUG = 58, 52, 13  # pixels beside and below the axes, and a row of the failed
BESIDE_LINE = 0.44  # of a generation, right of whose beginning those measured again stand
MANY = 200  # agents, from which on their marks are small


def linked(agent: Agent, *marks: Markup) -> Markup:
    """Return marks that lead to an agent's row."""
    return tag("a", *marks, href=f"#{agent.individual_id}", tabindex=-1)


def by_generation(facts: Facts, metric: str) -> Markup:
    """Draw every agent's perplexity or MFU by generation, as it was when the agent was made.

    Where a new environment was opened stand those who were measured again in it.
    """
    lower_is_better = metric == PERPLEXITY
    name = "Validation perplexity" if lower_is_better else "MFU"
    chronicle, agents = facts.chronicle, facts.chronicle.agents
    dots = _dots(facts, metric)
    base = [base_values(facts, metric, one.index) for one in chronicle.environments]
    choose = min if lower_is_better else max
    best = choose((dot.value for dot in dots), default=None)
    held = [value for values in base for value in values]
    low, high = robust_limits([dot.value for dot in dots], held if best is None else [*held, best])
    last = max((agent.generation for agent in agents), default=0)
    plane = Plane(
        Scale(-0.6, last + 0.6, LEFT, WIDTH - 16),
        Scale(low, high, HEIGHT - BELOW, 34),
        height=HEIGHT + RUG * len({a.status for a in agents if not a.is_ok}),
    )
    marks = plane.grid(
        whole_ticks(last),
        "generation",
        f"{name} ({'lower' if lower_is_better else 'higher'} is better)",
    )
    parts = stretches(chronicle, plane.x.low, plane.x.high)
    for part, values in zip(parts, base, strict=True):
        marks += _base_band(plane, values, part)
    marks += lines(chronicle, plane, [part.begin for part in parts[1:]])
    marks += [_point(facts, plane, dot) for dot in dots]
    for part in parts:
        marks += _best_line(plane, dots, part, last, choose)
    marks += _rug(plane, agents)
    measured = sum(dot.is_first for dot in dots)
    summary = f"{measured} of {len(agents)} agents over {last + 1} generations"
    if best is not None:
        here = [dot.value for dot in dots if dot.environment == chronicle.current.index]
        summary += f"; the best reached {choose(here, default=best):.4g}"
    if base[-1]:
        runs = f"the base's {len(base[-1])} runs"
        summary += f"; {runs} lie between {min(base[-1]):.4g} and {max(base[-1]):.4g}"
    if len(parts) > 1:
        summary += f", both in {name_of(chronicle, chronicle.current)}"
    if not dots:
        marks.append(_nothing(f"no {name} was measured"))
    return picture(f"{name} by generation", summary, marks, height=plane.height)


@dataclass(frozen=True)
class _Dot:
    """An agent's value in one environment, and where it stands along the generations."""

    agent: Agent
    environment: int
    place: float
    value: float

    @property
    def is_first(self) -> bool:
        return self.environment == self.agent.made_in


def _dots(facts: Facts, metric: str) -> list[_Dot]:
    """Return all of them, those made in an environment before those measured again in one."""
    found = []
    for agent in facts.chronicle.agents:
        value = agent.measurements[agent.made_in].values.get(metric)
        if value is not None:
            found.append(_Dot(agent, agent.made_in, _column(agent), value))
    for environment in facts.chronicle.environments[1:]:
        for again in measured_again(facts.chronicle, environment):
            value = again.value(metric)
            if value is not None:
                place = environment.generation - BESIDE_LINE
                found.append(_Dot(again, environment.index, place, value))
    return found


def base_values(facts: Facts, metric: str, environment: int) -> list[float]:
    """Return what the base's runs measured in the search, in one environment."""
    found = []
    for event in facts.chronicle.base_repeats_in(environment):
        value = {**event.payload["metrics"], **event.measured.get("rates", {})}.get(metric)
        if value is not None:
            found.append(float(value))
    return found


def _base_band(plane: Plane, base: Sequence[float], part: Stretch) -> list[Markup]:
    left = plane.x.start if part.begin <= plane.x.low else plane.x(part.begin)
    right = plane.x.end if part.end >= plane.x.high else plane.x(part.end)
    if not base or left >= right:
        return []
    top, bottom = plane.y(max(base)), plane.y(min(base))
    middle = plane.y(sum(base) / len(base))
    return [
        tag("rect", class_="band", x=left, y=top, width=right - left, height=max(1, bottom - top)),
        tag("line", class_="base", x1=left, x2=right, y1=middle, y2=middle),
    ]


def _point(facts: Facts, plane: Plane, dot: _Dot) -> Markup:
    x, value = plane.x(dot.place), dot.value
    if not plane.y.holds(value):
        up = value > plane.y.high
        y = plane.y.end + 8 if up else plane.y.start - 4
        arrow = f"{'↑' if up else '↓'}{value:.3g}"
        words = tag("text", arrow, class_="beyond", x=x, y=y, text_anchor="middle")
        return linked(dot.agent, words)
    return linked(dot.agent, *_mark(facts, dot.agent, dot.environment, x, plane.y(value)))


def _mark(facts: Facts, agent: Agent, environment: int, x: float, y: float) -> list[Markup]:
    """Return an agent's mark: filled if it survived, a square for the base, ringed if selected."""
    chosen, here = facts.chronicle.selected, facts.chronicle.claimed_in.index
    drawn = []
    is_chosen = chosen is not None and chosen.individual_id == agent.individual_id
    if is_chosen and environment == here:
        drawn.append(tag("circle", class_="chosen", cx=x, cy=y, r=9))
    if agent.is_base:
        drawn.append(
            tag("rect", class_="point base-point", x=x - 4.5, y=y - 4.5, width=9, height=9)
        )
    else:
        kept = agent.individual_id in facts.survivors
        radius = 4.0 if len(facts.chronicle.agents) < MANY else 2.4
        kind = "point kept" if kept else "point"
        drawn.append(tag("circle", class_=kind, cx=x, cy=y, r=radius + kept))
    return drawn


def _best_line(
    plane: Plane, dots: Sequence[_Dot], part: Stretch, last: int, choose: Callable[..., float]
) -> list[Markup]:
    """Draw the best so far within one environment."""
    by_generation: dict[int, list[float]] = {}
    first = part.environment.generation
    for dot in dots:
        if dot.environment == part.environment.index:
            # Those measured again were there before the environment's first generation was.
            generation = dot.agent.generation if dot.is_first else first
            by_generation.setdefault(generation, []).append(dot.value)
    best, points = None, []
    for generation in range(first, last + 1):
        if generation - 0.5 >= part.end:
            break
        known = [*by_generation.get(generation, ()), *([] if best is None else [best])]
        if known:
            best = choose(known)
            points.append((plane.x(generation - 0.5), plane.y(best)))
    if best is None:
        return []
    points.append((plane.x(min(part.end, last + 0.5)), plane.y(best)))
    return [tag("path", class_="best", d=steps(points))]


def _rug(plane: Plane, agents: Sequence[Agent]) -> list[Markup]:
    """Mark agents that failed below the axis' numbers, a row and a sign for each kind."""
    drawn, row = [], 0
    for status, glyph in GLYPHS.items():
        failed = [agent for agent in agents if agent.status.value == status]
        if not failed:
            continue
        y = plane.height - 5 - RUG * row
        row += 1
        words = f"{len(failed)} {glyph}"
        drawn.append(tag("text", words, class_="tick", x=LEFT - 8, y=y, text_anchor="end"))
        for agent in failed:
            x = plane.x(_column(agent))
            mark = tag("text", glyph, class_="rug", x=x, y=y, text_anchor="middle")
            drawn.append(linked(agent, mark))
    return drawn


def _column(agent: Agent) -> float:
    # Steps of the golden ratio fill a generation's width evenly, however many slots there are.
    return agent.generation + 0.62 * ((agent.slot * 0.618034) % 1.0 - 0.5)


def _nothing(words: str) -> Markup:
    return tag("text", words, class_="label", x=WIDTH / 2, y=HEIGHT / 2, text_anchor="middle")


# --- best so far, trade-offs ----------------------------------------------------------------------


def best_so_far(facts: Facts) -> Markup:
    """Draw the best found by the number of rewrites finished."""
    found, n = progress(facts), len(facts.chronicle.rewrites)
    curve = found.curve
    low, high = robust_limits([v for _, _, v in found.each], [v for _, v in curve])
    plane = Plane(Scale(0, max(1, n), LEFT, WIDTH - 16), Scale(low, high, HEIGHT - BELOW, 34))
    words = "; ".join(filter(None, ("rewrites finished", found.remark)))
    marks = plane.grid(whole_ticks(n, 10), words, found.label)
    marks += lines(facts.chronicle, plane, found.opened_at)
    marks += [
        linked(agent, tag("circle", class_="point", cx=plane.x(k), cy=plane.y(value), r=2.4))
        for k, agent, value in found.each
        if plane.y.holds(value)
    ]
    summary = "; ".join(filter(None, (f"{n} rewrites", found.remark)))
    for one, end in zip(found.curves, (*found.opened_at, plane.x.high), strict=True):
        if one:
            points = [(plane.x(k), plane.y(value)) for k, value in one]
            points.append((plane.x(end), points[-1][1]))
            marks.append(tag("path", class_="best", d=steps(points)))
    if curve:
        here = found.curves[-1] or curve
        where = (
            f"in {name_of(facts.chronicle, facts.chronicle.current)} " if found.opened_at else ""
        )
        summary += f"; {where}from {here[0][1]:.4g} to {here[-1][1]:.4g}"
    else:
        marks.append(_nothing("nothing was measured"))
    return picture("Best so far by rewrites finished", summary, marks)


def pareto_front(agents: Sequence[Agent]) -> list[Agent]:
    """Return the agents that no other beats in both perplexity and MFU, lowest perplexity first."""
    known = [
        (agent.values[PERPLEXITY], -agent.values[MFU], agent)
        for agent in agents
        if agent.is_ok and PERPLEXITY in agent.values and MFU in agent.values
    ]
    front: list[Agent] = []
    least = math.inf
    for _, cost, agent in sorted(known, key=lambda one: one[:2]):
        if cost < least:
            least = cost
            front.append(agent)
    return front


def trade_offs(facts: Facts) -> Markup:
    """Draw perplexity against MFU in the last environment, and the front nobody beats in both."""
    agents = [
        agent
        for agent in facts.chronicle.compared
        if agent.value(PERPLEXITY) is not None and agent.value(MFU) is not None
    ]
    front = pareto_front(agents)
    x_low, x_high = robust_limits(
        [agent.values[MFU] for agent in agents], [agent.values[MFU] for agent in front]
    )
    y_low, y_high = robust_limits(
        [agent.values[PERPLEXITY] for agent in agents],
        [agent.values[PERPLEXITY] for agent in front],
    )
    plane = Plane(
        Scale(max(0.0, x_low), x_high, LEFT, WIDTH - 16), Scale(y_low, y_high, HEIGHT - BELOW, 34)
    )
    marks = plane.grid(
        plane.x.ticks(8),
        "MFU (higher is better)",
        "Validation perplexity (lower is better)",
    )
    if not agents:
        marks.append(_nothing("no agent has both a perplexity and an MFU"))
    path = [(plane.x(a.values[MFU]), plane.y(a.values[PERPLEXITY])) for a in front]
    if path:
        marks.append(tag("path", class_="front", d=steps([*path[::-1]])))
    members = {agent.individual_id for agent in front}
    for agent in agents:
        x, y = agent.values[MFU], agent.values[PERPLEXITY]
        if plane.x.holds(x) and plane.y.holds(y):
            drawn = _mark(facts, agent, agent.environment, plane.x(x), plane.y(y))
            if agent.individual_id in members:
                drawn.append(tag("circle", class_="member", cx=plane.x(x), cy=plane.y(y), r=7))
            marks.append(linked(agent, *drawn))
    summary = f"{len(agents)} agents with both figures; {len(front)} on the front"
    return picture("Perplexity against MFU", summary, marks)
