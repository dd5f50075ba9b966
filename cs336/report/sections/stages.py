"""Where the time went."""

from typing import Any

from cs336.report.run import Run, mapping, number
from cs336.report.section import section
from cs336.utils.duration import duration


@section("Where the time went", order=50)
def stages(run: Run) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"name": name, "seconds": seconds, "what": str(mapping(stage).get("summary", ""))}
        for name, stage in run.stages.items()
        if (seconds := number(mapping(stage).get("seconds"))) is not None
    ]
    longest = max((row["seconds"] for row in rows), default=0) or 1
    timed = [
        row | {"time": duration(row["seconds"]), "percent": round(100 * row["seconds"] / longest, 1)} for row in rows
    ]
    return {"stages": timed}
