"""Perplexity under an n-gram model of reference text: what reads unlike it is high, what repeats itself is low.

    model = NgramModel.train(reference_texts, order=3)
    model.perplexity(["some text"])          # (1,) float64
    model.save("reference.safetensors")

Interpolated Kneser-Ney over words or characters of the normalized text (lower case, no accents, no punctuation),
native (csrc/cpu/text/ngram_model.*). One model a language.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cs336 import _text
from cs336.data.filter.model_file import load_model, save_model
from cs336.data.step import Apply, Removed
from cs336.utils.batching import batches
from cs336.utils.documents import Document
from cs336.utils.threads import thread_count

FORMAT = "cs336 n-gram model 1"
BATCH_CHARS = 1 << 24
MOST_ORDER = 8

Unit = Literal["word", "char"]


class NgramModel:
    """Probabilities of texts. Made by `train` and `load`. It takes 48 to 96 bytes for each n-gram of 1..order units."""

    def __init__(self, order: int, unit: Unit):
        if not 1 <= order <= MOST_ORDER or unit not in ("word", "char"):
            raise ValueError(f'expected an order in 1..{MOST_ORDER} and "word" or "char", got {order}, {unit!r}')
        self.order, self.unit = order, unit
        self._native = _text.NgramModel(order, unit == "word")

    @classmethod
    def train(cls, texts: Iterable[str], order: int = 3, unit: Unit = "word") -> "NgramModel":
        """Count the n-grams of texts. Raises ValueError if there is none."""
        if isinstance(texts, str):
            raise TypeError("expected texts, got one str: give [text]")
        model = cls(order, unit)
        for batch in batches(texts, BATCH_CHARS):
            model._native.add(batch)
        if not len(model._native):
            raise ValueError("there is no text to count n-grams of")
        return model

    def __len__(self) -> int:
        """Distinct n-grams of all orders."""
        return len(self._native)

    def log_probability(self, texts: Sequence[str], num_threads: int | None = 1) -> tuple[np.ndarray, np.ndarray]:
        """(N,) natural logarithms, and (N,) how many units each text has, the mark of its end included."""
        if isinstance(texts, str):
            raise TypeError("expected a list of texts, got one str: give [text]")
        return self._native.score(list(texts), thread_count(num_threads))

    def perplexity(self, texts: Sequence[str], num_threads: int | None = 1) -> np.ndarray:
        """(N,) the inverse of the geometric mean of the probabilities of the units of each text."""
        log_N, units_N = self.log_probability(texts, num_threads)
        return np.exp(-log_N / units_N)

    def save(self, path: str | os.PathLike) -> None:
        """One safetensors file, whole or absent, with a checksum."""
        keys, counts, few = self._native.state()
        facts = {"order": self.order, "unit": self.unit}
        save_model(path, FORMAT, facts, {"keys": keys, "counts": counts, "few": few})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "NgramModel":
        """Raises ValueError, naming the file, for one that is damaged or no n-gram model."""
        facts, tensors = load_model(path, FORMAT)
        try:
            model = cls(facts["order"], facts["unit"])
            model._native.restore(tensors["keys"], tensors["counts"], tensors["few"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no n-gram model: {error}") from None
        return model


@dataclass(frozen=True)
class Perplexity:
    """Keeps documents whose perplexity is within bounds, and may note it for later steps."""

    model: pathlib.Path
    """What `NgramModel.save` wrote."""
    least: float | None = None
    most: float | None = None
    field: str | None = None
    """The metadata field that gets the perplexity, for quality buckets."""
    kind: Literal["perplexity"] = "perplexity"

    def __post_init__(self):
        if self.least is self.most is self.field is None:
            raise ValueError("this perplexity filter changes nothing: give least, most or field")
        if self.least is not None and self.most is not None and not self.least <= self.most:
            raise ValueError(f"expected least <= most, got {self.least}, {self.most}")

    def build(self) -> Apply:
        model = NgramModel.load(self.model)

        def apply(document: Document) -> Document | Removed:
            perplexity = float(model.perplexity([document.text])[0])
            if self.least is not None and perplexity < self.least:
                return Removed("perplexity too low", f"{perplexity:.0f}")
            if self.most is not None and perplexity > self.most:
                return Removed("perplexity too high", f"{perplexity:.0f}")
            if self.field is None:
                return document
            return replace(document, metadata=document.metadata | {self.field: perplexity})

        return apply
