"""What was learned: bits per byte beside the baselines."""

from typing import Any

from cs336.report.run import Run, listing, mapping, number
from cs336.report.section import section


@section("What was learned", order=10)
def evaluation(run: Run) -> dict[str, Any] | None:
    """None for a stage of alignment, which has no bits per byte."""
    if run.facts.get("stage") and run.bits_per_byte is None:
        return None
    return {"comparison": comparison(run), "text": str(run.evaluation.get("text") or "")}


def comparison(run: Run) -> list[dict[str, Any]]:
    """Bits per byte of the model and of the baselines, best first, with each bar's width in percent."""
    rows: list[dict[str, Any]] = [
        {"name": str(b.get("name", "?")), "bits": bits, "how": str(b.get("how", "")), "ours": False}
        for b in map(mapping, listing(run.evaluation.get("baselines")))
        if (bits := number(b.get("bits_per_byte"))) is not None
    ]
    how = str(run.evaluation.get("how", ""))
    if (ours := run.bits_per_byte) is not None:
        how = how or "what validation read while it was trained; `cs336 evaluate` compares it with others"
        rows.append({"name": "This model", "bits": ours, "how": how, "ours": True})
    rows.sort(key=lambda row: row["bits"])
    widest = max((row["bits"] for row in rows), default=1) or 1
    return [row | {"percent": round(100 * row["bits"] / widest, 1)} for row in rows]
