"""Files of a run that are not there, or cannot be read."""

from typing import Any

from cs336.report.run import Run
from cs336.report.section import section


@section("Not in this run directory", order=90)
def missing(run: Run) -> dict[str, Any] | None:
    return {"missing": run.missing} if run.missing else None
