"""write_report: what the page says, computed here; how it looks is report.html beside this file."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from cs336.report.chart import Series, bar_chart, compact, line_chart, smooth
from cs336.report.run import Run, mapping, number, read_run
from cs336.utils.files import replacing

VISIBLE = {ord("\n"): "⏎", ord("\t"): "⇥", ord("\r"): "␍"}
# C0 controls, which HTML forbids, as their pictures; text keeps its newlines and tabs.
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "␡"}


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html, one self-contained page without scripts, and return its path.

    Reads config.toml, run.json, metrics.jsonl, samples.jsonl, generated.jsonl, evaluation.json, tokenizer_stats.json
    and stages.json, as many as are there; the page names the others.
    Raises FileNotFoundError or ValueError if run_dir is not a run directory.
    """
    run = read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        name=run.path.name,
        verdict=verdict(run),
        missing=run.missing,
        tiles=tiles(run),
        comparison=comparison(run),
        charts=charts(run),
        tokenizer=tokenizer(run),
        samples=samples(run),
        generated=[(str(row.get("prompt", "")), str(row.get("text", ""))) for row in run.generated],
        stages=stages(run),
        config=tables(run.config, _toml),
        facts=tables({"machine and versions": run.facts}, _value),
    )
    path = run.path / "report.html"
    with replacing(path) as file:
        file.write(html.translate(CONTROLS).encode("utf-8", "replace").decode())
    return path


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, note) of each headline number that the run has."""
    evaluation = run.evaluation
    val_loss = number(evaluation.get("loss")) or run.last("val/loss")
    bits = number(evaluation.get("bits_per_byte")) or run.last("val/bpb")
    rate, mfu = _median(run, "train/tok_per_sec"), _median(run, "train/mfu")
    found: list[tuple[str, float | None, Any, str]] = [
        ("Bits per byte", bits, lambda v: f"{v:.3f}", "on held-out text"),
        ("Validation loss", val_loss, lambda v: f"{v:.3f}", "nats per token"),
        ("Parameters", number(run.facts.get("parameters")), compact, ""),
        ("Tokens trained", run.last("tokens"), compact, _steps(run)),
        ("Training time", run.last("seconds"), duration, ""),
        ("Throughput", rate, compact, "tokens per second, median"),
        ("MFU", mfu, lambda v: f"{v:.1%}", "of the device's peak FLOP/s"),
    ]
    out = [(label, show(value), note) for label, value, show, note in found if value is not None]
    if device := run.facts.get("device"):
        out.append(("Device", str(device), ""))
    return out


def verdict(run: Run) -> str:
    """One sentence: what the training bought, against the best baseline."""
    bits, seconds, tokens = number(run.evaluation.get("bits_per_byte")), run.last("seconds"), run.last("tokens")
    spent = f"After {duration(seconds)} and {compact(tokens)} tokens" if seconds and tokens else "After training"
    baselines = [row for row in comparison(run) if not row["ours"]]
    if bits is None:
        return f"{spent}: not evaluated yet." if tokens else "Nothing has been trained yet."
    if not baselines:
        return f"{spent} the model needs {bits:.2f} bits for each byte of text it has never seen."
    beaten = [f"{1 - bits / row['bits']:.0%} fewer than {_named(row)}" for row in baselines if row["bits"] > bits][:1]
    ahead = [f"more than {_named(row)}" for row in baselines if row["bits"] <= bits][-1:]
    compared = " and ".join(beaten + ahead)
    return f"{spent} the model needs {bits:.2f} bits for each byte of text it has never seen: {compared}."


def _named(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['bits']:.2f})"


def _steps(run: Run) -> str:
    last = run.last("step")
    return f"{int(last):,} steps" if last is not None else ""


def _median(run: Run, name: str) -> float | None:
    values = [v for v in run.column(name)[1] if math.isfinite(v)]
    return statistics.median(values) if values else None


def comparison(run: Run) -> list[dict[str, Any]]:
    """Bits per byte of the model and of the baselines, best first, with each bar's width in percent."""
    rows: list[dict[str, Any]] = [
        {"name": str(b.get("name", "?")), "bits": bits, "how": str(b.get("how", "")), "ours": False}
        for b in map(mapping, run.evaluation.get("baselines") or [])
        if (bits := number(b.get("bits_per_byte"))) is not None
    ]
    ours = number(run.evaluation.get("bits_per_byte"))
    if ours is not None:
        rows.append({"name": "This model", "bits": ours, "how": str(run.evaluation.get("how", "")), "ours": True})
    rows.sort(key=lambda row: row["bits"])
    widest = max((row["bits"] for row in rows), default=1) or 1
    return [row | {"percent": round(100 * row["bits"] / widest, 1)} for row in rows]


