"""Token shards in another order: shuffled by document, or packed so that windows hold whole documents.

    pack_shards("tokens/train", "tokens/packed", context_length=2048)
    shuffle_shards("tokens/train", "tokens/shuffled", seed=1)

Both read shards with their sidecar and write the same; the tokenizer travels along. Equal seeds give equal bytes.
"""

import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cs336 import _text
from cs336.data.tokenize import tokenizer_of
from cs336.utils.files import Paths, path_list
from cs336.utils.shards import SHARD_TOKENS, ShardWriter, TokenMeta, open_tokens

BLOCK_TOKENS = 1 << 22
SCAN_TOKENS = 1 << 24
MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class PackReport:
    """What packing made."""

    documents: int
    cut: int
    """Documents longer than a window: they are cut into whole windows and a rest."""
    windows: int
    tokens: int
    """Padding included."""
    padding: int
    """End-of-text tokens that fill windows up."""


def pack_shards(
    shards: Paths, out_dir: str | os.PathLike, context_length: int, *, seed: int = 0, shard_tokens: int = SHARD_TOKENS
) -> PackReport:
    """Put documents into windows of `context_length` tokens so that none is cut that need not be.

    Best-fit decreasing (arXiv 2404.10830): the longest document first, into the fullest window that has room for it. A
    document longer than a window gives whole windows, and its rest is packed like a document. What stays free is filled
    with end-of-text tokens. Windows come in random order, and documents of one length are taken in random order.
    `TokenDataset` with the same context_length reads exactly these windows.

    Memory: about 60 bytes a document. Raises ValueError for shards without a sidecar, or an output that is an input.
    """
    if not 1 <= context_length <= MAX_CONTEXT:
        raise ValueError(f"context_length must be in 1..{MAX_CONTEXT}, got {context_length}")
    source = _Source(shards, out_dir)
    start_D, length_D = source.documents()
    start_P, length_P = _cut(start_D, length_D, context_length)
    order_P = shuffled(len(start_P), seed)
    items, ends = _text.best_fit(length_P[order_P].astype(np.uint32), context_length)
    piece_P, end_W = order_P[items.astype(np.int64)], ends.astype(np.int64)  # in the order of the windows
    begin_W = np.concatenate([np.zeros(1, np.int64), end_W[:-1]])
    order_W = shuffled(len(end_W), seed + 1)
    block = max(1, BLOCK_TOKENS // context_length)
    with source.writer(shard_tokens) as writer:
        for chosen_B in (order_W[i : i + block] for i in range(0, len(order_W), block)):
            count_B = end_W[chosen_B] - begin_W[chosen_B]
            chosen_P = piece_P[_ranges(begin_W[chosen_B], count_B)]
            place_P = _places(length_P[chosen_P], count_B, context_length)
            tokens = np.full(len(chosen_B) * context_length, source.meta.eot_id, writer.dtype)
            tokens[_ranges(place_P, length_P[chosen_P])] = source.take(start_P[chosen_P], length_P[chosen_P])
            writer.write(tokens)
        # One token more is the last target of the last window.
        end = np.array([source.meta.eot_id], writer.dtype)
        writer.write(end, documents=source.meta.documents, text_bytes=source.meta.text_bytes)
    total = len(end_W) * context_length + 1
    cut = int((length_D > context_length).sum())
    return PackReport(len(start_D), cut, len(end_W), total, total - int(length_D.sum()))


def shuffle_shards(
    shards: Paths, out_dir: str | os.PathLike, *, seed: int = 0, shard_tokens: int = SHARD_TOKENS
) -> TokenMeta:
    """Write the documents in random order. Memory: about 40 bytes a document. Raises as `pack_shards`."""
    source = _Source(shards, out_dir)
    start_D, length_D = source.documents()
    order_D = shuffled(len(start_D), seed)
    ends = np.cumsum(length_D[order_D])
    with source.writer(shard_tokens) as writer:
        done = 0
        while done < len(order_D):
            before = 0 if done == 0 else ends[done - 1]
            stop = max(done + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS)))
            chosen = order_D[done:stop]
            writer.write(source.take(start_D[chosen], length_D[chosen]))
            done = stop
        writer.write(np.empty(0, writer.dtype), documents=source.meta.documents, text_bytes=source.meta.text_bytes)
    return writer.meta


