"""The charts of a report: agents by generation, best so far, trade-offs, edits, time.

Reads: facts. Writes: markup.
Never: tells things apart by colour alone; marks have shapes, and tables stand beside them.

A mark that stands for an agent is a link to its row in the table of individuals; the page's
script shows on hover what that row says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from darwin_exp.chronicle import Agent
from darwin_exp.report.effects import MFU, PERPLEXITY, Mean
from darwin_exp.report.facts import Facts, signed
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
MANY = 200  # agents, from which on their marks are small
STAGE_NAMES = ("startup", "training", "scoring", "overhead", "idle")


def linked(agent: Agent, *marks: Markup) -> Markup:
    """Return marks that lead to an agent's row."""
    return tag("a", *marks, href=f"#{agent.individual_id}", tabindex=-1)


def by_generation(facts: Facts, metric: str) -> Markup:
    """Draw every agent's perplexity or MFU by generation."""
    lower_is_better = metric == PERPLEXITY
    name = "Validation perplexity" if lower_is_better else "MFU"
    agents = facts.chronicle.agents
    measured = [(a, v) for a in agents if (v := a.value(metric)) is not None]
    base = base_values(facts, metric)
    best = (min if lower_is_better else max)((v for _, v in measured), default=None)
    held = base if best is None else [*base, best]
    low, high = robust_limits([v for _, v in measured], held)
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
    marks += _base_band(plane, base)
    marks += [_point(facts, plane, agent, value) for agent, value in measured]
    marks += _best_line(plane, measured, last, min if lower_is_better else max)
    marks += _rug(plane, agents)
    summary = f"{len(measured)} of {len(agents)} agents over {last + 1} generations"
    if best is not None:
        summary += f"; the best reached {best:.4g}"
    if base:
        summary += f"; the base's {len(base)} runs lie between {min(base):.4g} and {max(base):.4g}"
    if not measured:
        marks.append(_nothing(f"no {name} was measured"))
    return picture(f"{name} by generation", summary, marks, height=plane.height)


def base_values(facts: Facts, metric: str) -> list[float]:
    """Return what the base's runs measured in the search."""
    found = []
    for event in facts.chronicle.base_repeats:
        value = {**event.payload["metrics"], **event.measured.get("rates", {})}.get(metric)
        if value is not None:
            found.append(float(value))
    return found


def _base_band(plane: Plane, base: Sequence[float]) -> list[Markup]:
    if not base:
        return []
    top, bottom = plane.y(max(base)), plane.y(min(base))
    left, right = plane.x.start, plane.x.end
    middle = plane.y(sum(base) / len(base))
    return [
        tag("rect", class_="band", x=left, y=top, width=right - left, height=max(1, bottom - top)),
        tag("line", class_="base", x1=left, x2=right, y1=middle, y2=middle),
    ]


def _point(facts: Facts, plane: Plane, agent: Agent, value: float) -> Markup:
    x = _column(plane, agent)
    if not plane.y.holds(value):
        up = value > plane.y.high
        y = plane.y.end + 8 if up else plane.y.start - 4
        arrow = f"{'↑' if up else '↓'}{value:.3g}"
        return linked(agent, tag("text", arrow, class_="beyond", x=x, y=y, text_anchor="middle"))
    return linked(agent, *_mark(facts, agent, x, plane.y(value)))


def _mark(facts: Facts, agent: Agent, x: float, y: float) -> list[Markup]:
    """Return an agent's mark: filled if it survived, a square for the base, ringed if selected."""
    chosen = facts.chronicle.selected
    drawn = []
    if chosen is not None and chosen is agent:
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
    plane: Plane,
    measured: Sequence[tuple[Agent, float]],
    last: int,
    choose: Callable[..., float],
) -> list[Markup]:
    by_generation: dict[int, list[float]] = {}
    for agent, value in measured:
        by_generation.setdefault(agent.generation, []).append(value)
    best, points = None, []
    for generation in range(last + 1):
        known = [*by_generation.get(generation, ()), *([] if best is None else [best])]
        if known:
            best = choose(known)
            points.append((plane.x(generation - 0.5), plane.y(best)))
    if best is None:
        return []
    points.append((plane.x(last + 0.5), plane.y(best)))
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
            x = _column(plane, agent)
            mark = tag("text", glyph, class_="rug", x=x, y=y, text_anchor="middle")
            drawn.append(linked(agent, mark))
    return drawn


