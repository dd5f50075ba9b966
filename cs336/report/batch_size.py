"""write_batch_size_report: how large a batch may be, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cs336.report.chart import Series, compact, line_chart
from cs336.report.page import Part, write_page
from cs336.report.run import listing, mapping, number
from cs336.report.study import CURVES, finite, read_summary


def write_batch_size_report(directory: str | Path) -> Path:
    """Write DIRECTORY/report.html, one self-contained page without scripts, and return its path.

    Reads batch_size.json. Raises ValueError if the directory does not hold it.
    """
    path = Path(directory)
    found = read_summary(path, "batch_size.json", "cs336 batch-size")
    points = [mapping(point) for point in listing(found.get("points"))]
    context = int(number(found.get("context_length")) or 0)
    recommended = int(number(found.get("recommended")) or 0)
    parts = [
        Part("charts", "Over the run", {"charts": _charts(found, points)}, "training"),
        Part("branches", "Branches", _table(found, points), "table"),
    ]
    return write_page(
        path / "report.html",
        eyebrow="Batch size",
        name=path.resolve().name,
        verdict=str(found.get("reason")),
        tiles=[
            ("Recommended batch", f"{recommended:,}", f"sequences, {recommended * context:,} tokens"),
            ("With a learning rate of", f"{number(found.get('lr')) or 0:.3g}", "scaled with the batch"),
            ("Measured from", f"{found.get('batch_size'):,}", "sequences a step"),
            ("Tolerance", f"{found.get('tolerance'):g}", "nats"),
        ],
        parts=parts,
    )


def _charts(found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    noise = [row for row in map(mapping, listing(found.get("noise"))) if finite(row.get("batch"))]
    over = [
        Series("gradient noise scale", [r["tokens"] for r in noise], [r["batch"] for r in noise], "faint"),
        Series("by branching", [p["tokens"] for p in points], [p["critical"] for p in points], "second", dots=True),
    ]
    base, branches = found["batch_size"], []
    for i, point in enumerate(points):
        losses = {int(factor): loss for factor, loss in mapping(point.get("losses")).items()}
        sizes = [base * factor for factor in losses]
        apart = [loss - losses[1] for loss in losses.values()]
        branches.append(Series(f"after {compact(point['tokens'])} tokens", sizes, apart, f"run{i % CURVES}", dots=True))
    return [
        {
            "title": "Critical batch",
            "note": "Sequences, logarithmic: what does no harm by either measure.",
            "keys": over,
            "svg": line_chart(over, title="Critical batch", x_label="tokens", log_y=True),
        },
        {
            "title": "What a larger batch costs",
            "note": f"{_where(found)} loss after a branch, less that of the smallest batch; dashed: what is allowed.",
            "keys": branches,
            "svg": line_chart(
                branches,
                title="What a larger batch costs",
                x_label="sequences a step",
                rules=[("allowed", number(found.get("tolerance")) or 0.0)],
            ),
        },
    ]


def _where(found: Mapping[str, Any]) -> str:
    return "Validation" if found.get("measured") == "val" else "Training"


def _table(found: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    base = found["batch_size"]
    factors = [int(factor) for factor in mapping(points[0].get("losses"))]
    rows = []
    for point in points:
        losses = {int(factor): loss for factor, loss in mapping(point.get("losses")).items()}
        more = "or more" if point.get("at_least") else ""
        scale = point.get("noise_scale")
        rows.append(
            [
                f"{point['step']:,}",
                compact(point["tokens"]),
                *(f"{losses[factor]:.4f}" for factor in factors),
                f"{point['critical']:,} {more}".strip(),
                f"{scale:.3g}" if finite(scale) else "–",
            ]
        )
    sizes = [f"{base * factor:,} sequences" for factor in factors]
    note = f"{_where(found)} loss after {found['branch_tokens']:,} tokens more, by the batch they were read in."
    return {"heads": ["step", "tokens", *sizes, "critical", "noise scale"], "rows": rows, "note": note}
