"""A linear classifier over hashed n-grams of words and characters: quality, toxicity, language, any label.

    model = Classifier.train([("a fine essay", "good"), ("buy now!!!", "bad"), ...])
    labels, scores = model.predict(["some text"])
    model.save("quality.safetensors")

Training and prediction are native (csrc/cpu/text/classifier.*). No model of others is shipped: train your own.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cs336 import _text
from cs336.data.filter.model_file import load_model, save_model
from cs336.data.step import Apply, Removed
from cs336.utils.documents import Document, read_texts
from cs336.utils.files import Paths
from cs336.utils.threads import thread_count

FORMAT = "cs336 classifier 1"
BLOCK = _text.Classifier.BLOCK  # weights that share a scale once they are int8
BATCH_CHARS = 1 << 24
MAX_WEIGHTS = 1 << 31

Examples = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Features:
    """Which n-grams a text is told by, and in how many buckets they are hashed."""

    word_ngrams: int = 1
    """1: words; 2: pairs of neighbours too; and so on. More than 1 pays with many examples alone."""
    char_ngrams: tuple[int, int] | None = None
    """(least, most) n of the character n-grams in a word. They help where spelling varies, at a third of the speed."""
    bucket_bits: int = 20
    """2^bucket_bits rows of a weight a label, 4 bytes each."""

    def __post_init__(self):
        low, high = self.char_ngrams or (1, 1)
        if not (1 <= self.word_ngrams <= 8 and 1 <= low <= high <= 16 and 8 <= self.bucket_bits <= 28):
            raise ValueError(
                "expected word_ngrams in 1..8, char_ngrams None or (least, most) in 1..16, bucket_bits in 8..28, got "
                f"{self.word_ngrams}, {self.char_ngrams}, {self.bucket_bits}"
            )

    def native(self) -> _text.FeatureSpec:
        low, high = self.char_ngrams or (0, 0)
        return _text.FeatureSpec(self.word_ngrams, low, high, self.bucket_bits)


@dataclass(frozen=True)
class Evaluation:
    """How well labels are told. Arrays are in the order of the model's labels."""

    labels: tuple[str, ...]
    confusion: np.ndarray = field(repr=False)
    """(K, K) counts: rows are the true labels, columns those predicted."""
    auc: np.ndarray
    """(K,) the chance that a text of the label scores above one of the others; NaN where there is none of either."""

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def precision(self) -> np.ndarray:
        return np.diag(self.confusion) / np.maximum(1, self.confusion.sum(0))

    @property
    def recall(self) -> np.ndarray:
        return np.diag(self.confusion) / np.maximum(1, self.confusion.sum(1))


