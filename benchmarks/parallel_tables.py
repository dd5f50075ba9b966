"""Bodies of the report's tables for runs on several GPUs: what a run measured, as lines of Markdown."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
MEASURED_AS = (("seconds", "seconds"), ("peak_bytes", "bytes"))  # of a plan: row name, what its prediction is called


def parallel(rows: list[Row]) -> Iterator[str]:
    yield f"| {on_gpus(rows)} | a step | memory of one | |"
    yield "| --- | ---: | ---: | --- |"
    for row in rows:
        extra = [f"{row['tokens_per_second'] / 1e3:.1f}k tokens/s"] if "tokens_per_second" in row else []
        extra += [f"{row['of_linear']:.1%} of linear"] if "of_linear" in row else []
        extra += [f"{row['of_perfect_split']:.3f}x a perfect split"] if "of_perfect_split" in row else []
        extra += [f"{row['of_adamw']:.3f}x AdamW's"] if "of_adamw" in row else []
        if row.get("communication_ms"):
            extra += [f"{row['exposed_ms']:.2f} of {row['communication_ms']:.2f} ms of messages not hidden"]
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else "–"
        tokens = "{:,} tokens, {} heads: ".format(*row["shape"]) if row["op"] == "parallel ring" else ""
        cells = (tokens + row["variant"], f"{1e3 * row['seconds']:.2f} ms", memory, ", ".join(extra))
        yield "| " + " | ".join(cells) + " |"


def parallel_equal(rows: list[Row]) -> Iterator[str]:
    yield f"| {on_gpus(rows)} | loss apart | gradients apart | weights apart, after 5 steps |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows:
        cells = (f"{row.get(f'{what}_difference', math.nan):.1e}" for what in ("loss", "gradient", "weight"))
        yield f"| {row['variant']} | {' | '.join(cells)} |".replace("nan", "–")


def parallel_plan(rows: list[Row]) -> Iterator[str]:
    """A row a layout: what the planner says of it, and by how much that is off."""
    yield f"| {rows[0]['model']} {on_gpus(rows)} | a step | predicted | memory of one | predicted | loss apart |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        times = [f"{1e3 * row[name]:.1f} ms" for name in ("seconds", "predicted_seconds")]
        sizes = [f"{row[name] / 2**30:.2f} GiB" if row[name] else "–" for name in ("peak_bytes", "predicted_bytes")]
        off = [f" ({row[f'predicted_{b}'] / row[a] - 1:+.1%})" if row[a] else "" for a, b in MEASURED_AS]
        cells = (times[0], times[1] + off[0], sizes[0], sizes[1] + off[1], f"{row['loss_difference']:.1e}")
        yield f"| {row['variant']} | {' | '.join(cells)} |"


def parallel_engine(rows: list[Row]) -> Iterator[str]:
    yield f"| {on_gpus(rows)} | answers' tokens/s | tokens as on one, of a small model |"
    yield "| --- | ---: | ---: |"
    for row in rows:
        yield f"| {row['variant']} | {row['tokens_per_second']:,.0f} | {row['equal_tokens']:.1%} |"


def on_gpus(rows: list[Row]) -> str:
    count = rows[0]["processes"]
    return f"on {count} GPU{'s' if count > 1 else ''}"


def collectives(rows: list[Row]) -> Iterator[str]:
    """Bus bandwidth in GB/s, a column a size."""
    sizes = sorted({row["bytes"] for row in rows})
    yield "| GB/s on the bus | " + " | ".join(f"{size / 2**20:.0f} MiB" for size in sizes) + " |"
    yield "| --- " + "| ---: " * len(sizes) + "|"
    for name, group in itertools.groupby(rows, lambda row: row["variant"]):
        found = {row["bytes"]: row["bus_gbps"] for row in group}
        yield f"| {name} | " + " | ".join(f"{found[size]:.0f}" if size in found else "–" for size in sizes) + " |"
