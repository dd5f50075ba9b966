"""Parallel coordinates as inline SVG: an axis a key, a line a configuration, the result last (Inselberg 1985)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cs336.report.chart import CHAR, compact, linear_ticks, log_ticks

PITCH, HEIGHT, TOP, BOTTOM, SIDE = 130, 240, 30, 10, 46
MOST_SCALE = 1.4  # on a wide screen
MOST_CHARS = 14  # of a value's name


@dataclass(frozen=True)
class Coordinate:
    """An axis: numbers from low to high, or names in order."""

    title: str
    values: Sequence[float | str]
    """A line each."""
    names: Sequence[str] = ()
    """Where they are names: all of them, from the bottom up."""
    log: bool = False
    marks: Sequence[float] = ()
    """Where the axis of numbers is marked, if not at round ones."""

    def places(self) -> list[float]:
        """0 at the bottom to 1 at the top."""
        if self.names:
            return [self._rank(self.names.index(str(value))) for value in self.values]
        return [self.place(float(value)) for value in self.values]

    def _rank(self, i: int) -> float:
        return (i + 0.5) / len(self.names)

    def _ends(self) -> tuple[float, float]:
        numbers = [float(value) for value in self.values]
        return min(numbers), max(numbers)

    def place(self, value: float) -> float:
        low, high = self._ends()
        if not high > low:
            return 0.5
        return math.log(value / low) / math.log(high / low) if self.log else (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        if self.names:
            return [(self._rank(i), name) for i, name in enumerate(self.names)]
        low, high = self._ends()
        if not high > low:
            return [(0.5, compact(low))]
        inside = [mark for mark in self.marks if low <= mark <= high]
        return [(self.place(v), compact(v)) for v in inside or (log_ticks if self.log else linear_ticks)(low, high, 5)]


def parallel_chart(axes: Sequence[Coordinate], labels: Sequence[str], styles: Sequence[str], title: str) -> Markup:
    """Lines through the axes, later ones over earlier; empty Markup where there are none.

    labels: shown where the pointer is on a line; styles: the CSS class of each line.
    """
    if not axes or not labels:
        return Markup("")
    width = PITCH * (len(axes) - 1) + 2 * SIDE + 30
    xs = [SIDE + PITCH * i for i in range(len(axes))]

    def y_at(place: float) -> float:
        return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)

    places = [axis.places() for axis in axes]
    parts = []
    for i, (label, style) in enumerate(zip(labels, styles, strict=True)):
        at = " ".join(f"{x:.1f},{y_at(of[i]):.1f}" for x, of in zip(xs, places, strict=True))
        line = '<polyline class="line {}" points="{}"><title>{}</title></polyline>'
        parts.append(Markup(line).format(style, at, label))
    for x, axis in zip(xs, axes, strict=True):
        parts.append(Markup('<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, TOP, HEIGHT - BOTTOM))
        parts.append(_text(x, TOP - 14, _short(axis.title, int(PITCH / CHAR) - 1), "middle", "rule-name"))
        for place, name in axis.ticks():
            parts.append(_text(x + 5, y_at(place) + 3.5, _short(name, MOST_CHARS), "start", "rule-name"))
    svg = '<svg viewBox="0 0 {0} {1}" style="min-width: {0}px; max-width: {2}px" role="img" aria-label="{3}">{4}</svg>'
    return Markup(svg).format(width, HEIGHT, round(MOST_SCALE * width), title, Markup("").join(parts))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)