class Classifier:
    """Labels of texts, with their probabilities. Made by `train` and `load`."""

    def __init__(self, labels: Sequence[str], features: Features, bias: np.ndarray, weights: np.ndarray, scales=None):
        """bias (K,) float32; weights (2^bucket_bits, K) float32, or int8 with scales (weights / BLOCK,) float32.

        Raises ValueError where they do not fit together.
        """
        wanted = {"bias": (bias, np.float32), "weights": (weights, np.float32 if scales is None else np.int8)}
        wanted |= {} if scales is None else {"scales": (scales, np.float32)}
        for name, (array, dtype) in wanted.items():
            if array.dtype != dtype or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite {np.dtype(dtype)}, got {array.dtype}")
        if not len(set(labels)) == len(labels) == len(bias) >= 2:
            raise ValueError(f"expected two different labels or more and a bias for each, got {labels} and {len(bias)}")
        self.labels, self.features = tuple(labels), features
        self.bias, self.weights, self.scales = bias, weights, scales
        arrays = (bias, weights.reshape(-1)) if scales is None else (bias, weights.reshape(-1), scales)
        self._native = _text.Classifier(features.native(), *arrays)

    @classmethod
    def train(
        cls,
        examples: Examples | Mapping[str, Paths],
        *,
        features: Features | None = None,
        epochs: int = 5,
        learning_rate: float = 2.0,
        seed: int = 0,
        num_threads: int | None = 1,
    ) -> "Classifier":
        """Learn from pairs of text and label, or from the documents of the files of each label.

        epochs: passes over all of them, each in a new order. The step shrinks from learning_rate to 0 on the way.
        num_threads: with 1 the result is the same each time. More write to the same weights without waiting for each
            other (Hogwild): faster, and a little different each time. None: as many as this process may run on.

        Memory: 4 bytes for each n-gram of the texts, not the texts. Raises ValueError for fewer than two labels.
        """
        features = features or Features()
        if epochs < 1 or not 0 < learning_rate < float("inf"):
            raise ValueError(f"expected epochs >= 1 and a finite learning_rate > 0, got {epochs}, {learning_rate}")
        if isinstance(examples, Mapping):
            examples = ((text, label) for label, files in examples.items() for text in read_texts(files))
        threads = thread_count(num_threads)
        trainer = _text.ClassifierTrainer(features.native())
        ids: dict[str, int] = {}
        for texts, labels in _batches(examples):
            trainer.add(texts, np.array([ids.setdefault(label, len(ids)) for label in labels], np.uint32), threads)
        if len(ids) < 2:
            raise ValueError(f"a classifier needs examples of two labels or more, got {list(ids)}")
        if len(ids) << features.bucket_bits > MAX_WEIGHTS:
            raise ValueError(f"{len(ids)} labels in 2^{features.bucket_bits} buckets are too many weights")
        trainer.fit(len(ids), epochs, learning_rate, seed, threads)
        weights, bias = trainer.weights().reshape(-1, len(ids)), trainer.bias()
        if not np.isfinite(weights).all():
            raise ValueError(f"training diverged: give a smaller learning_rate than {learning_rate}")
        order = [ids[label] for label in sorted(ids)]
        return cls(sorted(ids), features, bias[order], np.ascontiguousarray(weights[:, order]))

    def probabilities(self, texts: Sequence[str], num_threads: int | None = 1) -> np.ndarray:
        """(N, K) float32, in the order of `labels`; the same for any number of threads."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got one str: give [text]")
        return self._native.predict(list(texts), thread_count(num_threads))

    def predict(self, texts: Sequence[str], num_threads: int | None = 1) -> tuple[list[str], np.ndarray]:
        """The most probable label of each text, and its probability, (N,) float32."""
        scores_NK = self.probabilities(texts, num_threads)
        best_N = scores_NK.argmax(1)
        return [self.labels[k] for k in best_N], scores_NK[np.arange(len(best_N)), best_N]

    def evaluate(self, examples: Examples, num_threads: int | None = 1) -> Evaluation:
        """Raises ValueError for a label that the model does not know."""
        index = {label: k for k, label in enumerate(self.labels)}
        true, scores = [], [np.empty((0, len(self.labels)), np.float32)]
        for texts, labels in _batches(examples):
            if unknown := set(labels) - index.keys():
                raise ValueError(f"the model has no label {min(unknown)!r}, only {', '.join(self.labels)}")
            true += [index[label] for label in labels]
            scores.append(self.probabilities(texts, num_threads))
        true_N, scores_NK = np.array(true, np.int64), np.concatenate(scores)
        K = len(self.labels)
        confusion = np.bincount(true_N * K + scores_NK.argmax(1), minlength=K * K).reshape(K, K)
        auc = np.array([_auc(scores_NK[:, k], true_N == k) for k in range(K)])
        return Evaluation(self.labels, confusion, auc)

    def quantize(self) -> "Classifier":
        """The same with int8 weights, BLOCK of them to a float32 scale: 3.6 times smaller."""
        if self.scales is not None:
            return self
        blocks = self.weights.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(1) / 127
        int8s = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        return Classifier(self.labels, self.features, self.bias, int8s.reshape(self.weights.shape), scales)

    def save(self, path: str | os.PathLike) -> None:
        """One safetensors file, whole or absent, with a checksum."""
        tensors = {"bias": self.bias, "weights": self.weights}
        if self.scales is not None:
            tensors["scales"] = self.scales
        save_model(path, FORMAT, {"labels": self.labels, "features": asdict(self.features)}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Classifier":
        """Raises ValueError, naming the file, for one that is damaged or no classifier."""
        facts, tensors = load_model(path, FORMAT)
        try:
            return cls(facts["labels"], _features(facts["features"]), **tensors)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is no classifier: {error}") from None


@dataclass(frozen=True)
class ClassifierFilter:
    """Keeps a document whose probability of `label` is within bounds, and may note it for later steps."""

    model: pathlib.Path
    """What `Classifier.save` or `cs336 data classifier train` wrote."""
    label: str
    min_score: float = 0.0
    max_score: float = 1.0
    field: str | None = None
    """The metadata field that gets the probability, for quality buckets."""
    kind: Literal["classifier"] = "classifier"

    def __post_init__(self):
        if not 0 <= self.min_score <= self.max_score <= 1:
            raise ValueError(f"expected 0 <= min_score <= max_score <= 1, got {self.min_score}, {self.max_score}")
        if (self.min_score, self.max_score, self.field) == (0, 1, None):
            raise ValueError("this classifier changes nothing: give min_score, max_score or field")

    def build(self) -> Apply:
        model = Classifier.load(self.model)
        if self.label not in model.labels:
            raise ValueError(f"{self.model} has no label {self.label!r}, only {', '.join(model.labels)}")
        place = model.labels.index(self.label)

        def apply(document: Document) -> Document | Removed:
            score = float(model.probabilities([document.text])[0, place])
            if not self.min_score <= score <= self.max_score:
                side = "not" if score < self.min_score else "is"
                return Removed(f"{side} {self.label}", f"score {score:.3f}")
            if self.field is None:
                return document
            return replace(document, metadata=document.metadata | {self.field: score})

        return apply


def _batches(examples: Examples) -> Iterator[tuple[list[str], list[str]]]:
    texts, labels, waiting = [], [], 0
    for example in examples:
        if isinstance(example, str) or len(example) != 2:
            raise TypeError(f"an example is a pair of text and label, got {example!r:.200}")
        text, label = example
        texts.append(text)
        labels.append(label)
        waiting += len(text) + 64
        if waiting >= BATCH_CHARS:
            yield texts, labels
            texts, labels, waiting = [], [], 0
    if texts:
        yield texts, labels


def _auc(scores_N: np.ndarray, is_true_N: np.ndarray) -> float:
    """By ranks; equal scores share the mean of theirs."""
    positives, negatives = int(is_true_N.sum()), int((~is_true_N).sum())
    if not positives or not negatives:
        return float("nan")
    _, place_N, count_U = np.unique(scores_N, return_inverse=True, return_counts=True)
    rank_U = np.cumsum(count_U) - (count_U - 1) / 2
    return float((rank_U[place_N][is_true_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _features(table: dict[str, Any]) -> Features:
    pair = table["char_ngrams"]
    return Features(**(table | {"char_ngrams": pair and tuple(pair)}))
