"""The charts that are rows: what each edit did on average, and what the slots' time went into.

Reads: facts. Writes: markup.
Never: tells things apart by colour alone; a round mark is an improvement, a square one is not.
"""

from __future__ import annotations

from markupsafe import Markup

from darwin_exp.report.effects import Mean
from darwin_exp.report.facts import Facts, signed
from darwin_exp.report.svg import WIDTH, Plane, Scale, picture, tag

STAGE_NAMES = ("startup", "training", "scoring", "overhead", "idle")


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
