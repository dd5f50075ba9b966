"""Embeddings of texts by a language model: the mean of its last hidden states, for texts that mean the same.

semantic_duplicates(embed("runs/small/export", texts))

[[dedup]]
kind = "semantic"
model = "runs/small/export"
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cs336.data.dedup.semantic import check_semantic
from cs336.inference.load import checked_context, find_model, load_model, load_tokenizer, read_config
from cs336.models import Transformer
from cs336.utils.documents import Document

BATCH_TEXTS = 32  # that run together, padded to the longest


@dataclass(frozen=True)
class Semantic:
    """Drops documents whose embedding is like an earlier one's in their cluster (arXiv 2303.09540)."""

    model: pathlib.Path | None = None
    """An export, a checkpoint or a run directory, with its tokenizer: the mean of its last hidden states."""
    field: str | None = None
    """In place of a model, the metadata field that holds an embedding, a list of numbers."""
    threshold: float = 0.95
    """The cosine from which on two documents mean the same."""
    num_clusters: int | None = None
    """Only documents of a cluster are compared; None: one for a thousand documents."""
    keep: Literal["farthest", "nearest"] = "farthest"
    """Which of them stays, by its distance from the cluster's centre."""
    centre: bool = True
    """Take the mean of all embeddings off first, of a hundred or more: those of a causal model point one way."""
    max_tokens: int = 512
    """Of a document's beginning that are read, or the model's context where that is shorter."""
    device: str = "cpu"
    kind: Literal["semantic"] = "semantic"

    def __post_init__(self):
        check_semantic(self.threshold, self.num_clusters, self.keep)
        if (self.model is None) == (self.field is None):
            raise ValueError("embeddings come from a model or from a field of the documents: give one of the two")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")

    def check(self) -> None:
        if self.model is not None:
            checked_context(self.model, self.device)

    def embed(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        if self.model is None:
            assert self.field is not None
            return (_noted(document, self.field) for document in documents)
        texts = (document.text for document in documents)
        return _embedded(self.model, texts, self.max_tokens, self.device)


def embed(model: str | os.PathLike, texts: Iterable[str], max_tokens: int = 512, device: str = "auto") -> np.ndarray:
    """(N, D) float32: of each text the mean of what the model's head reads over its first `max_tokens` tokens.

    model: an export, a checkpoint or a run directory, with its tokenizer. A text without a token is a row of zeros.
    device: "auto" is a GPU if there is one. Raises FileNotFoundError where there is no model or tokenizer.
    """
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one str: give [text]")
    rows = list(_embedded(model, texts, max_tokens, device))
    return np.stack(rows) if rows else np.zeros((0, read_config(find_model(model)).d_model), np.float32)


def _embedded(path: str | os.PathLike, texts: Iterable[str], max_tokens: int, device: str) -> Iterator[np.ndarray]:
    found = find_model(path)
    model, tokenizer = load_model(found, device), load_tokenizer(found)
    most, left = min(max_tokens, model.config.context_length), iter(texts)
    while chunk := list(itertools.islice(left, BATCH_TEXTS)):
        yield from _means(model, [tokenizer.encode_ordinary(text)[:most] for text in chunk])


@torch.inference_mode()
def _means(model: Transformer, batch: list[list[int]]) -> np.ndarray:
    """(B, D). Rows are padded on the right, where no token before sees it."""
    longest = max(1, *map(len, batch))
    ids_BS = torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=model.device)
    counts_B = torch.tensor([len(ids) for ids in batch], device=model.device)
    read_BS = torch.arange(longest, device=model.device) < counts_B[:, None]
    features_BSD = model.features(ids_BS).float().where(read_BS[:, :, None], 0)
    return (features_BSD.sum(1) / counts_B.clamp(min=1)[:, None]).cpu().numpy()


def _noted(document: Document, field: str) -> np.ndarray:
    value: Any = document.metadata.get(field)
    numbers = value if isinstance(value, list) else []
    if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError(
            f"document {document.id} has no embedding in its field {field!r}: expected a list of finite numbers"
        )
    return np.array(numbers, np.float32)
