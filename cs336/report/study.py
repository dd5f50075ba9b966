"""write_study_report: a sweep on one page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cs336.report.chart import Series, compact, line_chart
from cs336.report.coordinates import Coordinate, parallel_chart
from cs336.report.page import Part, filled, write_page
from cs336.report.run import listing, mapping, number, read_run
from cs336.utils.duration import duration

CURVES = 6  # runs whose colours can be told apart
BEST_PART = 0.1  # of the lines stand out
MOST_ROWS = 60
MOST_MARKS = 8  # of an axis


def write_study_report(directory: str | Path) -> Path:
    """Write DIRECTORY/report.html, one self-contained page without scripts, and return its path.

    Reads study.json and the run directories. Raises ValueError if the directory holds no study.
    """
    path = Path(directory)
    found = read_summary(path, "study.json", "cs336 sweep")
    groups = [mapping(group) for group in listing(found.get("groups"))]
    done = [group for group in groups if finite(group.get("mean"))]
    metric = str(found.get("metric"))
    parts = [
        Part("parallel", "Every configuration", _parallel(found, done, metric), "picture"),
        Part("sensitivity", "What matters", {"stages": _sensitivities(found)}, "stages"),
        Part("curves", "The best, as they learned", {"charts": _curves(path, done, metric)}, "training"),
        Part("table", "Configurations", _table(groups, metric)),
        Part("best", "The best, as cs336 train takes it", _best(path, found), "text"),
    ]
    return write_page(
        path / "report.html",
        eyebrow="Sweep",
        name=path.resolve().name,
        verdict=_verdict(done, metric),
        tiles=_tiles(groups, found),
        parts=filled(parts),
    )


def read_summary(path: Path, name: str, made_by: str) -> dict[str, Any]:
    """A file of JSON that a verb has left in a directory. Raises ValueError if it is not there or torn."""
    try:
        return mapping(json.loads((path / name).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} holds no {name}: `{made_by}` writes it") from None
    except ValueError as error:
        raise ValueError(f"{path / name} cannot be read: {error}") from None


def finite(value: Any) -> bool:
    known = number(value)
    return known is not None and math.isfinite(known)


def label(options: Mapping[str, Any]) -> str:
    """Options in a few words: the end of each key, and its value."""
    return ", ".join(f"{end(key)} {value_text(value)}" for key, value in options.items()) or "as it is"


def end(key: str) -> str:
    """What a dotted key is about: lr of optimizer.lr, mlp of layers.0.mlp.kind."""
    return key.removesuffix(".kind").rpartition(".")[2]


def value_text(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["kind"]) if "kind" in value else " ".join(f"{k} {value_text(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _verdict(done: Sequence[Mapping[str, Any]], metric: str) -> str:
    if not done:
        return "No run is done."
    return f"Best: {label(mapping(done[0].get('options')))}, with a {metric} of {done[0]['mean']:.4f}."


def _tiles(groups: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    states = [state for group in groups for state in group.get("states", [])]
    total = {name: sum(number(group.get(name)) or 0.0 for group in groups) for name in ("seconds", "flops", "tokens")}
    failed, waiting = states.count("failed"), states.count("waiting")
    tiles = [
        ("Configurations", f"{len({json.dumps(g.get('options')) for g in groups})}", str(_search(found))),
        ("Runs", f"{states.count('done')}", f"done of {len(states)}"),
        ("Failed", str(failed) if failed else "", "kept with their errors"),
        ("Left", str(waiting) if waiting else "", "not trained: stopped, or beyond the budget"),
        ("Training", duration(total["seconds"]), f"budget {found['budget']}" if found.get("budget") else "of all runs"),
        ("FLOPs", f"{total['flops']:.2e}", ""),
        ("Tokens", compact(total["tokens"]), ""),
    ]
    return [tile for tile in tiles if tile[1]]


def _search(found: Mapping[str, Any]) -> str:
    search = mapping(found.get("search"))
    if search.get("kind") == "halving":
        return f"halving, {search.get('rungs')} rungs, 1 in {search.get('eta')} goes on"
    return str(search.get("kind", ""))


def _parallel(found: Mapping[str, Any], done: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The worst first, so that the best are drawn over them. Those of a rung are of one budget: the first."""
    shown = sorted((g for g in done if g.get("rung") == 0), key=lambda group: -group["mean"])
    axes = []
    for key, axis in mapping(found.get("axes")).items():
        values = [mapping(group.get("options")).get(key) for group in shown]
        axes.append(_coordinate(end(key), values, mapping(axis)))
    axes.append(Coordinate(metric, [group["mean"] for group in shown]))
    best = max(1, round(BEST_PART * len(shown)))
    styles = ["faint" if i < len(shown) - best else "second" for i in range(len(shown))]
    labels = [f"{label(mapping(g.get('options')))}: {g['mean']:.4f}" for g in shown]
    rungs = " after the first rung" if (number(found.get("rungs")) or 0) > 1 else ""
    note = f"A line a configuration{rungs}, mean over seeds; the best {best} stand{'s' * (best == 1)} out."
    return {"note": note, "svg": parallel_chart(axes, labels, styles, "Every configuration")}


