"""Drawing by numbers: scales, ticks, axes and elements of an SVG that its page's style colours.

Reads: numbers. Writes: markup, in which text and attributes are escaped and nothing is invisible.
Never: names a colour; classes do, so that light, dark and print each have their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from darwin_exp.unseen import visible

WIDTH, HEIGHT = 600, 330


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """Return an element; `class_` is class, underscores are hyphens, None leaves one out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.1f}" if isinstance(value, float) else _safe(str(value))
            words.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    inner = "".join(_safe(child) for child in children)
    return Markup(f"<{' '.join(words)}>{inner}</{name}>")


def _safe(text: str) -> str:
    """Return markup as it is, and other text escaped, with invisible characters spelt out."""
    return str(text if isinstance(text, Markup) else escape(visible(text)))


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, n: int = 6) -> list[float]:
        """Return about n round values within the scale."""
        span = self.high - self.low
        if span <= 0 or not math.isfinite(span):
            return [self.low]
        raw = span / n
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def robust_limits(values: Sequence[float], held: Sequence[float] = ()) -> tuple[float, float]:
    """Return limits that a few ruined agents cannot stretch.

    Args:
        held: values that lie within the limits in any case.
    """
    values = values or held
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if len(values) >= 4:
        quarters = statistics.quantiles(values, n=4, method="inclusive")
        reach = 2 * max(quarters[2] - quarters[0], 0.02 * abs(quarters[1]))
        low, high = max(low, quarters[0] - reach), min(high, quarters[2] + reach)
    low, high = min([low, *held]), max([high, *held])
    room = max(high - low, 0.02 * abs(high), 1e-9)
    return low - 0.08 * room, high + 0.08 * room


@dataclass(frozen=True)
class Plane:
    """The area of a chart, with its two scales."""

    x: Scale
    y: Scale
    width: int = WIDTH
    height: int = HEIGHT

    def grid(
        self,
        x_ticks: Sequence[float],
        x_label: str,
        y_label: str,
        show: Callable[[float], str] = lambda value: f"{value:.6g}",
    ) -> list[Markup]:
        """Return horizontal grid lines, both axes' numbers and their labels."""
        left, right = self.x.start, self.x.end
        drawn = []
        for value in self.y.ticks():
            at = self.y(value)
            drawn.append(tag("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
            drawn.append(
                tag("text", show(value), class_="tick", x=left - 8, y=at + 4, text_anchor="end")
            )
        bottom = self.y.start
        drawn.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
        drawn += [
            tag(
                "text",
                show(value),
                class_="tick",
                x=self.x(value),
                y=bottom + 18,
                text_anchor="middle",
            )
            for value in x_ticks
        ]
        middle = (left + right) / 2
        drawn.append(
            tag("text", x_label, class_="label", x=middle, y=bottom + 40, text_anchor="middle")
        )
        drawn.append(tag("text", y_label, class_="label", x=left - 44, y=self.y.end - 14))
        return drawn


def picture(
    title: str,
    summary: str,
    marks: Iterable[str],
    width: int = WIDTH,
    height: int = HEIGHT,
    is_fixed: bool = False,
) -> Markup:
    """Return a whole SVG.

    Args:
        summary: says in words what it shows, for those who do not see it.
        is_fixed: whether it keeps its size, rather than taking the width that there is.
    """
    return tag(
        "svg",
        tag("title", title),
        tag("desc", summary),
        *marks,
        class_="chart",
        width=width if is_fixed else None,
        height=height if is_fixed else None,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"{title}. {summary}",
        preserveAspectRatio="xMinYMin meet",
    )


def steps(points: Sequence[tuple[float, float]]) -> str:
    """Return a path through pixel positions that goes level first, then up or down."""
    return "".join(
        f"H{x:.1f}V{y:.1f}" if k else f"M{x:.1f} {y:.1f}" for k, (x, y) in enumerate(points)
    )


def whole_ticks(last: int, n: int = 12) -> list[float]:
    """Return round whole numbers from 0 to `last`, about n of them at most."""
    step = next(s for k in range(12) for m in (1, 2, 5) if (s := m * 10**k) * n >= last)
    return [float(k) for k in range(0, last + 1, step)]