def charts(run: Run) -> list[dict[str, Any]]:
    """Every chart's title, one sentence, legend and SVG; a chart without data has an empty SVG."""
    x, x_label = ("tokens", "tokens") if run.column("train/loss", "tokens")[0] else ("step", "steps")
    xs, losses = run.column("train/loss", x)
    reach = len(losses) // 30
    baselines = [(row["name"], row["bits"]) for row in comparison(run) if not row["ours"]]
    bits = Series("validation", *run.column("val/bpb", x), "second", dots=True)
    loss = [
        Series("train", xs, losses, "faint"),
        Series("train, smoothed", xs, smooth(losses, reach), "main"),
        Series("validation", *run.column("val/loss", x), "second", dots=True),
    ]
    specs: list[tuple[str, str, list[Series], dict[str, Any]]] = [
        ("Loss", "Nats per token, logarithmic: a straight fall is steady learning.", loss, {"log_y": True}),
        (
            "Bits per byte",
            "On held-out text, against what needs no neural network.",
            [bits],
            {"rules": baselines, "from_zero": True},
        ),
        ("Learning rate", "What the schedule asked for.", [Series("", *run.column("lr", x))], {"from_zero": True}),
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
            "svg": line_chart(series, title=title, x_label=x_label, **options),
        }
        for title, note, series, options in specs
    ]


def _both(run: Run, name: str, against: str, scale: float = 1) -> list[Series]:
    xs, ys = run.column(name, against)
    ys = [y * scale for y in ys]
    return [
        Series("as logged", xs, ys, "faint"),
        Series("smoothed", xs, smooth(ys, len(ys) // 30), "main"),
    ]


def tokenizer(run: Run) -> dict[str, Any]:
    stats = run.tokenizer
    histogram = {int(k): v for k, v in mapping(stats.get("length_histogram")).items() if str(k).isdigit()}
    lengths = range(1, min(max(histogram, default=0), 24) + 1)
    counts = [float(number(histogram.get(n)) or 0) for n in lengths]
    labels = [str(n) for n in lengths]
    if histogram and max(histogram) > 24:  # everything longer in the last bar
        counts[-1] += sum(number(v) or 0 for n, v in histogram.items() if n > 24)
        labels[-1] = "24+"
    return {
        "facts": [(k.replace("_", " "), _value(v)) for k, v in stats.items() if isinstance(v, str | int | float)],
        "longest": [str(t).translate(VISIBLE) for t in stats.get("longest_tokens") or []],
        "svg": bar_chart(labels, counts, title="Tokens by length in bytes", x_label="bytes in a token"),
    }


def samples(run: Run) -> list[dict[str, Any]]:
    """For each prompt its earliest and latest text, and all the steps between."""
    prompts: dict[str, list[tuple[int, str]]] = {}
    for sample in run.samples:
        step, prompt, text = number(sample.get("step")), str(sample.get("prompt", "")), str(sample.get("text", ""))
        if step is not None:
            prompts.setdefault(prompt, []).append((int(step), text.removeprefix(prompt)))
    return [
        {"prompt": prompt, "first": sorted(texts)[0], "last": sorted(texts)[-1], "between": sorted(texts)[1:-1]}
        for prompt, texts in prompts.items()
    ]


def stages(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "seconds": seconds, "what": str(mapping(stage).get("summary", ""))}
        for name, stage in run.stages.items()
        if (seconds := number(mapping(stage).get("seconds"))) is not None
    ]
    longest = max((row["seconds"] for row in rows), default=0) or 1
    return [
        row | {"time": duration(row["seconds"]), "percent": round(100 * row["seconds"] / longest, 1)} for row in rows
    ]


def tables(config: dict[str, Any], show: Callable[[Any], str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A nested mapping as (heading, rows), scalars of the top level first, one heading a section."""
    out: list[tuple[str, list[tuple[str, str]]]] = []

    def walk(prefix: str, values: dict[str, Any]) -> None:
        if rows := [(key, show(v)) for key, v in values.items() if not isinstance(v, dict)]:
            out.append((prefix, rows))
        for key, v in values.items():
            if isinstance(v, dict):
                walk(f"{prefix}.{key}" if prefix else key, v)

    walk("", config)
    return out


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_toml, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
