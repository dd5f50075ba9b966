"""Bits per byte: how many bits a model needs for each byte of a text, whatever its tokens are.

    bits per byte = loss in nats per token * tokens / (ln 2 * bytes)

An arithmetic coder driven by the model would reach it (Shannon 1948), which makes a compressor a fair rival.
"""

import gzip
import lzma
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cs336 import ops
from cs336.data import TokenDataset
from cs336.data.dataset import to_device
from cs336.models import Transformer
from cs336.utils.files import Paths
from cs336.utils.shards import open_tokens

CHUNK = 1 << 20  # tokens counted at once


@dataclass(frozen=True)
class Baseline:
    name: str
    bits_per_byte: float
    how: str


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """loss: mean nats per token; tokens: of the text, end-of-text tokens included; num_bytes: of the text in UTF-8."""
    return loss * tokens / (math.log(2) * num_bytes)


@torch.no_grad()
def mean_loss(model: Transformer, data: TokenDataset, batch_size: int = 16, most_windows: int | None = None) -> float:
    """Nats per token over the whole windows of the data, each read without what is before it.

    most_windows: read no more of them than this, spread evenly.
    """
    training = model.training
    model.eval()
    count = min(len(data), len(data) if most_windows is None else most_windows)
    index_N = np.arange(count) * len(data) // count
    total = torch.zeros((), dtype=torch.float64)
    for index_B in np.split(index_N, range(batch_size, count, batch_size)):
        x_BT, y_BT = to_device(data.windows(index_B), model.device)
        total += ops.cross_entropy(model(x_BT), y_BT).double().cpu() * len(index_B)
    model.train(training)
    return total.item() / count


def baselines(
    train_text: Iterable[str], held_out_text: Iterable[str], train_tokens: Paths, held_out_tokens: Paths
) -> list[Baseline]:
    """Bits per byte of the held-out text by frequencies in the training text, and by gzip and xz at their best.

    The compressors get the held-out text alone, in one stream. They adapt to all that came before a byte, where a model
    sees its window; they know nothing of the training text, which the model has read.

    Args:
        train_text, held_out_text: documents.
        train_tokens, held_out_tokens: the same as token shards, each with its sidecar.

    Raises ValueError if there is no held-out text or no sidecar.
    """
    text = "".join(held_out_text).encode()
    train, held_out = _token_counts(train_tokens), _token_counts(held_out_tokens)
    if not text:
        raise ValueError("there is no held-out text to measure")
    bits = {
        "byte unigram": _unigram_bits(_byte_counts(train_text), _byte_counts([text.decode()])),
        "token unigram": _unigram_bits(train, held_out),
        "gzip -9": 8 * len(gzip.compress(text, 9)),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    how = {
        "byte unigram": "each byte by its frequency in the training text",
        "token unigram": "each token by its frequency in the training text",
    }
    return [Baseline(name, b / len(text), how.get(name, "the held-out text in one stream")) for name, b in bits.items()]


def _unigram_bits(train_V: np.ndarray, held_out_V: np.ndarray) -> float:
    """Bits of the held-out counts by the frequencies of the others, one added to each."""
    smoothed_V = train_V + 1.0
    return float(-(held_out_V * np.log2(smoothed_V / smoothed_V.sum())).sum())


def _byte_counts(documents: Iterable[str]) -> np.ndarray:
    return _counts((np.frombuffer(document.encode(), np.uint8) for document in documents), 256)


def _token_counts(paths: Paths) -> np.ndarray:
    shards, meta = open_tokens(paths)
    if meta is None:
        raise ValueError(f"{paths} has no meta.json, which gives the vocabulary: expected a directory of token shards")
    return _counts((part for shard in shards for part in _chunks(shard)), meta.vocab_size)


def _chunks(shard: np.ndarray) -> Iterator[np.ndarray]:
    return (shard[i : i + CHUNK] for i in range(0, len(shard), CHUNK))


def _counts(parts: Iterable[np.ndarray], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for part in parts:
        total += np.bincount(part, minlength=size)
    return total
