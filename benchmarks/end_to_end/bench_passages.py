"""Repeated passages: MB of text a CPU second of one core, beside a suffix array with its common prefixes.

    python -m benchmarks.end_to_end.bench_passages TEXTS.jsonl --out cpu.json

One {"text"} a line; a text of one letter and one of a period as long as it are added. The peer is pydivsufsort, where
it is installed: its array and prefixes alone, of which passages would be read. Times are of this process, the best of
three.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.end_to_end.bench_dedup import seconds
from cs336 import _text

LENGTH, MOST_MEMORY = 200, 1 << 40


def suffixes(corpus: np.ndarray) -> None:
    from pydivsufsort import divsufsort, kasai

    kasai(corpus, divsufsort(corpus))


def measure(name: str, corpus: np.ndarray, ends: np.ndarray) -> list[dict[str, Any]]:
    tables = {"one table": MOST_MEMORY, "an eighth of the memory": 10 * len(corpus) // 8}
    contenders: dict[str, Callable[[], object]] = {
        f"cs336, {how}": functools.partial(_text.repeats, corpus, ends, LENGTH, most, 1) for how, most in tables.items()
    }
    contenders["pydivsufsort, suffix array and prefixes"] = lambda: suffixes(corpus)
    rows = []
    for tool, work in contenders.items():
        row = {"op": "passages", "text": name, "megabytes": round(len(corpus) / 1e6, 1), "tool": tool}
        try:
            rows.append(row | {"seconds": seconds(work)})
        except ImportError as error:
            rows.append(row | {"skipped": str(error)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    texts = [json.loads(line)["text"].encode() for line in args.texts.open(encoding="utf-8")]
    corpus = np.frombuffer(bytearray(b"".join(texts)), np.uint8)  # which may be written to, as the peer asks
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    period = np.random.default_rng(0).integers(97, 123, 1000)
    rows = [
        *measure(args.texts.stem, corpus, ends),
        *measure("one letter", np.full(len(corpus), 97, np.uint8), ends),
        *measure("a period of 1,000", np.resize(period, len(corpus)).astype(np.uint8), ends),
    ]
    command = f"python -m benchmarks.end_to_end.bench_passages {args.texts.name} --out {args.out.name}"
    results.write(args.out, "passages", results.cpu_header(command, peers=("pydivsufsort",)), rows)


if __name__ == "__main__":
    main()