def _coordinate(title: str, values: Sequence[Any], axis: Mapping[str, Any]) -> Coordinate:
    listed = axis.get("values", [])
    numbers = [v for v in listed if isinstance(v, int | float) and not isinstance(v, bool)]
    if "low" in axis:
        return Coordinate(title, values, log=bool(axis.get("log")))
    if listed and len(numbers) == len(listed):
        log = min(numbers) > 0 and max(numbers) >= 4 * min(numbers)
        return Coordinate(title, values, log=log, marks=sorted(numbers) if len(numbers) <= MOST_MARKS else ())
    return Coordinate(title, [value_text(v) for v in values], names=list(dict.fromkeys(map(value_text, listed))))


def _sensitivities(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for entry in map(mapping, listing(found.get("sensitivities"))):
        what = f"lowest at {value_text(entry.get('best'))}; means differ by up to {entry.get('spread', 0):.4f}"
        percent = round(100 * (number(entry.get("share")) or 0.0), 1)
        rows.append({"name": entry.get("key"), "what": what, "percent": percent, "time": f"{percent:.0f} %"})
    return rows


def _curves(path: Path, done: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Of the first seed of each of the best; a configuration once, at its highest rung."""
    once: dict[str, Mapping[str, Any]] = {}
    for group in done:
        once.setdefault(json.dumps(group.get("options")), group)
    best = list(once.values())[:CURVES]
    named = [(label(mapping(group.get("options"))), str(group["folders"][0])) for group in best]
    return curves(path, named, metric, "Logarithmic, the first seed of each.")


def curves(path: Path, runs: Sequence[tuple[str, str]], metric: str, note: str) -> list[dict[str, Any]]:
    """Charts of the loss, and of a validation metric, of runs by name and folder; one that cannot be read is left
    out."""
    series: dict[str, list[Series]] = {"train/loss": [], metric if metric.startswith("val/") else "train/loss": []}
    for i, (name, folder) in enumerate(runs):
        try:
            run = read_run(path / "runs" / folder)
        except (FileNotFoundError, ValueError):
            continue
        for column, lines in series.items():
            lines.append(Series(name, *run.column(column, "tokens"), f"run{i % CURVES}", dots=column != "train/loss"))
    return [
        {
            "title": column,
            "note": note,
            "keys": lines,
            "svg": line_chart(lines, title=column, x_label="tokens", log_y=True),
        }
        for column, lines in series.items()
        if lines
    ]


def _table(groups: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    rungs = any(group.get("rung") for group in groups)
    seeds = any(len(group.get("states", [])) > 1 for group in groups)
    rows = []
    for group in groups[:MOST_ROWS]:
        scores = [s for s in map(number, group.get("scores", [])) if s is not None]
        spread = f"{max(scores) - min(scores):.4f}" if len(scores) > 1 else ""
        states = group.get("states", [])
        told = "; ".join(group.get("errors", [])) or ", ".join(s for s in dict.fromkeys(states) if s != "done")
        mean = f"{group['mean']:.4f}" if scores else "–"
        taken = duration(number(group.get("seconds")) or 0.0)
        row = [label(mapping(group.get("options"))), *([str(group.get("rung"))] if rungs else []), mean]
        rows.append([*row, *([spread] if seeds else []), f"{len(scores)}/{len(states)}", taken, told[:120]])
    heads = ["", *(["rung"] if rungs else []), metric, *(["between seeds"] if seeds else []), "done", "training", ""]
    more = f"The first {MOST_ROWS} of {len(groups)}." if len(groups) > MOST_ROWS else ""
    return {"heads": heads, "rows": rows, "note": more} if rows else {"note": ""}


def _best(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"note": f"{path / 'best.toml'}: cs336 train --config {path / 'best.toml'}", "text": found.get("best") or ""}
