"""The picture of a comparison: the best so far against the rewrites that it took.

Reads: a Comparison.
Writes: curves.png, 1000 pixels wide.
Never: shows a window or touches matplotlib's global state, so any thread may draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darwin_exp.compare.comparison import Cohort, Comparison, Setting
from darwin_exp.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)
# Settings are told apart without colour as well; the eighth has the first colour and dashes.
STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP"


def draw_curves(comparison: Comparison, path: Path) -> Path:
    """Draw the curves of every setting, one panel per environment, and return the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = max(1, len(comparison.cohorts))
    figure = Figure(figsize=(10.0, 5.6 * n), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n, 1, squeeze=False)[:, 0]
    for axes, cohort in zip(panels, comparison.cohorts, strict=False):
        _panel(axes, cohort, _title(comparison, cohort))
    if not comparison.cohorts:
        _dress(panels[0], comparison.title)
        _say_empty(panels[0])
    figure.savefig(path)
    return path


def _title(comparison: Comparison, cohort: Cohort) -> str:
    title = f"Best validation perplexity so far: {comparison.title}"
    return title if len(comparison.cohorts) == 1 else f"{title}, {cohort.environment_id}"


def _panel(axes: Axes, cohort: Cohort, title: str) -> None:
    _dress(axes, title)
    drawn = [
        _draw(axes, setting, COLOURS[k % len(COLOURS)], STYLES[k % len(STYLES)], k)
        for k, setting in enumerate(cohort.settings)
    ]
    if not any(drawn):
        _say_empty(axes)
        return
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=10.5, handlelength=4, loc="upper right")


def _draw(axes: Axes, setting: Setting, colour: str, style: Any, k: int) -> bool:
    """Draw one setting: mean, band and thin single runs; return whether there was anything."""
    curve = setting.curve()
    if not curve:
        return False
    for run in setting.finished if len(setting.finished) > 1 else ():
        known = [(n, value) for n, value in enumerate(run.curve) if value is not None]
        axes.plot(*_columns(known), color=colour, linewidth=0.8, alpha=0.35, drawstyle="steps-post")
    steps = [point.rewrites for point in curve]
    lows, highs = [point.low for point in curve], [point.high for point in curve]
    if None not in lows and None not in highs:
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.13, step="post", linewidth=0)  # type: ignore[arg-type]
    n = len(setting.finished)
    axes.plot(
        steps,
        [point.mean for point in curve],
        color=colour,
        linestyle=style,
        linewidth=2.2,
        drawstyle="steps-post",
        marker=MARKERS[k % len(MARKERS)],
        markersize=5,
        markevery=max(1, len(steps) // 6),
        label=f"{setting.label} ({n} run{'s' if n > 1 else ''})",
    )
    return True


def _dress(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12)
    axes.set_xlabel("rewrites finished", fontsize=11.5)
    axes.set_ylabel("best validation perplexity (lower is better)", fontsize=11.5)
    axes.tick_params(labelsize=11, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no finished run yet", transform=axes.transAxes, ha="center", color=GREY)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [n for n, _ in points], [value for _, value in points]
