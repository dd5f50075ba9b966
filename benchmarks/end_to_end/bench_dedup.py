"""Deduplication and quality rules: megabytes a second and ratios to what else is installed.

    python benchmarks/end_to_end/bench_dedup.py TEXTS.jsonl

One {"text"} a line. Peers are used where they are installed: pip install datasketch rensa. One thread, time of this
process alone.
"""

import argparse
import collections
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Literal

from cs336 import _text
from cs336.data import c4_quality, dedup_lines, fineweb_quality, gopher_quality, gopher_repetition, minhash

HASHES, NGRAM, REPEATS = 128, 5, 3


def seconds(work: Callable[[], object]) -> float:
    """The best of three."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def shingles(text: str) -> list[bytes]:
    words = text.lower().split()
    return [" ".join(words[i : i + NGRAM]).encode() for i in range(max(1, len(words) - NGRAM + 1))]


def datasketch(texts: list[str]) -> None:
    from datasketch import MinHash

    for text in texts:
        MinHash(num_perm=HASHES).update_batch(shingles(text))


def rensa(texts: list[str]) -> None:
    from rensa import RMinHash

    for text in texts:
        RMinHash(num_perm=HASHES, seed=0).update([s.decode() for s in shingles(text)])


def set_of_hashes(path: pathlib.Path) -> None:
    seen = set()
    for line in path.open("rb"):
        seen.add(hash(line))


def set_files_to_files(path: pathlib.Path, out: pathlib.Path) -> None:
    """The same work as dedup_lines(keep="first")."""
    seen = set()
    with path.open("rb") as lines, out.open("wb") as kept:
        for line in lines:
            if (key := hash(line)) not in seen:
                seen.add(key)
                kept.write(line)


def counts_files_to_files(path: pathlib.Path, out: pathlib.Path) -> None:
    """The same work as dedup_lines(keep="none")."""
    with path.open("rb") as lines:
        seen = collections.Counter(map(hash, lines))
    with path.open("rb") as lines, out.open("wb") as kept:
        kept.writelines(line for line in lines if seen[hash(line)] == 1)


def count_lines(path: pathlib.Path) -> None:
    _text.LineDedup(0, 1, 1).count(path.read_bytes())


def report(title: str, megabytes: float, contenders: dict[str, Callable[[], object]]) -> None:
    first = None
    for name, work in contenders.items():
        try:
            time_s = seconds(work)
        except ImportError as error:
            print(f"| {title} | {name} | not installed: {error} | |")
            continue
        first = first or time_s
        print(f"| {title} | {name} | {megabytes / time_s:.1f} | {time_s / first:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=pathlib.Path)
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in args.texts.open(encoding="utf-8")]
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    print("| what | by | MB/s | time, ours = 1 |\n| --- | --- | ---: | ---: |")
    report(
        f"MinHash of raw text, {HASHES} hashes of {NGRAM}-grams",
        megabytes,
        {
            "cs336": lambda: minhash(texts, HASHES, NGRAM),
            "rensa": lambda: rensa(texts),
            "datasketch": lambda: datasketch(texts),
        },
    )
    for rule in (gopher_quality, gopher_repetition, fineweb_quality, c4_quality):
        report(rule.__name__, megabytes, {"cs336": lambda rule=rule: [rule(t) for t in texts]})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "lines.txt")
        # Lines of 40 bytes or so, as in text from the web.
        lines = [text[i : i + 40].replace("\n", " ") for text in texts for i in range(0, len(text), 40)]
        path.write_text("\n".join(lines * 4))
        megabytes, kept = path.stat().st_size / 1e6, pathlib.Path(folder, "kept.txt")

        def ours(keep: Literal["none", "first"]) -> None:
            dedup_lines(path, pathlib.Path(folder, "out"), keep, num_threads=1)

        peer = {"Python set of hashes, nothing written": lambda: set_of_hashes(path)}
        report("lines counted", megabytes, {"cs336": lambda: count_lines(path)} | peer)
        report(
            "lines, the first copy kept",
            megabytes,
            {"cs336": lambda: ours("first"), "Python set of hashes": lambda: set_files_to_files(path, kept)} | peer,
        )
        report(
            "lines, no copy kept",
            megabytes,
            {"cs336": lambda: ours("none"), "Python Counter of hashes": lambda: counts_files_to_files(path, kept)}
            | peer,
        )


if __name__ == "__main__":
    main()
