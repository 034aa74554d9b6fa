"""The report's charts as PNG pictures, for papers, slides and MLflow.

Reads: facts.
Writes: perplexity.png, mfu.png, pareto.png, best_so_far.png, lineage.png and edits.png.
Never: shows a window or touches matplotlib's global state, so any thread may draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darwin_exp.chronicle import Agent, environment_of
from darwin_exp.plots import (
    BLUE,
    FAILURES,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    generation_plots,
    save,
    sheet,
)
from darwin_exp.protocols import Event
from darwin_exp.report.boundaries import name_of
from darwin_exp.report.charts import pareto_front
from darwin_exp.report.effects import MFU, PERPLEXITY, Mean
from darwin_exp.report.facts import Facts
from darwin_exp.report.lineage import direction_of, rows
from darwin_exp.report.progress import progress
from darwin_exp.report.svg import robust_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(facts: Facts, folder: Path) -> list[Path]:
    """Draw all pictures into a folder, which is made if it is missing, and return their files."""

    chronicle = facts.chronicle
    repeats = [_merged(event) for event in chronicle.base_repeats]
    kept = [
        _merged(event) for event in chronicle.of_kind("generation") if _is_current(facts, event)
    ]
    drawn = generation_plots(folder, list(_individuals(facts)), kept, repeats)
    others = (_pareto, _best_so_far, _lineage, _edits)
    return drawn + [one(facts, folder) for one in others]


def _individuals(facts: Facts) -> Iterator[dict[str, object]]:
    """Yield those who were measured in the last environment, as they were measured there."""
    again = {
        event.payload["individual_id"]: event
        for event in facts.chronicle.of_kind("remeasured")
        if _is_current(facts, event)
    }
    for event in facts.chronicle.of_kind("individual"):
        found = again.get(event.payload["individual_id"])
        if found is not None:
            yield {**_merged(event), **_merged(found)}
        elif _is_current(facts, event):
            yield _merged(event)


def _is_current(facts: Facts, event: Event) -> bool:
    return environment_of(event) == facts.chronicle.current.index


def _merged(event: Event) -> dict[str, object]:
    return {**event.measured, **event.payload}


def _pareto(facts: Facts, folder: Path) -> Path:
    figure, axes = sheet(
        "Perplexity against MFU",
        "MFU (higher is better)",
        "validation perplexity (lower is better)",
    )
    known = [
        agent
        for agent in facts.chronicle.compared
        if agent.value(PERPLEXITY) is not None and agent.value(MFU) is not None
    ]
    front = pareto_front(known)
    if not known:
        _say_nothing(axes, "no agent has both a perplexity and an MFU")
        return save(figure, folder / "pareto.png")
    places = [(agent.values[MFU], agent.values[PERPLEXITY]) for agent in known]
    xs, ys = zip(*places, strict=True)
    axes.scatter(xs, ys, s=30, color=BLUE, alpha=0.5, label="agent", zorder=3)
    line = [(agent.values[MFU], agent.values[PERPLEXITY]) for agent in front]
    axes.plot(
        *zip(*line, strict=True),
        color=VERMILION,
        marker="o",
        markerfacecolor="none",
        markersize=10,
        drawstyle="steps-pre",
        label="no other beats it in both",
        zorder=4,
    )
    base = facts.chronicle.base
    if base in known and base is not None:
        place = ([base.values[MFU]], [base.values[PERPLEXITY]])
        axes.scatter(*place, marker="s", s=70, color="black", label="base", zorder=5)
    axes.set_ylim(*robust_limits([y for _, y in places], [y for _, y in line]))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10.5)
    return save(figure, folder / "pareto.png")


def _best_so_far(facts: Facts, folder: Path) -> Path:
    found = progress(facts)
    words = "; ".join(filter(None, ("rewrites finished", found.remark)))
    label = found.label if found.name == "MFU" else found.label[0].lower() + found.label[1:]
    figure, axes = sheet("Best so far", words, label)
    if found.each:
        xs, ys = [k for k, _, _ in found.each], [value for _, _, value in found.each]
        axes.scatter(xs, ys, s=16, color=BLUE, alpha=0.5, label="agent")
    if found.curve:
        for curve in filter(None, found.curves):
            axes.plot(
                *zip(*curve, strict=True),
                color=VERMILION,
                linewidth=2.2,
                drawstyle="steps-post",
                label="best so far" if curve is found.curves[-1] else None,
            )
        opened = zip(found.opened_at, facts.chronicle.environments[1:], strict=True)
        for k, (place, environment) in enumerate(opened):
            axes.axvline(place, color=GREY, linewidth=1.2, linestyle=":")
            axes.text(
                place,
                0.97 - 0.05 * k,
                f" {name_of(facts.chronicle, environment)}",
                transform=axes.get_xaxis_transform(),
                ha="left" if place < 0.7 * len(facts.chronicle.rewrites) else "right",
                fontsize=10,
                color=GREY,
            )
        held = [value for _, value in found.curve]
        axes.set_ylim(*robust_limits([value for _, _, value in found.each], held))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10.5)
    else:
        _say_nothing(axes, "nothing was measured")
    return save(figure, folder / "best_so_far.png")


def _lineage(facts: Facts, folder: Path) -> Path:
    """Draw the whole tree at a glance: a row per agent, the selected one's line in bold."""
    from matplotlib.collections import LineCollection

    placed = rows(facts)
    height = min(16.0, max(4.0, 1.4 + 0.16 * len(placed)))
    figure, axes = sheet("Lineage", "generation", "", (9.0, height))
    axes.grid(visible=False)
    axes.set_yticks([])
    line = {agent.individual_id for agent in facts.champions_line}
    strokes: dict[str, list[list[tuple[float, float]]]] = {}
    for place in placed:
        if place.parent_row is not None:
            kind = direction_of(facts, place.agent)
            kind = "line" if place.agent.individual_id in line else kind
            parent = _column(placed[place.parent_row].agent)
            corners = [(parent, place.parent_row), (parent, place.row)]
            strokes.setdefault(kind, []).append([*corners, (_column(place.agent), place.row)])
    styles = (
        ("failed", GREY, 0.5, ":", "failed"),
        ("open", GREY, 0.8, "-", "not measured"),
        ("worse", ORANGE, 0.7, "--", "less fit than its parent"),
        ("better", SKY, 1.0, "-", "fitter than its parent"),
        ("line", VERMILION, 2.6, "-", "the selected agent's line"),
    )
    for kind, colour, width, style, label in styles:
        if kind in strokes:
            axes.add_collection(
                LineCollection(
                    strokes[kind], colors=colour, linewidths=width, linestyles=style, label=label
                )
            )
    size = max(3.0, min(30.0, 4000 / max(1, len(placed))))
    ok = [place for place in placed if place.agent.is_ok]
    axes.scatter([_column(p.agent) for p in ok], [p.row for p in ok], s=size, color=BLUE, zorder=3)
    for status, (marker, colour) in FAILURES.items():
        lost = [place for place in placed if place.agent.status.value == status]
        if lost:
            axes.scatter(
                [_column(p.agent) for p in lost],
                [p.row for p in lost],
                s=1.6 * size,
                marker="_" if marker == "=" else marker,
                color=colour,
                zorder=3,
                label=status.lower().replace("_", " "),
            )
    last = max((place.agent.generation for place in placed), default=0)
    axes.set_xlim(-1.6, last + 0.6)
    axes.set_xticks([-1, *range(0, last + 1, 1 + last // 12)])
    axes.set_xticklabels(["base", *map(str, range(0, last + 1, 1 + last // 12))])
    axes.set_ylim(len(placed) + 0.5, -1.5)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return save(figure, folder / "lineage.png")


def _column(agent: Agent) -> float:
    return -1.0 if agent.is_base else float(agent.generation)


def _edits(facts: Facts, folder: Path) -> Path:
    """Draw each operator's mean effect on perplexity with its interval."""
    known: list[tuple[str, Mean]] = [
        (record.name, record.perplexity)
        for record in facts.operators
        if record.perplexity is not None
    ]
    figure, axes = sheet(
        "Mean effect of each edit",
        "change of validation perplexity against the parent, % (left is better), 95 % interval",
        "",
        (9.0, max(3.2, 1.6 + 0.26 * len(known))),
    )
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    if not known:
        _say_nothing(axes, "no edit was measured")
        return save(figure, folder / "edits.png")
    axes.axvline(0, color=GREY, linewidth=1.2)
    for row, (_, mean) in enumerate(known):
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=GREY, linewidth=2, zorder=2)
        better = mean.percent < 0
        axes.scatter(
            [mean.percent],
            [row],
            s=46,
            marker="o" if better else "s",
            color=(BLUE if better else ORANGE) if mean.low is not None else GREY,
            zorder=3,
        )
    names = [f"{_plain(name)}  (n={mean.n})" for name, mean in known]
    axes.set_yticks(range(len(known)), names, parse_math=False)
    axes.set_ylim(len(known) - 0.4, -0.6)
    _limit_to_means(axes, [mean for _, mean in known])
    return save(figure, folder / "edits.png")


def _limit_to_means(axes: Axes, means: Sequence[Mean]) -> None:
    """Keep wide intervals of a few outcomes from squeezing all the others."""
    reach = 2.5 * max(1.0, *(abs(mean.percent) for mean in means))
    ends = [v for m in means for v in (m.low, m.high, m.percent, 0.0) if v is not None]
    low, high = max(min(ends), -reach), min(max(ends), reach)
    room = 0.06 * (high - low)
    axes.set_xlim(low - room, high + room)


def _plain(name: str) -> str:
    """Return a name that asks for no glyph that the font may lack, and leaves room for others."""
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return shown if len(shown) <= 32 else f"{shown[:29]}..."


def _say_nothing(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=GREY)
