"""From a pretrained model to one that answers, in `cs336 quickstart --full`: each model, and how rewards rose."""

from typing import Any

from cs336.report.run import Run, listing, mapping, number, read_run
from cs336.report.section import section
from cs336.report.sections.alignment import charts_of


@section("From text to answers", order=12)
def full(run: Run) -> dict[str, Any] | None:
    """None for another run."""
    if not run.full:
        return None
    forms = {"sums": ".1%", "bits_per_byte": ".3f", "mebibytes": ".2f"}
    rows = [mapping(row) for row in listing(run.full.get("rows"))]
    shown = [
        {name: str(row.get(name, "?")) for name in ("after", "where")}
        | {name: _cell(row.get(name), form) for name, form in forms.items()}
        for row in rows
    ]
    rewarded = run.path / str(run.full.get("rewarded", ""))
    charts = charts_of(read_run(rewarded), 2) if (rewarded / "metrics.jsonl").is_file() else []
    reports = [(str(name), str(path)) for name, path in mapping(run.full.get("reports")).items()]
    return {"rows": shown, "tested": run.full.get("tested", "?"), "reports": reports, "charts": charts}


def _cell(value: Any, form: str) -> str:
    found = number(value)
    return "–" if found is None else format(found, form)
