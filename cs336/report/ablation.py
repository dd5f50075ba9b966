"""write_ablation_report: the arms of an ablation on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cs336.report.chart import compact, linear_ticks
from cs336.report.page import Part, filled, write_page
from cs336.report.run import listing, mapping, number
from cs336.report.study import CURVES, curves, read_summary

ROW, LEFT, WIDTH, FOOT = 26, 120, 460, 38  # of the chart of intervals
CHARS = 19  # of an arm's name in it


def write_ablation_report(directory: str | Path) -> Path:
    """Write DIRECTORY/report.html, one self-contained page without scripts, and return its path.

    Reads ablation.json and the run directories. Raises ValueError if the directory holds no ablation.
    """
    path = Path(directory)
    found = read_summary(path, "ablation.json", "cs336 ablate")
    rows = [mapping(row) for row in listing(found.get("rows"))]
    metric = str(found.get("metric"))
    parts = [
        Part("intervals", "Side by side", {"note": _note(found), "svg": interval_chart(rows, metric)}, "picture"),
        Part("table", "Loss and significance", _losses(rows, found)),
        Part("costs", "Size, speed, memory", _costs(rows, found), "table"),
        Part("curves", "As they learned", {"charts": _curves(path, found, metric)}, "training"),
    ]
    return write_page(
        path / "report.html",
        eyebrow="Ablation",
        name=str(found.get("key")),
        verdict=verdict(rows, metric),
        parts=filled(parts),
    )


def verdict(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Which arm is best, and whether that is more than chance."""
    done = sorted((row for row in rows if row.get("mean") is not None), key=lambda row: row["mean"])
    if not done:
        return "No run is done."
    best, reference = done[0], rows[0]
    head = f"{best['name']} has the lowest {metric}: {_interval(best)}."
    if best is reference:
        beaten = [row["name"] for row in done[1:] if row.get("significant")]
        return f"{head} " + (
            f"Better than {', '.join(beaten)} by more than chance." if beaten else "No arm differs by more than chance."
        )
    if reference.get("mean") is None or best.get("p") is None:
        return f"{head} With fewer than two seeds an arm, chance is not told apart."
    chance = "by more than chance" if best.get("significant") else "which may be chance"
    return f"{head} That is {abs(best['difference']):.4f} less than {reference['name']}, {chance} (p {_p(best)})."


def _note(found: Mapping[str, Any]) -> str:
    seeds = number(found.get("seeds")) or 1
    return f"Mean over {seeds:.0f} seed{'s' * (seeds != 1)} and its 95 % interval (Student's t); a dot a run."


def interval_chart(rows: Sequence[Mapping[str, Any]], metric: str) -> Markup:
    """A line an arm: its interval, its mean, its runs."""
    shown = [row for row in rows if row.get("mean") is not None]
    if not shown:
        return Markup("")
    ends = [value for row in shown for value in (*row["scores"], *_ends(row))]
    low, high = min(ends), max(ends)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    height = ROW * len(shown) + FOOT

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 16)

    line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format
    text = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format
    parts = []
    for tick in linear_ticks(low, high, 5):
        parts += [
            line("grid", at(tick), at(tick), 4, height - FOOT),
            text("", at(tick), height - FOOT + 15, "middle", f"{tick:.4g}"),
        ]
    parts.append(text("", WIDTH - 16, height - 5, "end", metric))
    for i, row in enumerate(shown):
        y, name = ROW * (i + 0.5), str(row["name"])
        parts.append(
            text("rule-name", LEFT - 8, y + 3.5, "end", name if len(name) <= CHARS else name[: CHARS - 1] + "…")
        )
        begin, end = _ends(row)
        style = f"line run{i % CURVES}"
        parts.append(line(style, at(begin), at(end), y, y))
        parts.append(line(style, at(row["mean"]), at(row["mean"]), y - 7, y + 7))
        dots = [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2"/>').format(at(score), y) for score in row["scores"]]
        mark = Markup('<g class="dots run{}"><title>{}: {}</title>{}</g>')
        parts.append(mark.format(i % CURVES, name, _interval(row), Markup("").join(dots)))
    svg = '<svg viewBox="0 0 {0} {1}" style="min-width: 360px; max-width: 46rem" role="img" aria-label="{2}">{3}</svg>'
    return Markup(svg).format(WIDTH, height, f"{metric} of each arm", Markup("").join(parts))


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    half = row.get("half_width") or 0.0
    return row["mean"] - half, row["mean"] + half


def _interval(row: Mapping[str, Any]) -> str:
    half = row.get("half_width")
    return f"{row['mean']:.4f}" + ("" if half is None else f" ± {half:.4f}")


def _p(row: Mapping[str, Any]) -> str:
    p = row.get("p")
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _losses(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    table = []
    for row in rows:
        mean = "–" if row.get("mean") is None else _interval(row)
        difference = "" if row.get("difference") is None else f"{row['difference']:+.4f}"
        significant = "" if row.get("p") is None else "yes" if row.get("significant") else "no"
        told = "; ".join(dict.fromkeys(row.get("failures", [])))[:160]
        done = f"{len(row['scores'])}/{found.get('seeds')}"
        table.append([row["name"], mean, difference, _p(row), significant, done, told])
    heads = ["", str(found.get("metric")), "to the first", "p (Welch, Holm)", "significant", "done", ""]
    return {"heads": heads, "rows": table, "note": ""}


def _costs(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    table = []
    for row in rows:
        speed = row.get("tokens_per_second")
        table.append(
            [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['flops_per_token'] / 1e6:,.3f}",
                f"{100 * row['residual']:+.3f} %" if row is not rows[0] else "",
                "" if row.get("d_ff") is None else f"{row['d_ff']:,}",
                "" if speed is None else compact(speed),
                f"{row['memory_bytes'] / 2**20:,.1f}",
                f"{row['state_bytes'] / 2**10:,.1f}",
            ]
        )
    matched = {"params": "parameters", "flops": "FLOPs a token"}.get(str(found.get("match")))
    how = (
        f"Matched by {matched}: d_ff was solved for, and the residual is what whole features leave. " if matched else ""
    )
    measured = "the most that the allocator gave" if any(row.get("measured") for row in rows) else "as predicted"
    note = f"{how}Memory of a training step, {measured}; state of one sequence of the whole context, in bfloat16."
    heads = ["", "parameters", "MFLOP/token", "residual", "d_ff", "tokens/s", "memory MiB", "state KiB"]
    return {"heads": heads, "rows": table, "note": note}


def _curves(path: Path, found: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    runs = [(name, str(folders[0])) for name, folders in mapping(found.get("folders")).items() if folders]
    return curves(path, runs, metric, "Logarithmic, the first seed of each arm.")
