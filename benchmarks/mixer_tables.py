"""The table of benchmarks/report.py that sets mixers beside each other."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def mixers(rows: list[Row]) -> Iterator[str]:
    """Training and decoding of whole models; then the recurrences by themselves, beside fla's."""
    yield "| mixer | texts x tokens | training, tokens/s | its memory | state of a text | decoding, tokens/s |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in (r for r in rows if r["op"] == "mixer"):
        B, T = row["shape"]
        memory = f"{row['train_bytes'] / 2**30:.1f} GiB" if row["train_bytes"] else "–"
        speed, decoding = (f"{row[f'{kind}_tokens_per_second']:,.0f}" for kind in ("train", "decode"))
        state = f"{row['state_bytes'] / 2**20:,.1f} MiB"
        yield f"| {row['variant']} | {B} x {T} | {speed} | {memory} | {state} | {decoding} |"
    alone = [r for r in rows if r["op"] != "mixer" and "seconds" in r]
    if not alone:
        return
    yield ""
    yield "| the recurrence alone | (B, G, H, T, K, V) | pass | cs336 | fla-core |"
    yield "| --- | --- | --- | ---: | ---: |"
    found = {(r["op"], tuple(r["shape"]), r["pass"], r["variant"]): f"{1e3 * r['seconds']:.3f} ms" for r in alone}
    for op, shape, pass_ in dict.fromkeys(key[:3] for key in found):
        ours, theirs = (found.get((op, shape, pass_, who), "–") for who in ("cs336", "fla"))
        yield f"| {op} | {shape} | {pass_} | {ours} | {theirs} |"
