"""The linear classifier and fastText: accuracy over folds, and speed, on one thread.

    python -m benchmarks.end_to_end.bench_classifier toxicity=tweets.jsonl quality=pages.jsonl --out results.json

A {"text", "label"} a line. fastText is used where it is installed (pip install fasttext-wheel) and gets texts that are
in lower case and split into words as ours are, which is not counted; it has no splitter of its own. Both
make five passes. Times are of this process alone.
"""

import argparse
import json
import pathlib
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import results
from cs336.data.filter.classifier import Classifier, Evaluation, Features, _auc

Pairs = list[tuple[str, str]]
Tool = Callable[[Pairs, Pairs], tuple[float, float, np.ndarray, int]]  # -> seconds, seconds, (N, K) scores, bytes
WORD = re.compile(r"\w+|[^\w\s]+")


def cs336(features: Features, lr: float = 2.0, quantize: bool = False) -> Tool:
    def run(train: Pairs, test: Pairs):
        texts = [text for text, _ in test]
        start = time.process_time()
        model = Classifier.train(train, features=features, learning_rate=lr)
        trained = time.process_time()
        if quantize:
            model = model.quantize()
        begun = time.process_time()
        scores_NK = model.probabilities(texts)
        done = time.process_time()
        size = sum(a.nbytes for a in (model.weights, model.bias, model.scales) if a is not None)
        return trained - start, done - begun, scores_NK, size

    return run


def fasttext(dim: int, lr: float, epoch: int, **options: Any) -> Tool:
    import fasttext  # of fasttext-wheel

    def line(text: str) -> str:
        return " ".join(WORD.findall(text.lower()))

    def run(train: Pairs, test: Pairs):
        labels = sorted({label for _, label in train})
        names = {f"__label__{k}": k for k in range(len(labels))}
        texts = [line(text) for text, _ in test]
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.writelines(f"__label__{labels.index(label)} {line(text)}\n" for text, label in train)
            file.flush()
            start = time.process_time()
            model = fasttext.train_supervised(file.name, dim=dim, lr=lr, epoch=epoch, thread=1, verbose=0, **options)
        trained = time.process_time()
        # Not model.predict, which fails with numpy 2.
        found = [model.f.predict(f"{text}\n", len(labels), 0.0, "strict") for text in texts]
        done = time.process_time()
        scores_NK = np.zeros((len(texts), len(labels)))
        for row, pairs in zip(scores_NK, found, strict=True):
            for score, name in pairs:
                row[names[name]] = score
        size = sum(matrix.nbytes for matrix in (model.get_input_matrix(), model.get_output_matrix()))
        return trained - start, done - trained, scores_NK, size

    return run


def tools() -> Iterator[tuple[str, Tool]]:
    for lr in (1.0, 2.0, 3.0):
        yield f"cs336, pairs of words, lr {lr}", cs336(Features(word_ngrams=2), lr)
        yield f"cs336, words, lr {lr}", cs336(Features(), lr)
    yield "cs336, words, int8, lr 2.0", cs336(Features(), quantize=True)
    yield "cs336, words and 3- to 5-grams of characters, lr 2.0", cs336(Features(1, (3, 5)))
    try:
        import fasttext as _  # noqa: F401 (whether there is one)
    except ImportError:
        print("fastText is not installed: pip install fasttext-wheel")
        return
    pairs = {"wordNgrams": 2, "bucket": 1 << 20}
    for lr in (0.1, 0.5, 1.0):
        yield f"fastText, pairs of words, dim 10, lr {lr}", fasttext(10, lr, 5, **pairs)
        yield f"fastText, words, dim 10, lr {lr}", fasttext(10, lr, 5)
    yield "fastText, pairs of words, dim 100, lr 0.5", fasttext(100, 0.5, 5, **pairs)
    yield "fastText, words and 3- to 5-grams of characters, dim 10, lr 0.5", fasttext(10, 0.5, 5, minn=3, maxn=5)


def measure(pairs: Pairs, tool: Tool, folds: int) -> dict[str, Any]:
    """Every text is tested once, by a model that has not seen it."""
    labels = sorted({label for _, label in pairs})
    train_s = predict_s = size = 0.0
    parts, true = [], []
    for fold in range(folds):
        test = pairs[fold::folds]
        train = [pair for i, pair in enumerate(pairs) if i % folds != fold]
        seconds, seconds_more, scores_NK, size = tool(train, test)
        train_s, predict_s = train_s + seconds, predict_s + seconds_more
        parts.append(scores_NK)
        true += [labels.index(label) for _, label in test]
    scores_NK, true_N, K = np.concatenate(parts), np.array(true), len(labels)
    confusion = np.bincount(true_N * K + scores_NK.argmax(1), minlength=K * K).reshape(K, K)
    found = Evaluation(tuple(labels), confusion, np.array([_auc(scores_NK[:, k], true_N == k) for k in range(K)]))
    both = found.precision + found.recall
    megabytes = sum(len(text.encode()) for text, _ in pairs) / 1e6
    return {
        "accuracy": round(found.accuracy, 4),
        "macro_f1": round(float(np.mean(2 * found.precision * found.recall / np.maximum(both, 1e-9))), 4),
        "auc": round(float(np.mean(found.auc)), 4),
        "recall": {label: round(float(r), 4) for label, r in zip(labels, found.recall, strict=True)},
        "train_mb_per_s": round(megabytes * (folds - 1) / train_s, 2),
        "predict_mb_per_s": round(megabytes / predict_s, 1),
        "model_mb": round(size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="NAME=FILE.jsonl")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="results file that gets the run `classifier`")
    args = parser.parse_args()
    rows = []
    print("| task | by | accuracy | F1 | AUC | training MB/s | predicting MB/s | model MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, path in (task.split("=", 1) for task in args.tasks):
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        pairs = [(row["text"], str(row["label"])) for row in map(json.loads, lines)]
        random.Random(0).shuffle(pairs)
        for title, tool in tools():
            row = measure(pairs, tool, args.folds)
            rows.append({"op": "classifier", "task": name, "texts": len(pairs), "tool": title} | row)
            numbers = ("accuracy", "macro_f1", "auc", "train_mb_per_s", "predict_mb_per_s", "model_mb")
            print(f"| {name} | {title} | {' | '.join(str(row[key]) for key in numbers)} |", flush=True)
    if args.out:
        command = f"python -m benchmarks.end_to_end.bench_classifier {' '.join(args.tasks)} --folds {args.folds}"
        results.write(args.out, "classifier", results.cpu_header(command, peers=["fasttext-wheel"]), rows)


if __name__ == "__main__":
    main()
