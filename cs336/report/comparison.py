"""write_comparison: several runs on one page, their curves over each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs336.report.chart import Series, line_chart, smooth
from cs336.report.headline import banner, tiles
from cs336.report.page import Part, write_page
from cs336.report.run import Run, mapping, read_run
from cs336.utils.duration import duration

MOST = 6  # runs whose colours can be told apart


def write_comparison(run_dirs: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page that compares runs, best first, and return its path.

    Raises FileNotFoundError or ValueError for what is not a run directory, and for more runs than have colours.
    """
    if not 1 < len(run_dirs) <= MOST:
        raise ValueError(f"a comparison takes 2 to {MOST} runs, got {len(run_dirs)}")
    runs = sorted(map(read_run, run_dirs), key=_bits)
    names = _names(runs)
    parts = [
        Part("runs", "Side by side", {"columns": _table(runs, names), "changed": _changed(runs, names)}),
        Part("training", "Curves", {"charts": _charts(runs, names)}),
    ]
    return write_page(
        Path(path),
        eyebrow="Comparison",
        name=f"{len(runs)} runs",
        verdict=_verdict(runs, names),
        parts=parts,
    )


def _verdict(runs: Sequence[Run], names: Sequence[str]) -> str:
    if runs[0].bits_per_byte is None:
        return ""
    if len({_text(run) for run in runs if run.bits_per_byte is not None}) > 1:
        return "Their bits per byte are of different texts, which says nothing of which model is better."
    return f"{names[0]} needs the fewest bits for each byte: {runs[0].bits_per_byte:.3f}."


def _text(run: Run) -> tuple[str, str]:
    """What the run was measured on."""
    named = str(run.evaluation.get("text") or "")
    return named, "" if named else str(mapping(run.facts.get("data")).get("val"))


def _bits(run: Run) -> float:
    return float("inf") if run.bits_per_byte is None else run.bits_per_byte


def _names(runs: Sequence[Run]) -> list[str]:
    """Each directory's name, with its parent's where two are the same."""
    short = [run.path.name for run in runs]
    return [n if short.count(n) == 1 else f"{run.path.parent.name}/{n}" for n, run in zip(short, runs, strict=True)]


def _charts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    by_tokens = all(run.column("train/loss", "tokens")[0] for run in runs)
    x, label = ("tokens", "tokens") if by_tokens else ("step", "steps")
    log = {"log_y": True}
    clock = {"x_label": "time", "x_text": duration}
    specs: list[tuple[str, str, str, str, dict[str, Any]]] = [
        ("Training loss", "Nats per token, smoothed, logarithmic.", "train/loss", x, log),
        ("Training loss by the clock", "The same, over the time that it took.", "train/loss", "seconds", log | clock),
        ("Validation loss", "Nats per token: runs with another tokenizer differ in their unit.", "val/loss", x, log),
        ("Bits per byte", "On each run's held-out text.", "val/bpb", x, {}),
        ("Bits per byte by the clock", "The same, over the time that it took.", "val/bpb", "seconds", clock),
    ]
    return [
        {
            "title": title,
            "note": note,
            "keys": (series := _series(runs, names, column, against)),
            "svg": line_chart(series, title=title, **{"x_label": label, **options}),
        }
        for title, note, column, against, options in specs
    ]


def _series(runs: Sequence[Run], names: Sequence[str], column: str, against: str) -> list[Series]:
    found = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        xs, ys = run.column(column, against)
        train = column.startswith("train/")
        found.append(Series(name, xs, smooth(ys, len(ys) // 30) if train else ys, f"run{i}", dots=not train))
    return found


def _table(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """A row a run: how it stands, and the numbers of its report's top."""
    numbers = [{label: value for label, value, _ in tiles(run)} for run in runs]
    heads = list(dict.fromkeys(label for found in numbers for label in found))
    rows = [
        [name, banner(run)["head"], *(found.get(head, "–") for head in heads)]
        for name, run, found in zip(names, runs, numbers, strict=True)
    ]
    return {"heads": ["", "", *heads], "rows": rows}


def _changed(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """The keys of the configuration in which the runs differ."""
    flat = [dict(_flat(run.config, "")) for run in runs]
    keys = [k for k in dict.fromkeys(k for f in flat for k in f) if len({str(f.get(k)) for f in flat}) > 1]
    rows = [[key, *(str(f.get(key, "–")) for f in flat)] for key in keys if key != "run_dir"]
    return {"heads": ["", *names], "rows": rows}


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    """Dotted name and value of all that is in tables, and in lists of tables, which count from 1."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        items = list(enumerate(value, 1))
    else:
        return [(name, value)]
    return [pair for key, inner in items for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
