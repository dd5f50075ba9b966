"""write_build_report: what became of the documents of a build of data, on one page."""

import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from cs336.report.chart import bar_chart, compact
from cs336.report.page import Part, filled, write_page
from cs336.report.run import listing, mapping, number
from cs336.utils.duration import duration

MOST_RULES, MOST_LISTED, MOST_LANGUAGES = 12, 60, 12
SAMPLE_CHARS = 700
KEPT_SAMPLES = 12


def write_build_report(directory: str | pathlib.Path) -> pathlib.Path:
    """Write DIRECTORY/report.html, one self-contained page without scripts, and return its path.

    Reads build.json, stages.json, the samples of what was kept and removed, and, where they are there, planted.json
    (how deduplication did on duplicates that are known) and models.json (models trained on raw and on curated text).
    Raises ValueError if the directory holds no finished build.
    """
    path = pathlib.Path(directory)
    if not (path / "build.json").is_file():
        raise ValueError(f"{path} holds no finished build: run `cs336 data build` on its recipe first")
    found = _read(path / "build.json")
    stages = _read(path / "stages.json")
    parts = [
        Part("build-waterfall", "What became of the records", {"rows": _waterfall(found)}),
        Part("build-removed", "Removed, by rule", {"rows": _rules(found)}),
        Part("build-samples", "Kept and removed, side by side", {"pairs": _pairs(path, found)}),
        Part("build-repeats", "Cut out, for it was there before", _repeats(found)),
        Part("build-histograms", "Languages and lengths", {"charts": _charts(found)}),
        Part("build-planted", "Planted, and found", {"rows": _planted(path)}),
        Part("build-models", "A model on raw text, and one on curated text", {"models": _models(path)}),
        Part("build-unread", "Not read", _unread(path, found)),
        Part("stages", "Where the time went", {"stages": _times(stages)}),
    ]
    return write_page(
        path / "report.html",
        eyebrow="Data report",
        name=path.resolve().name,
        verdict=_verdict(found),
        tiles=_tiles(path, found, stages),
        parts=filled(parts),
    )


def _verdict(found: Mapping[str, Any]) -> str:
    records, documents = _count(found, "records"), _count(found, "documents")
    removed = sum(n for stage in _stages(found) for n, _ in _removed(stage).values())
    share = f"{documents / records:.0%}" if records else "none"
    return f"Of {records:,} records {documents:,} documents are left ({share}); {removed:,} were removed by a rule."


