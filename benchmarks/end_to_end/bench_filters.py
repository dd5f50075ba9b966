"""Lists, decontamination, perplexity, mixing and packing: speed on one thread, beside plain Python.

    python benchmarks/end_to_end/bench_filters.py TEXTS.jsonl --words WORDS --evaluation EVALUATION.jsonl

TEXTS: one {"text"} a line. WORDS: a phrase a line. Times are of this process alone.
"""

import argparse
import json
import pathlib
import re
import time
from collections.abc import Callable

import numpy as np

from cs336 import _text
from cs336.data.decontaminate import Decontaminator
from cs336.data.filter.lists import PhraseMatcher
from cs336.data.filter.perplexity import NgramModel
from cs336.data.mix import times

NGRAM = 13


def seconds(work: Callable[[], object]) -> float:
    """The best of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def python_ngrams(texts: list[str], known: set[tuple[str, ...]]) -> None:
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        any(tuple(words[i : i + NGRAM]) in known for i in range(len(words) - NGRAM + 1))


def python_words(texts: list[str], phrases: list[str]) -> None:
    pattern = re.compile(r"(?:\W|^)({})(?:\W|$)".format("|".join(map(re.escape, phrases))))
    for text in texts:
        pattern.findall(text.lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=pathlib.Path)
    parser.add_argument("--words", type=pathlib.Path, required=True)
    parser.add_argument("--evaluation", type=pathlib.Path, required=True)
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in args.texts.open(encoding="utf-8")]
    phrases = args.words.read_text(encoding="utf-8").split("\n")
    megabytes = sum(len(t.encode()) for t in texts) / 1e6

    matcher, index = PhraseMatcher(phrases), Decontaminator(args.evaluation, NGRAM)
    rows = {
        f"phrases ({len(matcher.phrases)})": (
            lambda: [matcher.find(t) for t in texts],
            lambda: python_words(texts, matcher.phrases),
        ),
        f"13-grams of {index.items} evaluation items": (
            lambda: [index.find(t) for t in texts],
            lambda: python_ngrams(texts, {("x",) * NGRAM}),
        ),
    }
    model = NgramModel.train(texts)
    print(f"{megabytes:.1f} MB; the 3-gram model has {len(model):,} n-grams")
    print("| what | MB/s | plain Python MB/s |\n| --- | ---: | ---: |")
    for name, (ours, plain) in rows.items():
        print(f"| {name} | {megabytes / seconds(ours):.1f} | {megabytes / seconds(plain):.2f} |", flush=True)
    print(f"| 3-gram model: counting | {megabytes / seconds(lambda: NgramModel.train(texts)):.1f} | |")
    print(f"| 3-gram model: perplexity | {megabytes / seconds(lambda: model.perplexity(texts)):.1f} | |")
    print(f"| mixing: choice of documents | {megabytes / seconds(lambda: [times(t, 1.5) for t in texts]):.1f} | |")
    lengths = np.random.default_rng(0).geometric(1 / 600, 2_000_000).clip(1, 4096).astype(np.uint32)
    packing = seconds(lambda: _text.best_fit(lengths, 4096))
    _, ends = _text.best_fit(lengths, 4096)
    full = lengths.sum() / (len(ends) * 4096)
    print(f"\nbest-fit packing: {len(lengths) / packing / 1e6:.1f} M documents a second, windows {full:.3%} full")


if __name__ == "__main__":
    main()
