"""Tables of ladders, the laws through them, and their forecasts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from cs336.scaling import ChinchillaLaw, ComputeLaw

Row = dict[str, Any]


def scaling_forecast(rows: list[Row]) -> Iterator[str]:
    """The ladder, the law through it, and for each forecast what came of it."""
    yield "| | parameters | tokens | FLOPs | loss | above the law |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    (law,) = (row for row in rows if row["job"] == "law")
    number = {name: value for name, (value, *_) in intervals(law)}
    fitted = ComputeLaw if "gamma" in number else ChinchillaLaw
    numbers = {field.name: number[field.name] for field in dataclasses.fields(fitted)}
    for row in rows:
        if row["job"] in ("rung", "target"):
            at = (row["flops"],) if fitted is ComputeLaw else (row["parameters"], row["tokens"])
            above = row["loss"] / float(fitted(**numbers).loss(*at)) - 1
            counts = f"{row['parameters']:,} | {row['tokens']:,} | {row['flops']:.3g}"
            yield f"| {row['job']} | {counts} | {row['loss']:.4f} | {100 * above:+.2f} % |"
    yield ""
    shown = (f"{name} {v:.4g} [{low:.4g}, {high:.4g}]" for name, (v, low, high) in intervals(law) if name in numbers)
    formula = "L(C) = E + A / C^gamma" if fitted is ComputeLaw else "L(N, D) = E + A / N^alpha + B / D^beta"
    yield f"{formula}, 95 % intervals: {', '.join(shown)}."
    for row in rows:
        if row["job"] == "forecast":
            held = "within" if row["covered"] else "outside"
            came = "not graded yet" if row["measured"] is None else f"measured {row['measured']:.4f}"
            came += "" if row["measured"] is None else f", error {100 * row['error']:+.2f} %, {held} the interval"
            said = f"loss {row['loss']:.4f}, 95 % between {row['low']:.4f} and {row['high']:.4f}"
            yield f"Forecast of {row['made']} for {row['name']} FLOPs: {said}; {came}."


def intervals(law: Row) -> Iterator[tuple[str, tuple[float, float, float]]]:
    return ((name, value) for name, value in law.items() if isinstance(value, list))