def _column(plane: Plane, agent: Agent) -> float:
    # Steps of the golden ratio fill a generation's width evenly, however many slots there are.
    return plane.x(agent.generation + 0.62 * ((agent.slot * 0.618034) % 1.0 - 0.5))


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
    marks += [
        linked(agent, tag("circle", class_="point", cx=plane.x(k), cy=plane.y(value), r=2.4))
        for k, agent, value in found.each
        if plane.y.holds(value)
    ]
    summary = "; ".join(filter(None, (f"{n} rewrites", found.remark)))
    if curve:
        points = [(plane.x(k), plane.y(value)) for k, value in curve]
        points.append((plane.x.end, points[-1][1]))
        marks.append(tag("path", class_="best", d=steps(points)))
        summary += f"; from {curve[0][1]:.4g} to {curve[-1][1]:.4g}"
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
    """Draw perplexity against MFU, with the front that nobody beats in both."""
    agents = [
        agent
        for agent in facts.chronicle.agents
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
            drawn = _mark(facts, agent, plane.x(x), plane.y(y))
            if agent.individual_id in members:
                drawn.append(tag("circle", class_="member", cx=plane.x(x), cy=plane.y(y), r=7))
            marks.append(linked(agent, *drawn))
    summary = f"{len(agents)} agents with both figures; {len(front)} on the front"
    return picture("Perplexity against MFU", summary, marks)


# --- edits, time ----------------------------------------------------------------------------------


def operator_effects(facts: Facts, which: str) -> Markup | None:
    """Draw each operator's mean effect with its interval; None where nothing was measured."""
    wanted = [(r.name, getattr(r, which)) for r in facts.operators]
    rows: list[tuple[str, Mean]] = [(name, mean) for name, mean in wanted if mean is not None]
    if not rows:
        return None
    lower_is_better = which == "perplexity"
    rows.sort(key=lambda row: row[1].percent if lower_is_better else -row[1].percent)
    ends = [v for _, mean in rows for v in (mean.percent, mean.low, mean.high) if v is not None]
    middle = [mean.percent for _, mean in rows]
    reach = 2.5 * max(max(map(abs, middle)), 1.0)
    low, high = max(min(ends, default=0.0), -reach), min(max(ends, default=0.0), reach)
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.05 * (high - low) or 1.0
    height = 74 + 24 * len(rows)
    plane = Plane(
        Scale(low - room, high + room, 150, WIDTH - 112),
        Scale(len(rows) - 0.5, -0.5, height - 56, 14),
        height=height,
    )
    marks = []
    for value in plane.x.ticks(7):
        x = plane.x(value)
        kind = "axis" if abs(value) < 1e-9 else "grid"
        marks.append(tag("line", class_=kind, x1=x, x2=x, y1=plane.y.end, y2=plane.y.start))
        words = signed(value, 0 if plane.x.high - plane.x.low > 7 else 1)
        marks.append(
            tag("text", words, class_="tick", x=x, y=plane.y.start + 18, text_anchor="middle")
        )
    for row, (name, mean) in enumerate(rows):
        marks += _interval(
            plane, row, name, mean, mean.percent < 0 if lower_is_better else mean.percent > 0
        )
    direction = "left" if lower_is_better else "right"
    marks.append(
        tag(
            "text",
            f"mean change against the parent ({direction} is better), 95 % interval, n",
            class_="label",
            x=(plane.x.start + plane.x.end) / 2,
            y=height - 12,
            text_anchor="middle",
        )
    )
    clear = [
        f"{name} {signed(mean.percent)}"
        for name, mean in rows
        if mean.low is not None and mean.high is not None and mean.low * mean.high > 0
    ]
    summary = "Clear of zero: " + (", ".join(clear) or "none")
    what = "perplexity" if lower_is_better else "MFU"
    return picture(f"Mean effect of each edit on {what}", summary, marks, height=height)


def _interval(plane: Plane, row: int, name: str, mean: Mean, better: bool) -> list[Markup]:
    y = plane.y(row)
    left, right = plane.x.start, plane.x.end
    shown = name if len(name) <= 22 else f"{name[:21]}…"
    drawn = [tag("text", shown, class_="row-name", x=left - 10, y=y + 4, text_anchor="end")]
    if mean.low is not None and mean.high is not None:
        ends = [min(right, max(left, plane.x(v))) for v in (mean.low, mean.high)]
        drawn.append(tag("line", class_="interval", x1=ends[0], x2=ends[1], y1=y, y2=y))
    x = min(right, max(left, plane.x(mean.percent)))
    known = mean.low is not None
    kind = ("better" if better else "worse") + (" known" if known else "")
    if better:
        drawn.append(tag("circle", class_=f"dot {kind}", cx=x, cy=y, r=5))
    else:
        drawn.append(tag("rect", class_=f"dot {kind}", x=x - 4.5, y=y - 4.5, width=9, height=9))
    words = f"{signed(mean.percent)}  n={mean.n}"
    drawn.append(tag("text", words, class_="tick", x=right + 10, y=y + 4))
    return drawn


def time_by_stage(facts: Facts) -> Markup:
    """Draw what the slots did in each phase, as stacked bars of slot time."""
    phases = facts.phases
    height = 50 + 22 * len(phases)
    longest = max((sum(p.slot_seconds.values()) for p in phases), default=0.0) or 1.0
    scale = Scale(0, longest, 110, WIDTH - 70)
    marks = []
    for row, phase in enumerate(phases):
        y, at = 10 + 22 * row, 0.0
        marks.append(tag("text", phase.name, class_="row-name", x=100, y=y + 12, text_anchor="end"))
        for stage in STAGE_NAMES:
            seconds = phase.slot_seconds.get(stage, 0.0)
            width = scale(seconds) - scale(0)
            if width >= 0.3:
                told = tag("title", f"{phase.name}: {stage} {seconds:.1f} s")
                marks.append(
                    tag(
                        "rect",
                        told,
                        class_=f"stage {stage}",
                        x=scale(at),
                        y=y,
                        width=width,
                        height=16,
                    )
                )
            at += seconds
        marks.append(tag("text", f"{at:,.0f} s", class_="tick", x=scale(at) + 6, y=y + 12))
    words = "slot seconds by what the slots did"
    marks.append(
        tag("text", words, class_="label", x=WIDTH / 2, y=height - 8, text_anchor="middle")
    )
    summary = "The table below holds the same figures"
    return picture("Time by stage", summary, marks, height=height)