def _tiles(path: pathlib.Path, found: Mapping[str, Any], stages: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    seconds = sum(number(mapping(stage).get("seconds")) or 0.0 for stage in stages.values())
    tokens = [mapping(_read(meta)).get("tokens", 0) for meta in sorted(path.glob("tokens/**/meta.json"))]
    tiles = [
        ("Documents", f"{_count(found, 'documents'):,}", f"of {_count(found, 'records'):,} records"),
        ("Text", _size(_count(found, "bytes")), f"of {_size(_count(found, 'record_bytes'))} of pages and files"),
        ("Tokens", compact(sum(tokens)), "training and held-out"),
        ("Lines dropped", compact(_count(found, "lines_dropped")), f"of {compact(_count(found, 'lines'))}"),
        (
            "Paragraphs dropped",
            compact(_count(found, "paragraphs_dropped")),
            f"of {compact(_count(found, 'paragraphs'))}",
        ),
        ("Masked", compact(_count(found, "masked")), "pieces of personal data"),
        ("Time", duration(seconds), ""),
    ]
    return [tile for tile in tiles if tile[1] not in ("0", "")]


def _waterfall(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage: what came to it, with what left there."""
    stages = _stages(found)
    most = max([_count(stage, "documents") for stage in stages], default=0) or 1
    # Records are pages with their markup: their bytes are not on the scale of text.
    most_bytes = max([_count(stage, "bytes") for stage in stages[1:]] + [_count(found, "bytes")], default=0) or 1
    rows = []
    ends = [*stages[1:], {"documents": found.get("documents"), "bytes": found.get("bytes")}]
    for stage, after in zip(stages, ends, strict=True):
        left, size = _count(after, "documents"), _count(after, "bytes")
        rows.append(
            {
                "name": str(stage.get("name")),
                "removed": _count(stage, "documents") - left,
                "left": f"{left:,}",
                "percent": round(100 * left / most, 1),
                "gone": round(100 * (_count(stage, "documents") - left) / most, 1),
                "size": _size(size),
                "size_percent": round(100 * size / most_bytes, 1),
            }
        )
    return rows


def _rules(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for stage in _stages(found):
        came = _count(stage, "documents") or 1
        ordered = sorted(_removed(stage).items(), key=lambda item: -item[1][0])
        for i, (reason, (documents, size)) in enumerate(ordered):
            rows.append(
                {
                    "stage": str(stage.get("name")) if i == 0 else "",
                    "reason": reason,
                    "documents": f"{documents:,}",
                    "share": f"{documents / came:.1%}",
                    "size": _size(size),
                }
            )
    return rows


def _pairs(path: pathlib.Path, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A document that a rule removed beside one that is left, for the rules that removed most."""
    counts = {
        (str(stage.get("name")), reason): documents
        for stage in _stages(found)
        for reason, (documents, _) in _removed(stage).items()
    }
    wanted = sorted(counts, key=lambda rule: -counts[rule])
    samples: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _rows(_files(path, found, "removed")):
        rule = (str(row.get("stage")), str(row.get("reason")))
        if row.get("text") and rule not in samples:
            samples[rule] = row
    shown = [rule for rule in wanted if rule in samples][:MOST_RULES]
    last = {"folders": found.get("folders", [])[-1:]}
    kept = list(itertools.islice(_rows(_files(path, last, "documents")), KEPT_SAMPLES))
    return [
        {
            "stage": rule[0],
            "reason": rule[1],
            "detail": str(samples[rule].get("detail") or ""),
            "removed": _sample(samples[rule]),
            "kept": _sample(kept[i % len(kept)]) if kept else None,
        }
        for i, rule in enumerate(shown)
    ]


def _repeats(found: Mapping[str, Any]) -> dict[str, Any]:
    repeats = mapping(found.get("repeats"))
    if not _count(repeats, "passages"):
        return {}
    said = (
        f"{_count(repeats, 'passages'):,} passages, with the documents that were dropped for them "
        f"{_size(_count(repeats, 'cut_bytes'))} of {_size(_count(repeats, 'text_bytes'))}"
    )
    return {"said": said, "examples": [_sample(mapping(row)) for row in listing(repeats.get("examples"))]}


def _sample(row: Mapping[str, Any]) -> dict[str, str]:
    text = str(row.get("text") or "")
    return {"id": str(row.get("id")), "text": text[:SAMPLE_CHARS] + ("…" if len(text) > SAMPLE_CHARS else "")}


def _charts(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    languages = sorted(mapping(found.get("languages")).items(), key=lambda item: -item[1])[:MOST_LANGUAGES]
    lengths = [mapping(found.get(name)) for name in ("lengths_in", "lengths_out")]
    powers = [int(power) for table in lengths for power in table if power.isdigit()]
    steps = [1 << p for p in range(min(powers).bit_length() - 1, max(powers).bit_length())] if powers else []
    charts = [
        (
            "Languages",
            "Documents that came to the step that names languages.",
            bar_chart([name for name, _ in languages], [n for _, n in languages], title="Languages", x_label=""),
        )
    ]
    for title, table in zip(("Lengths before the steps", "Lengths of what is left"), lengths, strict=True):
        bars = bar_chart(
            [f"{step:,}" for step in steps],
            [table.get(str(step), 0) for step in steps],
            title=title,
            x_label="characters or more",
        )
        charts.append((title, "Documents by the power of two that their characters reach.", bars))
    return [{"title": title, "note": note, "svg": svg} for title, note, svg in charts if svg]


def _planted(path: pathlib.Path) -> list[dict[str, Any]]:
    if not (path / "planted.json").is_file():
        return []
    table = mapping(_read(path / "planted.json"))
    return [
        {"kind": kind, **{name: str(value) for name, value in mapping(row).items()}}
        for kind, row in mapping(table.get("kinds")).items()
    ]


def _models(path: pathlib.Path) -> dict[str, Any]:
    return mapping(_read(path / "models.json")) if (path / "models.json").is_file() else {}


def _unread(path: pathlib.Path, found: Mapping[str, Any]) -> dict[str, Any]:
    counts = sorted(mapping(found.get("unread")).items(), key=lambda item: -item[1])
    files = sorted(path.glob("*/unread/*.jsonl"))
    listed = list(itertools.islice(_rows(files), MOST_LISTED + 1))
    return {
        "counts": [(reason, f"{n:,}") for reason, n in counts],
        "listed": [{name: str(row.get(name) or "") for name in ("id", "reason", "detail")} for row in listed][
            :MOST_LISTED
        ],
        "more": len(listed) > MOST_LISTED,
    }


def _times(stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "seconds": seconds, "what": str(mapping(stage).get("summary", ""))}
        for name, stage in stages.items()
        if (seconds := number(mapping(stage).get("seconds"))) is not None
    ]
    longest = max((row["seconds"] for row in rows), default=0) or 1
    return [
        row | {"time": duration(row["seconds"]), "percent": round(100 * row["seconds"] / longest, 1)} for row in rows
    ]


def _stages(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [mapping(stage) for stage in listing(found.get("stages"))]


def _removed(stage: Mapping[str, Any]) -> dict[str, list[int]]:
    return mapping(stage.get("removed"))


def _count(table: Mapping[str, Any], name: str) -> int:
    return int(number(table.get(name)) or 0)


def _size(size: float) -> str:
    """Bytes as people read them."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size:.0f} B"


def _files(path: pathlib.Path, found: Mapping[str, Any], kind: str) -> list[pathlib.Path]:
    """Of this build's stages: the directory may hold those of an earlier recipe too."""
    return [file for folder in found.get("folders", []) for file in sorted((path / folder / kind).glob("*.jsonl"))]


def _rows(files: list[pathlib.Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                yield mapping(json.loads(line))


def _read(path: pathlib.Path) -> dict[str, Any]:
    return mapping(json.loads(path.read_text(encoding="utf-8")))