def shuffled(count: int, seed: int) -> np.ndarray:
    """(count,) int64: 0..count-1 in an order that the seed decides, on every machine and for every numpy."""
    with np.errstate(over="ignore"):  # splitmix64
        x = np.arange(count, dtype=np.uint64) + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class _Source:
    """The tokens of several shards as one array."""

    def __init__(self, shards: Paths, out_dir: str | os.PathLike):
        self.shards, self.out_dir = shards, pathlib.Path(out_dir)
        if any(path.resolve() == self.out_dir.resolve() for path in path_list(shards)):
            raise ValueError(f"{out_dir} is both read and written: choose another directory for the output")
        parts, meta = open_tokens(shards)
        if meta is None:
            raise ValueError(f"{shards}: .bin files without meta.json do not say where documents end: give directories")
        self.parts, self.meta = [np.asarray(part) for part in parts], meta
        self.begins = np.cumsum([0] + [len(part) for part in parts])

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each begins, and how long it is with its end-of-text token: (D,) int64 each."""
        ends = [end for begin, part in zip(self.begins, self.parts, strict=False) for end in self._ends(begin, part)]
        end_D = np.concatenate([*ends, np.empty(0, np.int64)])
        total = int(self.begins[-1])
        if not len(end_D) or end_D[-1] < total:  # the last one has no end-of-text token
            end_D = np.append(end_D, total)
        if not total:
            raise ValueError(f"{self.shards} holds no tokens")
        start_D = np.concatenate([np.zeros(1, np.int64), end_D[:-1]])
        return start_D, end_D - start_D

    def _ends(self, begin: int, part: np.ndarray) -> Iterator[np.ndarray]:
        for i in range(0, len(part), SCAN_TOKENS):
            yield np.flatnonzero(part[i : i + SCAN_TOKENS] == self.meta.eot_id) + (begin + i + 1)

    def take(self, start_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
        """The tokens of pieces, one after the other."""
        index = _ranges(start_P, length_P)
        if len(self.parts) == 1:
            return self.parts[0][index]
        out = np.empty(len(index), self.parts[0].dtype)
        for begin, part in zip(self.begins, self.parts, strict=False):
            inside = (index >= begin) & (index < begin + len(part))
            out[inside] = part[index[inside] - begin]
        return out

    def writer(self, shard_tokens: int) -> ShardWriter:
        tokenizer = tokenizer_of(self.shards)

        def save(path: str | os.PathLike) -> None:
            shutil.copyfile(str(tokenizer), path)

        return ShardWriter(
            self.out_dir,
            vocab_size=self.meta.vocab_size,
            tokenizer=self.meta.tokenizer,
            eot_id=self.meta.eot_id,
            shard_tokens=shard_tokens,
            save_tokenizer=None if tokenizer is None else save,
        )


def _cut(start_D: np.ndarray, length_D: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most so many tokens: where each begins, and how long it is."""
    count_D = -(-length_D // most)
    offset_P = _ranges(np.zeros_like(count_D), count_D) * most
    return np.repeat(start_D, count_D) + offset_P, np.minimum(np.repeat(length_D, count_D) - offset_P, most)


def _places(length_P: np.ndarray, count_W: np.ndarray, context_length: int) -> np.ndarray:
    """Where pieces begin that lie side by side in their windows, of count_W pieces each."""
    before_P = np.cumsum(length_P) - length_P
    first_W = np.cumsum(count_W) - count_W
    return before_P + np.repeat(np.arange(len(count_W)) * context_length - before_P[first_W], count_W)


def _ranges(start_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one after the other."""
    before_P = np.cumsum(length_P) - length_P
    return np.repeat(start_P - before_P, length_P) + np.arange(int(length_P.sum()))
