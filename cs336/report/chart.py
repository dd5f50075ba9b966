"""Charts as inline SVG: no scripts, no fonts, colours from the page's CSS variables, values where the pointer is.

One chart unit is one CSS pixel on a 390-pixel phone, so that text stays readable there and grows on a desktop.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 34
MOST = 1e300  # of a number: differences and sums of a chart's stay finite
MAX_POINTS = 360  # one a unit of width: more cannot be seen
HOVERED = 90  # places along x that show their values
CHAR, GAP = 5.8, 6  # width of a character of a rule's name, and from the plot to it


@dataclass(frozen=True)
class Series:
    """A line. `style` is a CSS class: "main", "second", "faint", or "run0" to "run5"."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "main"
    dots: bool = False


def compact(value: float) -> str:
    """1234567 -> "1.23M", 0.0003 -> "3e-4": at most three digits that matter."""
    if not math.isfinite(value):
        return str(value)
    for power, suffix in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{suffix}"
    if value and abs(value) < 0.001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], at most `most` of them."""
    raw = (high - low) / (most - 1)
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round seconds, minutes or hours inside [low, high], at most `most` of them."""
    units = [m * u for u in (1, 60, 3600) for m in (1, 2, 5, 10, 15, 20, 30)]
    step = next((u for u in units if u * (most - 1) >= high - low), 0)
    if not (high - low) > 1:
        return linear_ticks(low, high, most)
    if not step:
        return [3600 * hours for hours in linear_ticks(low / 3600, high / 3600, most)]
    return [float(step * i) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2, 3 ... 9 times powers of ten, thinned until at most `most` are left."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 6, 8), (1, 2, 5), (1,)):
        ticks = [d * 10.0**e for e in decades for d in digits if low * 0.999 <= d * 10.0**e <= high * 1.001]
        if len(ticks) <= most:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else [low, high]


def _drawable(value: float) -> bool:
    return abs(value) < MOST


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """The points that can be drawn, averaged in runs of equal length so that at most `most` are left."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if _drawable(x) and _drawable(y)]
    run = math.ceil(len(points) / most) or 1
    runs = (points[i : i + run] for i in range(0, len(points), run))
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def smooth(ys: Sequence[float], reach: int) -> list[float]:
    """Mean over the neighbours on both sides: up to `reach` of them, fewer near the start, where curves are steep."""
    out = []
    for i in range(len(ys)):
        half = min(reach, i // 8)
        near = [y for y in ys[i - half : i + half + 1] if math.isfinite(y)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    rules: Sequence[tuple[str, float]] = (),
    x_text: Callable[[float], str] | None = None,
) -> Markup:
    """Lines over a shared x axis, with horizontal `rules` named at the right of the lines, where no line comes.

    Empty Markup where no series has a point. Along x the values under the pointer are shown as a tooltip.

    Args:
        x_text: how a value of x is written; a number of at most three digits if None.
        log_y: logarithmic y where all values are positive and span more than a factor of 1.5.
        from_zero: the y axis starts at zero (for rates, where the distance to zero has a meaning).
    """
    drawn = [(s, points) for s in series if (points := thin(s.xs, s.ys))]
    rules = [(name, value) for name, value in rules if _drawable(value)]
    if not drawn:
        return Markup("")
    all_x = [x for _, points in drawn for x, _ in points]
    all_y = [y for _, points in drawn for _, y in points] + [value for _, value in rules]
    log_y = log_y and min(all_y) > 1 / MOST and max(all_y) > 1.5 * min(all_y)
    low, high = _span(min(0.0, *all_y) if from_zero else min(all_y), max(all_y), log_y)
    x_low, x_high = min(0.0, *all_x), max(all_x)  # from zero, so that charts can be compared
    x_high = x_high if x_high > x_low else x_low + 1
    x_text = x_text or compact
    right = WIDTH - RIGHT - max((CHAR * len(_rule_name(*rule)) + GAP for rule in rules), default=0.0)

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)

    def y_at(y: float) -> float:
        f = math.log(y / low) / math.log(high / low) if log_y else (y - low) / (high - low)
        return HEIGHT - BOTTOM - f * (HEIGHT - TOP - BOTTOM)

    x_ticks = (time_ticks if x_text is not compact else linear_ticks)(x_low, x_high, 5)
    parts = [_axes(x_at, y_at, x_ticks, (log_ticks if log_y else linear_ticks)(low, high), right, x_text)]
    for s, points in drawn:
        at = [f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points]
        if len(at) > 1:
            parts.append(Markup('<polyline class="line {}" points="{}"/>').format(s.style, " ".join(at)))
        if s.dots or len(at) == 1:
            dots = Markup("").join(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(x_at(x), y_at(y)) for x, y in points[-40:]
            )
            parts.append(Markup('<g class="dots {}">{}</g>').format(s.style, dots))
    parts += _rules(y_at, rules, right)
    parts.append(_text(right, HEIGHT - 3, x_label, "end"))
    parts.append(_hover(drawn, x_at, right, lambda x: f"{x_label} {x_text(x)}"))
    return _svg(title, Markup("").join(parts))


def bar_chart(labels: Sequence[str], values: Sequence[float], *, title: str, x_label: str) -> Markup:
    """Vertical bars from zero; empty Markup where there are no values."""
    if not values:
        return Markup("")
    values = [value if _drawable(value) else 0.0 for value in values]
    high = max(*values, 1) * 1.04
    pitch = (WIDTH - LEFT - RIGHT) / len(values)
    every = math.ceil(len(values) / 16)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - y / high * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(float, y_at, [], linear_ticks(0, high), WIDTH - RIGHT, compact)]
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = LEFT + i * pitch
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {:,g}</title></rect>'
            ).format(x + pitch * 0.12, y_at(value), pitch * 0.76, HEIGHT - BOTTOM - y_at(value), label, value)
        )
        if i % every == 0:
            parts.append(_text(x + pitch / 2, HEIGHT - BOTTOM + 14, label, "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 3, x_label, "end"))
    return _svg(title, Markup("").join(parts))


def _span(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        pad = (high / low) ** 0.04
        return low / pad, high * pad
    if high <= low:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    pad = (high - low) * 0.04
    return (low if low == 0 else low - pad), high + pad


def _axes(
    x_at: Callable[[float], float],
    y_at: Callable[[float], float],
    xs: list[float],
    ys: list[float],
    right: float,
    x_text: Callable[[float], str],
) -> Markup:
    line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format
    parts = []
    for y in ys:
        parts.append(line("grid", LEFT, right, y_at(y), y_at(y)))
        parts.append(_text(LEFT - 6, y_at(y) + 3.5, compact(y), "end"))
    for x in xs:
        parts.append(line("grid", x_at(x), x_at(x), HEIGHT - BOTTOM, HEIGHT - BOTTOM + 4))
        anchor = "middle" if x_at(x) < right - 12 else "end"
        parts.append(_text(min(x_at(x), right), HEIGHT - BOTTOM + 15, x_text(x), anchor))
    parts.append(line("axis", LEFT, right, HEIGHT - BOTTOM, HEIGHT - BOTTOM))
    return Markup("").join(parts)


def _rule_name(label: str, value: float) -> str:
    return f"{label} {value:.2f}"


def _rules(y_at: Callable[[float], float], rules: Sequence[tuple[str, float]], right: float) -> list[Markup]:
    """Dashed lines, their names beside the right end, a line of text apart."""
    parts, last = [], -math.inf
    for label, value in sorted(rules, key=lambda rule: -rule[1]):
        y = y_at(value)
        last = max(y + 3.5, last + 11)
        parts.append(
            Markup('<line class="rule" x1="{}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, y, y)
        )
        parts.append(_text(right + GAP, last, _rule_name(label, value), "start", "rule-name"))
    return parts


def _hover(
    drawn: Sequence[tuple[Series, list[tuple[float, float]]]],
    x_at: Callable[[float], float],
    right: float,
    head: Callable[[float], str],
) -> Markup:
    """Strips over the chart, each with the values of the lines at the point of the first that is nearest."""
    longest = max((points for _, points in drawn), key=len)
    places = thin([x for x, _ in longest], [y for _, y in longest], HOVERED)
    edges = [LEFT, *((x_at(a[0]) + x_at(b[0])) / 2 for a, b in itertools.pairwise(places)), right]
    strip = Markup('<rect class="hover" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format
    parts = []
    for (x, _), (begin, end) in zip(places, itertools.pairwise(edges), strict=True):
        near = ((s.label, min(points, key=lambda point: abs(point[0] - x))) for s, points in drawn)
        values = [f"{label}: {y:.4g}" + ("" if at == x else f" (at {compact(at)})") for label, (at, y) in near]
        parts.append(strip(begin, TOP, max(0.0, end - begin), HEIGHT - TOP - BOTTOM, "\n".join([head(x), *values])))
    return Markup("").join(parts)


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def _svg(title: str, body: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(title), body
    )
