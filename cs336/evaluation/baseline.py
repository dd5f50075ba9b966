"""Bits per byte of a text without a neural network: by frequencies in the training text, and by compressors."""

import gzip
import itertools
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cs336.utils.files import Paths
from cs336.utils.shards import open_tokens

CHUNK = 1 << 20  # tokens counted at once
MOST_COUNTED = 100_000_000  # tokens of the training text: more hardly change a frequency
MOST_COMPRESSED = 32_000_000  # bytes: 15 s of xz


@dataclass(frozen=True)
class Baseline:
    name: str
    bits_per_byte: float
    how: str


def baselines(
    train_text: Iterable[str] | None,
    held_out_text: Iterable[str],
    train_tokens: Paths | None,
    held_out_tokens: Paths,
) -> list[Baseline]:
    """Bits per byte of the held-out text by frequencies in the training text, and by gzip and xz at their best.

    The compressors get the held-out text alone, in one stream, the first 32 MB of a longer one. They adapt to all that
    came before a byte, where a model sees its window; they know nothing of the training text, which the model has read.

    Args:
        train_text, held_out_text: documents.
        train_tokens, held_out_tokens: the same as token shards, each with its sidecar.
        A training text or tokens of None: without the baseline that needs it.

    Raises ValueError if there is no held-out text or no sidecar.
    """
    text = "".join(held_out_text).encode()
    if not text:
        raise ValueError("there is no held-out text to measure")
    bits: dict[str, float] = {}
    if train_text is not None:
        bits["byte unigram"] = _unigram_bits(_byte_counts(train_text), _counts([np.frombuffer(text, np.uint8)], 256))
    if train_tokens is not None:
        bits["token unigram"] = _unigram_bits(_token_counts(train_tokens, MOST_COUNTED), _token_counts(held_out_tokens))
    head = text[:MOST_COMPRESSED]
    scale = len(text) / len(head)
    bits["gzip -9"] = 8 * len(gzip.compress(head, 9)) * scale
    bits["xz -9e"] = 8 * len(lzma.compress(head, preset=9 | lzma.PRESET_EXTREME)) * scale
    how = {
        "byte unigram": "each byte by its frequency in the training text",
        "token unigram": "each token by its frequency in the training text",
    }
    stream = "the text in one stream" + (f", its first {len(head) / 1e6:.0f} MB" if scale > 1 else "")
    return [Baseline(name, b / len(text), how.get(name, stream)) for name, b in bits.items()]


def _unigram_bits(train_V: np.ndarray, held_out_V: np.ndarray) -> float:
    """Bits of the held-out counts by the frequencies of the others, one added to each."""
    smoothed_V = train_V + 1.0
    return float(-(held_out_V * np.log2(smoothed_V / smoothed_V.sum())).sum())


def _byte_counts(documents: Iterable[str]) -> np.ndarray:
    return _counts((np.frombuffer(document.encode(), np.uint8) for document in documents), 256)


def _token_counts(paths: Paths, most: int | None = None) -> np.ndarray:
    shards, meta = open_tokens(paths)
    if meta is None:
        raise ValueError(f"{paths} has no meta.json, which gives the vocabulary: expected a directory of token shards")
    chunks = (part for shard in shards for part in _chunks(shard))
    return _counts(itertools.islice(chunks, None if most is None else -(-most // CHUNK)), meta.vocab_size)


def _chunks(shard: np.ndarray) -> Iterator[np.ndarray]:
    return (shard[i : i + CHUNK] for i in range(0, len(shard), CHUNK))


def _counts(parts: Iterable[np.ndarray], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for part in parts:
        total += np.bincount(part, minlength=size)
    return total
