"""write_pareto: models by what they cost and what they are worth, on one page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs336.report.chart import Series, line_chart
from cs336.report.page import Part, write_page

COLOURS = 6  # that can be told apart
COSTS = {"disk_bytes": ("Bytes on disk", "MiB", 2**20), "latency_ms": ("Time of a token", "ms", 1)}


def write_pareto(path: str | Path) -> Path:
    """Write pareto.html beside a pareto.json of cs336.compression, and return its path.

    Raises ValueError for a file of another form.
    """
    path = Path(path)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        rows, text = told["rows"], told["text"]
        table, charts = _table(rows, told["batch"]), [_chart(rows, name) for name in COSTS]
        best = min(rows, key=lambda row: row["bits_per_byte"])["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no pareto.json: {error!r}") from None
    parts = [
        Part("runs", "Side by side", {"columns": table, "changed": {"rows": []}}),
        Part("training", "Cost and worth", {"charts": charts}),
    ]
    return write_page(
        path.with_suffix(".html"),
        eyebrow="Pareto front",
        name=f"{len(rows)} models",
        verdict=f"On {text}, {best} needs the fewest bits for each byte; a ● is on the front of its column.",
        parts=parts,
    )


def _table(rows: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    tasks = list(dict.fromkeys(task for row in rows for task in row["accuracy"]))
    heads = ["", "bits a byte", "disk, MiB", "memory, MiB", "ms a token", f"tokens/s, {batch} at once", *tasks]

    def cell(row: dict[str, Any], name: str, shown: str) -> str:
        return f"{shown} ●" if name in row["front"] else shown

    cells = [
        [
            row["name"],
            f"{row['bits_per_byte']:.4f}",
            cell(row, "disk_bytes", f"{row['disk_bytes'] / 2**20:,.2f}"),
            f"{row['memory_bytes'] / 2**20:,.1f}",
            cell(row, "latency_ms", f"{row['latency_ms']:.2f}"),
            f"{row['tokens_per_second']:,.0f}",
            *(f"{row['accuracy'][task]:.3f}" if task in row["accuracy"] else "–" for task in tasks),
        ]
        for row in rows
    ]
    return {"heads": heads, "rows": cells}


def _chart(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A dot a model, and a line through those on the front."""
    title, unit, size = COSTS[name]
    best = sorted((row for row in rows if name in row["front"]), key=lambda row: row[name])
    line = Series("front", [row[name] / size for row in best], [row["bits_per_byte"] for row in best], "faint")
    dots = [
        Series(row["name"], [row[name] / size], [row["bits_per_byte"]], f"run{i % COLOURS}", dots=True)
        for i, row in enumerate(rows)
    ]
    svg = line_chart([line, *dots], title=title, x_label=unit)
    note = "Bits a byte, lower is better; left is cheaper. The line joins the front."
    return {"title": title, "note": note, "keys": dots, "svg": svg}
