"""From a crawl to filtered documents: pages a CPU second, ours beside datatrove, the same WARC and the same rules.

Extraction, Gopher's rules of repetition and of quality, FineWeb's rules, masks for e-mail and IP addresses, JSON lines.
A measurement is a fresh process on one core; imports are not counted, the processes that a tool starts are; rounds take
the tools in turn, and the median counts. Peers where they are installed: pip install 'datatrove[io]' 'trafilatura<1.12'
spacy warcio.

    python -m benchmarks.end_to_end.bench_data PAGES_DIR --pages 100
"""

import argparse
import json
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

Row = dict[str, Any]


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def cs336(archive: pathlib.Path, out: pathlib.Path) -> Row:
    from cs336.data.build.unit import Line, Work
    from cs336.data.recipe import Recipe
    from cs336.utils.config import parse

    steps = [{"kind": kind} for kind in ("gopher_repetition", "gopher_quality", "fineweb")]
    steps.append({"kind": "mask_pii", "what": ["emails", "ip_addresses"]})
    source = {"kind": "warc", "paths": [str(archive)]}
    recipe = parse(Recipe, {"output": str(out), "sources": [source], "steps": steps})
    line = Line(recipe)
    (unit,) = recipe.sources[0].units()
    start = cpu_seconds()
    counts = line.run(Work(0, 0, unit, str(out), "key"), lambda number: None)
    return {"cpu": cpu_seconds() - start, "kept": counts.documents, "pages": counts.records}


def datatrove(archive: pathlib.Path, out: pathlib.Path) -> Row:
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import WarcReader
    from datatrove.pipeline.writers import JsonlWriter

    reader = WarcReader(str(archive.parent), glob_pattern=archive.name)
    steps = [
        reader,
        Trafilatura(favour_precision=True, timeout=60),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        FineWebQualityFilter(),
        PIIFormatter(),
        JsonlWriter(str(out), compression=None),
    ]
    data: Any = None
    start = cpu_seconds()
    for step in steps:
        data = step.run(data, 0, 1)
    kept = sum(1 for _ in data)
    return {"cpu": cpu_seconds() - start, "kept": kept, "pages": reader.stats["documents"].total}


TOOLS = {"cs336": cs336, "datatrove": datatrove}


def write_archive(pages: list[pathlib.Path], path: pathlib.Path) -> float:
    """Returns the megabytes of the pages."""
    from cs336.data.sources import WarcWriter

    with path.open("wb") as file:
        writer = WarcWriter(file)
        for page in pages:
            writer.page(f"http://pages.example/{page.name}", page.read_bytes(), date="2025-01-01T00:00:00Z")
    return sum(page.stat().st_size for page in pages) / 1e6


def measure(tool: str, archive: pathlib.Path) -> Row:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.end_to_end.bench_data", "--one", tool, str(archive), out]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(pages: list[pathlib.Path], rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder, "pages.warc.gz")
        megabytes = write_archive(pages, archive)
        found: dict[str, list[Row]] = {tool: [] for tool in TOOLS}
        for _ in range(rounds):
            for tool, rows in found.items():
                if not any("skipped" in row for row in rows):
                    rows.append(measure(tool, archive))
    table: list[Row] = []
    for tool, rows in found.items():
        row: Row = {"op": "data", "tool": tool, "job": "crawl to documents", "megabytes": round(megabytes, 1)}
        if "skipped" in rows[-1]:
            table.append(row | {"skipped": rows[-1]["skipped"]})
            continue
        cpu = statistics.median(r["cpu"] for r in rows)
        row |= {"pages": len(pages), "kept": rows[0]["kept"], "cpu": round(cpu, 3), "rounds": rounds}
        to_ours = cpu / table[0]["cpu"] if table else 1.0
        table.append(row | {"pages_per_cpu_second": round(len(pages) / cpu, 2), "to_ours": round(to_ours, 2)})
    return table


def header(argv: list[str]) -> dict[str, Any]:
    from benchmarks import results

    words = [pathlib.Path(word).name if os.sep in word else word for word in argv]  # without this machine's paths
    command = shlex.join(["python", "-m", "benchmarks.end_to_end.bench_data", *words])
    peers = ("datatrove", "trafilatura", "spacy")
    return results.cpu_header(command, cores=len(os.sched_getaffinity(0)), peers=peers)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--one"]:
        _, tool, archive, out = argv
        print(json.dumps(TOOLS[tool](pathlib.Path(archive), pathlib.Path(out))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="of pages, .html")
    parser.add_argument("--pages", type=int, default=100, help="spread evenly over the directory (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    found = sorted(options.directory.rglob("*.html"))
    if not found:
        parser.error(f"{options.directory} holds no .html")
    start = time.monotonic()
    rows = run(found[:: max(1, len(found) // options.pages)][: options.pages], options.rounds)
    print("| tool | pages kept | pages a CPU second | CPU time, ours = 1 |\n| --- | ---: | ---: | ---: |")
    for row in rows:
        if "skipped" in row:
            print(f"| {row['tool']} | not run: {row['skipped']} | | |")
        else:
            kept = f"{row['kept']} of {row['pages']}"
            print(f"| {row['tool']} | {kept} | {row['pages_per_cpu_second']} | {row['to_ours']} |")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if options.out:
        from benchmarks import results

        results.write(options.out, "data", header(argv), rows)


if __name__ == "__main__":
    main(sys.argv[1:])
