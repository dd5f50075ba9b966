"""A crawl as it is and the same crawl curated: bits a byte of held-out books, at equally many tokens.

    python -m benchmarks.end_to_end.bench_curation --html pages/ --books valid.jsonl --reference books.jsonl \\
        --sample c4.jsonl --out results.json

One small model a side and seed, all over the same number of tokens, by one tokenizer that is trained on the raw side.
raw        all the text of every page
main       the main content of every page
curated    recipes/common_crawl_warc.toml: main content, its filters and deduplication
like books of the curated pages the half that a classifier finds more like --reference; it learns that from --sample,
           another crawl, and has seen neither these pages nor the held-out books
Every side is rid of pages that share 13 words with the held-out books. The difference to raw is paired by seed, which
decides the weights at the start and the order of the text; its interval is Student's, at 95 %.
"""

import argparse
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import results
from cs336.data import Build, Classifier, Recipe, read_documents, read_meta, read_texts, tokenize_documents
from cs336.data.filter.classifier import ClassifierFilter
from cs336.data_demo import bits_learned
from cs336.tokenizer import Tokenizer
from cs336.utils.config import load, parse, to_table

RECIPE = results.ROOT / "recipes/common_crawl_warc.toml"
VOCAB = 2048
PIECE = 3000  # characters of a reference book, about a page of a crawl
# Student's two-sided 95 % points by degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2).
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SIDES = ("raw", "main", "curated", "like books")

Row = dict[str, Any]


def built(output: pathlib.Path, args: argparse.Namespace, side: str, steps: Sequence[Any] = ()) -> pathlib.Path:
    """Build a side, and return the directory of its shards."""
    shipped = to_table(load(Recipe, RECIPE))
    sources = [{"kind": kind, "paths": getattr(args, kind)} for kind in ("html", "warc") if getattr(args, kind)]
    clean = [{"kind": "decontaminate", "paths": [str(args.books)], "fields": ["text"]}]
    table: Row = {"output": str(output), "sources": sources, "steps": clean, "limits": shipped["limits"]}
    table["extract"] = {"mode": "full" if side == "raw" else "main"}
    if side in ("curated", "like books"):
        table |= {"steps": [*shipped["steps"], *map(to_table, steps), *clean], "dedup": shipped["dedup"]}
    given = {} if side == "raw" else {"tokenizer": str(output.parent / "raw/tokenizer.json")}
    table["tokenize"] = {"vocab_size": VOCAB, "val_fraction": 0.0} | given
    Build(parse(Recipe, table), workers=args.workers, console=Console(quiet=True)).run()
    return output / "tokens"


def pieces(paths: Sequence[pathlib.Path]) -> Iterator[str]:
    for text in read_texts(paths):
        yield from (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def like_books(work: pathlib.Path, args: argparse.Namespace) -> ClassifierFilter:
    """Keeps the half of the curated pages that is more like the reference."""
    sample = list(read_texts(args.sample))
    reference = list(pieces(args.reference))
    chosen = np.random.default_rng(0).permutation(len(reference))[: len(sample)]
    examples = [(reference[i], "books") for i in chosen] + [(text, "crawl") for text in sample]
    classifier = Classifier.train(examples)
    classifier.save(work / "books.safetensors")
    left = sorted(work.glob("curated/[0-9]-*/documents"), key=lambda path: path.parent.name)[-1]
    texts = [document.text for document in read_documents(left)]
    scores_N = classifier.probabilities(texts)[:, classifier.labels.index("books")]
    return ClassifierFilter(work / "books.safetensors", "books", min_score=float(np.median(scores_N)))


def trained(work: pathlib.Path, args: argparse.Namespace, side: str, shards: pathlib.Path, seed: int) -> float:
    """Bits a byte of the held-out books."""
    run_dir, tokenizer = work / "runs" / f"{side}-{seed}", Tokenizer.load(work / "raw/tokenizer.json")
    return bits_learned(run_dir, shards, work / "held_out", tokenizer, tokens=args.tokens, seed=seed, device="cpu")


def row_of(side: str, bits: Sequence[float], raw: Sequence[float], shards: pathlib.Path, tokens: int) -> Row:
    meta = read_meta(shards)
    gains = [theirs - ours for ours, theirs in zip(bits, raw, strict=True)]
    half = None
    if len(gains) > 1:
        half = round(STUDENT[len(gains) - 1] * statistics.stdev(gains) / math.sqrt(len(gains)), 4)
    return {
        "op": "curation",
        "side": side,
        "documents": meta.documents,
        "megabytes": round(meta.text_bytes / 1e6, 2),
        "tokens": tokens,
        "epochs": round(tokens / meta.tokens, 2),
        "bits_per_byte": [round(b, 4) for b in bits],
        "mean": round(statistics.mean(bits), 4),
        "gain": round(statistics.mean(gains), 4),
        "gain_half_width": half,
    }


def measure(work: pathlib.Path, args: argparse.Namespace) -> Iterator[Row]:
    sides = ["raw", *args.sides]
    shards: dict[str, pathlib.Path] = {}
    for side in sides:
        steps = [like_books(work, args)] if side == "like books" else []
        shards[side] = built(work / side.replace(" ", "-"), args, side, steps)
    tokenize_documents(read_texts(args.books), Tokenizer.load(work / "raw/tokenizer.json"), work / "held_out")
    raw: list[float] = []
    for side in sides:
        bits = [trained(work, args, side, shards[side], seed) for seed in range(args.seeds)]
        raw = raw or bits
        yield row_of(side, bits, raw, shards[side], args.tokens)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", nargs="*", default=[], help="pages of the crawl")
    parser.add_argument("--warc", nargs="*", default=[], help="archives of the crawl")
    parser.add_argument("--books", type=pathlib.Path, required=True, help="held-out books, JSON lines")
    parser.add_argument("--reference", type=pathlib.Path, nargs="*", default=[], help="other books, JSON lines")
    parser.add_argument("--sample", type=pathlib.Path, nargs="*", default=[], help="another crawl, JSON lines")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="that each model is trained on")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, len(STUDENT) + 1))
    parser.add_argument("--sides", nargs="*", default=SIDES[1:], choices=SIDES[1:], help="beside raw")
    parser.add_argument("--workers", type=int, default=None, help="processes of the builds")
    parser.add_argument("--work", type=pathlib.Path, help="directory to work in, and to go on in; one that goes if not")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file that gets the run `curation`")
    args = parser.parse_args(words)
    if "like books" in args.sides and not (args.reference and args.sample and "curated" in args.sides):
        parser.error("like books needs --reference, --sample and the side curated")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in measure(args.work or pathlib.Path(scratch), args):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        results.write(args.out, "curation", header(words), rows)


def header(words: Sequence[str]) -> Row:
    named = [pathlib.Path(word).name if os.sep in word else word for word in words]  # without this machine's paths
    return results.cpu_header(shlex.join(["python", "-m", "benchmarks.end_to_end.bench_curation", *named]))


if __name__ == "__main__":
    main()
