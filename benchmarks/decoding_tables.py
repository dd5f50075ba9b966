"""The tables of benchmarks/report.py that say what it takes to decode for less."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def quantization(rows: list[Row]) -> Iterator[str]:
    """A row a method: what a model's held-out text costs, and what its layers weigh, where they are not a peer's."""
    plain = {row["model"]: row["bits_per_byte"] for row in rows if row["method"] == "unquantised"}
    yield "| model | method | bits per byte | lost | MiB of layers |\n| --- | --- | ---: | ---: | ---: |"
    for row in rows:
        lost = f"{row['bits_per_byte']:.4f} | {row['bits_per_byte'] - plain[row['model']]:+.4f}"
        size = "–" if row["method"].startswith(("torchao", "llm-compressor")) else f"{row['mib']:.1f}"
        yield f"| {row['model']} | {row['method']} | {lost} | {size} |"


def decoding(rows: list[Row]) -> Iterator[str]:
    """A row for each kind of weights, and one for each text with prompt lookup."""
    weights, texts = ([row for row in rows if kind in row] for kind in ("weights", "text"))
    if weights:
        yield "| model | weights | GB read a token | tokens a second | of unquantised |"
        yield "| --- | --- | ---: | ---: | ---: |"
    plain = {row["model"]: row["tokens_per_second"] for row in weights if row["weights"] in ("bf16", "fp32")}
    for row in weights:
        speed = row["tokens_per_second"]
        times = f"{speed / plain[row['model']]:.2f}"
        yield f"| {row['model']} | {row['weights']} | {row['gb']:.2f} | {speed:,.0f} | {times} |"
    if weights and texts:
        yield ""
    if texts:
        yield "| model | the text | tokens a second | with prompt lookup | times | drafts right |"
        yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for row in texts:
        speeds = f"{row['tokens_per_second']:,.0f} | {row['with_lookup']:,.0f}"
        times = f"{row['with_lookup'] / row['tokens_per_second']:.2f}"
        yield f"| {row['model']} | {row['text']} | {speeds} | {times} | {row['accepted']} of {row['drafted']} |"
