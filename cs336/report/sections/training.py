"""Curves of a run: by tokens, and the loss by the clock too."""

from typing import Any

from cs336.report.chart import Series, line_chart, smooth
from cs336.report.run import Run
from cs336.report.section import section
from cs336.report.sections.evaluation import comparison
from cs336.utils.duration import duration


@section("Training", order=20)
def training(run: Run) -> dict[str, Any]:
    return {"charts": charts(run)}


def charts(run: Run) -> list[dict[str, Any]]:
    """Every chart's title, one sentence, legend and SVG; a chart without data has an empty SVG."""
    x, x_label = ("tokens", "tokens") if run.column("train/loss", "tokens")[0] else ("step", "steps")
    others = [] if run.evaluation.get("text") else comparison(run)  # of another text than the curve's
    baselines = [(row["name"], row["bits"]) for row in others if not row["ours"]]
    bits = Series("validation", *run.column("val/bpb", x), "second", dots=True)
    falls = "Nats per token, logarithmic: a straight fall is steady learning."
    specs: list[tuple[str, str, list[Series], dict[str, Any]]] = [
        ("Loss", falls, losses(run, x), {"log_y": True}),
        (
            "Loss by the clock",
            "The same, over the time that it took.",
            losses(run, "seconds"),
            {"log_y": True, "x_label": "time", "x_text": duration},
        ),
        (
            "Bits per byte",
            "On held-out text, against what needs no neural network.",
            [bits],
            {"rules": baselines, "from_zero": True},
        ),
        ("Learning rate", "What the schedule asked for.", [Series("lr", *run.column("lr", x))], {"from_zero": True}),
        ("Gradient norm", "Before clipping, logarithmic.", _both(run, "train/grad_norm", x), {"log_y": True}),
        ("Throughput", "Tokens per second.", _both(run, "train/tok_per_sec", x), {"from_zero": True}),
        (
            "Model FLOP utilisation",
            "Useful FLOP/s over the device's peak, in percent.",
            _both(run, "train/mfu", x, 100),
            {"from_zero": True},
        ),
    ]
    return [
        {
            "title": title,
            "note": note,
            "keys": [s for s in series if len(series) > 1 and s.label and len(s.xs)],
            "svg": line_chart(series, title=title, **{"x_label": x_label, **options}),
        }
        for title, note, series, options in specs
    ]


def losses(run: Run, x: str) -> list[Series]:
    xs, ys = run.column("train/loss", x)
    return [
        Series("train", xs, ys, "faint"),
        Series("train, smoothed", xs, smooth(ys, len(ys) // 30), "main"),
        Series("validation", *run.column("val/loss", x), "second", dots=True),
    ]


def _both(run: Run, name: str, against: str, scale: float = 1) -> list[Series]:
    xs, ys = run.column(name, against)
    ys = [y * scale for y in ys]
    return [
        Series("as logged", xs, ys, "faint"),
        Series("smoothed", xs, smooth(ys, len(ys) // 30), "main"),
    ]
