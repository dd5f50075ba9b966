"""The tokenizer beside every library that is installed: encoding, decoding, training; time, memory, and equal ids.

Each measurement is a fresh process (benchmarks/end_to_end/peers.py); rounds go over all tools in turn, so that all see
the same machine; the median round counts. Cold is the first pass of a process, warm the same text again.

    python -m benchmarks.end_to_end.bench_tokenizer --corpus english.txt code.txt cjk.txt --tokenizer gpt2.json
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from benchmarks import results
from benchmarks.end_to_end import peers
from cs336.data.stdlib import stdlib_documents
from cs336.tokenizer import PATTERNS, Tokenizer, convert

Row = dict[str, Any]
ADVERSARIES = ("a", " ", "7", "=-", "\u4e2d\u6587")  # repeated: one piece without end, to most patterns
WORKER_LIMIT = 900  # seconds


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", nargs="+", type=pathlib.Path, metavar="PATH", help="texts; the standard library")
    parser.add_argument("--megabytes", type=float, default=20, help="of each text, to encode (%(default)s)")
    parser.add_argument("--train", type=pathlib.Path, metavar="PATH", help="text to train on; all of the corpus")
    parser.add_argument("--vocab", nargs="*", type=int, default=[10_000, 32_000], help="sizes to train (%(default)s)")
    parser.add_argument(
        "--tokenizer", nargs="+", type=pathlib.Path, metavar="PATH", help="tokenizer.json; one trained on the corpus"
    )
    parser.add_argument("--tools", nargs="+", default=sorted(peers.CODERS | peers.TRAINERS), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The exit status: 1 if our own ids or text differ from those of all peers together, or our time is not linear."""
    options = parse(argv)
    if options.out:
        results.read(options.out)  # before the work, not after it
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, pathlib.Path(folder))
    if options.out:
        measured = {row["tool"] for row in rows if "skipped" not in row}
        results.write(options.out, "tokenizer", header(argv, measured), rows)
    return 1 if any(row.get("failed") for row in rows if row["tool"] == "cs336") else 0


def header(argv: list[str], tools: Iterable[str]) -> dict[str, Any]:
    words = [pathlib.Path(word).name if os.sep in word else word for word in argv]  # without this machine's paths
    command = shlex.join(["python", "-m", "benchmarks.end_to_end.bench_tokenizer", *words])
    return results.cpu_header(command, cores=len(os.sched_getaffinity(0)), peers=sorted(set(tools) - {"cs336"}))


def version(tool: str) -> str | None:
    return results.version(peers.DISTRIBUTIONS.get(tool, tool))


# ---- what is measured ----


def run(options: argparse.Namespace, folder: pathlib.Path) -> list[Row]:
    texts = [write_text(path, folder, options.megabytes) for path in options.corpus or [None]]
    training = str(options.train.resolve()) if options.train else join(texts, folder / "all.txt")
    here = [tool for tool in options.tools if importlib.util.find_spec(tool)]
    skipped = [
        {"op": "tokenizer", "tool": t, "skipped": f"No module named {t!r}"} for t in options.tools if t not in here
    ]
    coders, trainers = ([t for t in here if t in known] for known in (peers.CODERS, peers.TRAINERS))
    jobs: list[Row] = []
    for size in options.vocab:
        jobs += [{"job": "train", "text": training, "vocab_size": size, "threads": n} for n in options.threads]
    tokenizers = [convert.load(path) for path in options.tokenizer or ()] or [
        Tokenizer.train(training, max(options.vocab, default=32_000), num_threads=1)
    ]
    for number, tokenizer in enumerate(tokenizers):
        name = options.tokenizer[number].stem if options.tokenizer else "trained"
        path = write_tokenizer(tokenizer, folder / name)
        for text in texts:
            shared = {"tokenizer": path, "text": text}
            for threads in options.threads:
                outputs = ("numpy", "list", "shard")
                jobs += [{"job": "encode", "output": output, "threads": threads, **shared} for output in outputs]
            jobs.append({"job": "decode", "threads": 1, **shared})
        jobs += [{"job": "double", "tokenizer": path, "text": text, "threads": 1} for text in ADVERSARIES]
    rows = skipped
    for job in jobs:
        tools = {"train": trainers, "double": [t for t in coders if t == "cs336"]}.get(job["job"], coders)
        if job.get("output", "list") != "list":
            tools = [t for t in tools if t not in peers.LISTS_ALONE]
        rows += (found := check(measure(job, tools, options.rounds)))
        for row in found:
            print(line(row), flush=True)
    return rows


def write_text(path: pathlib.Path | None, folder: pathlib.Path, megabytes: float) -> str:
    """The front of a text as UTF-8, its special tokens as spaces; None for the standard library."""
    name = "stdlib" if path is None else path.stem
    data = "\n".join(stdlib_documents()).encode() if path is None else path.read_bytes()
    text = data[: int(megabytes * 1e6)].decode("utf-8", "ignore").replace("<|endoftext|>", " ")
    copy = folder / f"{name}.txt"
    copy.write_text(text, encoding="utf-8", newline="")
    return str(copy)


def join(texts: Iterable[str], path: pathlib.Path) -> str:
    path.write_bytes(b"\n".join(pathlib.Path(text).read_bytes() for text in texts))
    return str(path)


