"""Pictures of an evolution: perplexity and MFU of every agent, generation by generation.

Reads: individuals, generations and base repeats as plain mappings.
Writes: perplexity.png and mfu.png, 900 pixels wide; the report adds its own (report/pictures.py).
Never: shows a window or touches matplotlib's global state, so any thread may draw.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, SKY, GREY, PURPLE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#777777",
    "#CC79A7",
)
FAILURES = {
    "CRASHED": ("x", VERMILION),
    "TIMED_OUT": ("|", ORANGE),
    "OUT_OF_MEMORY": ("s", PURPLE),
    "INVALID": ("+", "#000000"),
    "DUPLICATE": ("=", GREY),
    "REJECTED": ("D", VERMILION),
    "QUARANTINED": ("P", PURPLE),
    "INFRA_LOST": ("1", GREY),
}


@dataclass(frozen=True)
class _Panel:
    """What differs between the two pictures."""

    file: str
    metric: str
    title: str
    label: str
    lower_is_better: bool


PANELS = (
    _Panel(
        "perplexity.png",
        "val_perplexity",
        "Validation perplexity by generation",
        "validation perplexity (lower is better)",
        True,
    ),
    _Panel(
        "mfu.png",
        "mfu",
        "Model FLOPs utilisation by generation",
        "MFU, share of peak (higher is better)",
        False,
    ),
)


def generation_plots(
    folder: Path,
    individuals: Sequence[Mapping[str, Any]],
    generations: Sequence[Mapping[str, Any]] = (),
    base_repeats: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Draw both pictures and return their files.

    Args:
        folder: where to write; made if it is missing.
        individuals: every individual so far: generation, slot, status, parent_ids, metrics, rates.
        generations: finished generations, for their `survivors`.
        base_repeats: all measurements of the base: metrics, rates; without any, the individual's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {str(name) for generation in generations for name in generation.get("survivors") or ()}
    return [_draw(panel, folder, individuals, kept, base_repeats) for panel in PANELS]


def _draw(
    panel: _Panel,
    folder: Path,
    individuals: Sequence[Mapping[str, Any]],
    kept: set[str],
    base_repeats: Sequence[Mapping[str, Any]],
) -> Path:
    figure, axes = sheet(panel.title, "generation", panel.label)
    alive = [i for i in individuals if _value(i, panel.metric) is not None and _is_ok(i)]
    values = [_value(i, panel.metric) or 0.0 for i in alive]
    measured = base_repeats or [i for i in alive if not i.get("parent_ids")]
    base = [v for record in measured if (v := _value(record, panel.metric)) is not None]
    last = max((_generation(i) for i in individuals), default=0)
    _limit(axes, values + base, last)
    if base:
        _base_band(axes, base)
    _agents(axes, panel, alive, kept)
    _best_line(axes, panel, alive, last)
    _rug(axes, [i for i in individuals if not _is_ok(i)])
    if not individuals:
        axes.text(0.5, 0.5, "no agent yet", transform=axes.transAxes, ha="center", color=GREY)
    elif axes.get_legend_handles_labels()[0]:
        figure.legend(
            loc="outside lower center", ncols=4, frameon=False, fontsize=10.5, handletextpad=0.4
        )
    return save(figure, folder / panel.file)


def sheet(
    title: str, x_label: str, y_label: str, inches: tuple[float, float] = (9.0, 5.4)
) -> tuple[Figure, Axes]:
    """Return an empty figure of 100 pixels an inch, and its axes, in this project's dress."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=12)
    axes.set_xlabel(x_label, fontsize=11.5)
    axes.set_ylabel(y_label, fontsize=11.5)
    axes.tick_params(labelsize=11, length=0)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Write a figure so that whoever reads the file meanwhile finds the old one or the new one."""
    fresh = path.with_name(f".{threading.get_ident()}-{path.name}")
    for axes in figure.axes:  # what lies within the axes need not be measured to place them
        for artist in (*axes.collections, *axes.lines, *axes.patches, *axes.texts):
            artist.set_in_layout(False)
    try:
        figure.savefig(fresh, format="png", pil_kwargs={"compress_level": 3})
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def _limit(axes: Axes, values: Sequence[float], last: int) -> None:
    """Choose limits that one ruined agent cannot stretch; what lies beyond is drawn at the edge."""
    axes.set_xlim(-0.6, last + 0.6)
    axes.set_xticks(range(0, last + 1, 1 + last // 12))
    for generation in range(1, last + 1, 2):
        axes.axvspan(generation - 0.5, generation + 0.5, color="#F6F6F6", linewidth=0, zorder=0)
    if not values:
        return
    low, high = min(values), max(values)
    if len(values) >= 4:
        quarters = statistics.quantiles(values, n=4, method="inclusive")
        reach = 2 * max(quarters[2] - quarters[0], 0.02 * abs(quarters[1]))
        low, high = max(low, quarters[0] - reach), min(high, quarters[2] + reach)
    room = max(high - low, 0.05 * abs(high), 1e-9)
    # The lowest eighth belongs to the rug of failures.
    axes.set_ylim(low - 0.2 * room, high + 0.08 * room)


def _base_band(axes: Axes, base: Sequence[float]) -> None:
    mean = statistics.fmean(base)
    label = "base"
    if len(base) > 1:
        axes.axhspan(min(base), max(base), color=SKY, alpha=0.22, linewidth=0, zorder=1)
        label = f"base, range of {len(base)} runs"
    axes.axhline(mean, color=GREY, linewidth=1.3, linestyle=(0, (5, 3)), zorder=2, label=label)


def _agents(axes: Axes, panel: _Panel, alive: Sequence[Mapping[str, Any]], kept: set[str]) -> None:
    low, high = axes.get_ylim()
    for survived, size, alpha, label in (
        (False, 34, 0.55, "agent"),
        (True, 62, 0.95, "agent that survived"),
    ):
        group = [i for i in alive if (str(i.get("individual_id")) in kept) is survived]
        inside = [(i, v) for i in group if low <= (v := _value(i, panel.metric) or 0.0) <= high]
        if inside:
            axes.scatter(
                [_place(i) for i, _ in inside],
                [value for _, value in inside],
                s=size,
                color=BLUE,
                alpha=alpha,
                edgecolors="white",
                linewidths=0.8,
                zorder=4,
                label=label,
            )
    for i in alive:
        value = _value(i, panel.metric) or 0.0
        if low <= value <= high:
            continue
        above = value > high
        axes.annotate(
            f"{value:,.4g} {'↑' if above else '↓'}",
            (_place(i), high if above else low + 0.12 * (high - low)),
            ha="center",
            va="top" if above else "bottom",
            fontsize=9,
            color=BLUE,
        )


def _best_line(axes: Axes, panel: _Panel, alive: Sequence[Mapping[str, Any]], last: int) -> None:
    choose = min if panel.lower_is_better else max
    best, line = None, []
    for generation in range(last + 1):
        found = [_value(i, panel.metric) for i in alive if _generation(i) == generation]
        known = [value for value in (*found, best) if value is not None]
        best = choose(known) if known else None
        if best is not None:
            line.append((generation, best))
    if not line:
        return
    # Each level spans its generation's whole width, so that it meets the agent that reached it.
    steps = [(line[0][0] - 0.5, line[0][1]), *line, (last + 0.5, line[-1][1])]
    axes.plot(
        *zip(*steps, strict=True),
        color=VERMILION,
        linewidth=2.2,
        drawstyle="steps-mid",
        zorder=3,
        label="best so far",
    )
    # Above the line for MFU and below it for perplexity: the side where no agent can be.
    axes.annotate(
        f"{line[-1][1]:.4g}",
        steps[-1],
        xytext=(0, -4 if panel.lower_is_better else 4),
        textcoords="offset points",
        ha="right",
        va="top" if panel.lower_is_better else "bottom",
        fontsize=11,
        fontweight="bold",
        color=VERMILION,
    )


def _rug(axes: Axes, failed: Sequence[Mapping[str, Any]]) -> None:
    """Mark agents without a measurement along the bottom, by what became of them."""
    for row, (status, (marker, colour)) in enumerate(FAILURES.items()):
        group = [i for i in failed if i.get("status") == status]
        if not group:
            continue
        axes.scatter(
            [_place(i) for i in group],
            [0.025 + 0.012 * (row % 3)] * len(group),
            transform=axes.get_xaxis_transform(),
            marker="_" if marker == "=" else marker,
            s=46,
            color=colour,
            zorder=4,
            label=f"{status.lower().replace('_', ' ')} ({len(group)})",
        )


def _place(individual: Mapping[str, Any]) -> float:
    """Spread the agents of a generation by slot, so that equal values do not hide each other."""
    slot = int(individual.get("slot") or 0)
    # Steps of the golden ratio fill the width evenly, however many slots there are.
    return _generation(individual) + 0.56 * ((slot * 0.618034) % 1.0 - 0.5)


def _generation(individual: Mapping[str, Any]) -> int:
    return int(individual.get("generation") or 0)


def _is_ok(individual: Mapping[str, Any]) -> bool:
    return individual.get("status") == "OK"


def _value(record: Mapping[str, Any], metric: str) -> float | None:
    for group in ("metrics", "rates"):
        value = (record.get(group) or {}).get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