def write_tokenizer(tokenizer: Tokenizer, path: pathlib.Path) -> str:
    """Without special tokens, as JSON and as ranks, the pattern in the letters by which other libraries know it."""
    specials = set(tokenizer.special_tokens.values())
    vocab = {i: token for i, token in tokenizer.vocab.items() if i not in specials}
    ranks = tokenizer.merges if tokenizer.pattern == "gpt2" else None
    plain = Tokenizer(vocab, ranks, None, tokenizer.pattern)
    plain.save(path.with_suffix(".json"))
    convert.save(plain, path.with_suffix(".tiktoken"), "tiktoken")
    path.with_suffix(".pattern").write_text(tokenizer.pattern)
    document = json.loads(path.with_suffix(".json").read_text())
    for step in document["pre_tokenizer"].get("pretokenizers", []):
        if step.get("pattern", {}).get("Regex") == PATTERNS["cl100k"]:
            step["pattern"]["Regex"] = peers.CL100K
    path.with_suffix(".json").write_text(json.dumps(document, ensure_ascii=False))
    return str(path.with_suffix(".json"))


def measure(job: Row, tools: list[str], rounds: int) -> list[Row]:
    """One row a tool: medians of the rounds."""
    found: dict[str, list[Row]] = {tool: [] for tool in tools}
    for _ in range(rounds):
        for tool in tools:
            if not found[tool] or "failed" not in found[tool][-1]:
                found[tool].append(worker({"tool": tool, **job}))
    size = os.path.getsize(job["text"]) / 1e6 if job["job"] != "double" else None
    named = {key: pathlib.Path(value).stem if os.sep in str(value) else value for key, value in job.items()}
    rows = []
    for tool, runs in found.items():
        row = {"op": "tokenizer", "tool": tool, **named, "megabytes": size}
        last = runs[-1]
        if "failed" not in last:
            for key in ("cold", "warm"):
                if key in last:
                    row[f"{key}_cpu"] = round(statistics.median(r[key]["cpu"] for r in runs), 6)
                    row[f"{key}_wall"] = round(statistics.median(r[key]["wall"] for r in runs), 6)
                    row[f"{key}_mb_per_cpu_second"] = round(size / row[f"{key}_cpu"], 2)
            for key in ("peak_mb", "before_mb"):
                if key in last:
                    row[key] = round(statistics.median(r[key] for r in runs), 1)
            if "seconds" in last:
                row["seconds"] = [
                    round(statistics.median(s), 5) for s in zip(*(r["seconds"] for r in runs), strict=True)
                ]
        rows.append(row | {key: last[key] for key in ("ids", "tokens", "failed") if key in last})
    return rows


def worker(job: Row) -> Row:
    command = [sys.executable, "-m", "benchmarks.end_to_end.peers", json.dumps(job)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAYON_NUM_THREADS": str(job["threads"]),
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WORKER_LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {WORKER_LIMIT} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}


def check(rows: list[Row]) -> list[Row]:
    """Ids become "same" as ours, or "other", and times get their ratio to ours. Ours fail if no peer has their ids, or
    if time grows faster than the text."""
    ours = next((row for row in rows if row["tool"] == "cs336"), None)
    if ours is None or "failed" in ours:
        return rows
    others = [row for row in rows if row is not ours and "ids" in row]
    if others and all(row["ids"] != ours["ids"] for row in others):
        ours["failed"] = "the ids differ from those of every peer"
    if "seconds" in ours and ours["seconds"][-1] > 24 * max(ours["seconds"][0], 1e-3):
        ours["failed"] = f"8 times the text took {ours['seconds'][-1] / ours['seconds'][0]:.0f} times as long"
    for row in others:
        row["ids"] = "same" if row["ids"] == ours["ids"] else "other"
    for row in rows:
        for key in {"cold_cpu", "cold_wall", "warm_cpu", "warm_wall"} & row.keys() & ours.keys():
            row[f"{key}_to_ours"] = round(row[key] / ours[key], 3)
    ours.pop("ids", None)
    return rows


def line(row: Row) -> str:
    what = " ".join(str(row[k]) for k in ("job", "tokenizer", "text", "output", "vocab_size", "threads") if k in row)
    if "failed" in row:
        return f"{what:50} {row['tool']:11} FAILED {row['failed']}"
    if "seconds" in row:
        return f"{what!r:50} {row['tool']:11} {' '.join(f'{1e3 * s:.2f}' for s in row['seconds'])} ms"
    kind = "cpu" if row["threads"] == 1 else "wall"
    speeds = " / ".join(
        f"{row['megabytes'] / row[f'{k}_{kind}']:.1f}" for k in ("cold", "warm") if f"{k}_{kind}" in row
    )
    return f"{what:50} {row['tool']:11} {speeds} MB/s  peak {row['peak_mb']:.0f} MB  ids {row.get('ids', '')}"


def bench_tokenizer(benchmark, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{i}(x): return {i} + x  # the {i}th, naïve 中文\n" for i in range(2000)))
    options = [
        "--corpus",
        str(path),
        "--rounds",
        "1",
        "--vocab",
        "400",
        "--tools",
        "cs336",
        "tiktoken",
        "--threads",
        "1",
    ]
    assert benchmark.pedantic(main, (options,)) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
