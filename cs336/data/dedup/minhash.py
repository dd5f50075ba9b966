"""Near duplicates: MinHash signatures, LSH bands, candidates verified by their true Jaccard similarity, clusters.

A pair of similarity s shares a band of r rows with probability 1 - (1 - s^r)^bands: with 128 hashes in 16 bands that is
0.95 at s = 0.8 and 0.06 at 0.5. What is then below the threshold is told apart by the texts themselves.
"""

import functools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, overload

import numpy as np

from cs336 import _text
from cs336.data.dedup.lines import DedupReport
from cs336.data.dedup.outputs import copy, plan_outputs
from cs336.utils.files import Paths

Unit = Literal["word", "char"]
BATCH = 64  # texts in memory while they are signed
MOST_HASHES = 1 << 16  # an estimate of similarity is then off by 0.004
CACHED_SHINGLES = 256  # texts whose shingles are kept while pairs are verified


def minhash(
    texts: Iterable[str | bytes], num_hashes: int = 128, ngram: int = 5, unit: Unit = "word", seed: int = 0
) -> np.ndarray:
    """(N, num_hashes) uint32: two rows agree in a share of places that is the similarity of the texts' n-grams.

    A text is normalized first: NFD, accents, case, punctuation and white space do not matter. One without words has
    4294967295 everywhere.
    """
    check_minhash(num_hashes, 1, ngram, 1.0)
    check_seed(seed)
    _check_several(texts)
    return _text.MinHash(num_hashes, seed).sign(list(texts), ngram, unit)


def near_duplicates(
    texts: Sequence[str | bytes],
    num_hashes: int = 128,
    num_bands: int = 16,
    ngram: int = 5,
    threshold: float = 0.8,
    unit: Unit = "word",
    seed: int = 0,
) -> list[int]:
    """Of each text the index of the first text of its cluster: those with `near_duplicates(...)[i] == i` stay.

    Two texts are in one cluster when the Jaccard similarity of their sets of n-grams is `threshold` or more, or when a
    chain of such pairs joins them. texts: may read them on demand: a few are in memory at a time, signatures are
    in a temporary file, and 40 bytes a text stay.

    Raises ValueError for arguments that make no sense, with what would.
    """
    check_minhash(num_hashes, num_bands, ngram, threshold)
    check_seed(seed)
    _check_several(texts)
    with tempfile.TemporaryFile() as file:
        signatures_NH = _sign(texts, num_hashes, ngram, unit, seed, file)
        parent = np.arange(len(texts))

        @functools.lru_cache(CACHED_SHINGLES)
        def shingles(index: int) -> np.ndarray:
            return _text.shingles(texts[index], ngram, unit)

        def similarity(a: int, b: int) -> float:
            return _text.jaccard(shingles(a), shingles(b))

        for first, *others in _buckets(_keys(signatures_NH)):  # texts of equal sets: the first stands for them
            for index in others:
                if similarity(first, index) == 1:
                    parent[index] = first
        index_D = np.flatnonzero(parent == np.arange(len(texts)))
        rows = num_hashes // num_bands
        for band in range(num_bands):
            for bucket in _buckets(_keys(signatures_NH[:, band * rows : (band + 1) * rows])[index_D]):
                _join(index_D[bucket].tolist(), parent, lambda a, b: similarity(a, b) >= threshold)
    return [_root(parent, i) for i in range(len(texts))]


def dedup_minhash(
    files: Paths,
    out_dir: str | os.PathLike,
    num_hashes: int = 128,
    num_bands: int = 16,
    ngram: int = 5,
    threshold: float = 0.8,
    unit: Unit = "word",
    seed: int = 0,
) -> DedupReport:
    """Copy to `out_dir` those files, each one document, that are first in their cluster of near duplicates.

    See `near_duplicates`. The files that stay keep their bytes and names.
    """
    pairs = plan_outputs(files, out_dir)
    first = near_duplicates(
        _Contents([source for source, _ in pairs]), num_hashes, num_bands, ngram, threshold, unit, seed
    )
    kept = [pair for i, pair in enumerate(pairs) if first[i] == i]
    for source, target in kept:
        copy(source, target)
    return DedupReport(len(pairs), len(pairs) - len(kept))


class _Contents(Sequence[bytes]):
    """Files, each read when it is asked for."""

    def __init__(self, paths: list[pathlib.Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "_Contents": ...
    def __getitem__(self, index):
        return _Contents(self._paths[index]) if isinstance(index, slice) else self._paths[index].read_bytes()


def check_minhash(num_hashes: int, num_bands: int, ngram: int, threshold: float) -> None:
    """Raises ValueError for arguments that make no sense, with what would."""
    if num_hashes < 1 or num_bands < 1 or num_hashes % num_bands:
        raise ValueError(
            f"num_hashes must be a multiple of num_bands, both 1 or more, got {num_hashes} and {num_bands}: "
            f"try num_hashes={max(1, num_hashes // max(num_bands, 1)) * max(num_bands, 1)}"
        )
    if num_hashes > MOST_HASHES:
        raise ValueError(f"num_hashes must be at most {MOST_HASHES}, got {num_hashes}")
    if ngram < 1:
        raise ValueError(f"ngram must be 1 or more, got {ngram}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a Jaccard similarity above 0 and at most 1, got {threshold}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a number that a seed cannot be."""
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must be in 0..2^63-1, got {seed}")


def _check_several(texts: Iterable[str | bytes]) -> None:
    if isinstance(texts, str | bytes):
        raise TypeError(f"expected a list of texts, got one {type(texts).__name__}: give [text]")


def _sign(texts: Sequence[str | bytes], num_hashes: int, ngram: int, unit: Unit, seed: int, file) -> np.ndarray:
    """(N, num_hashes) uint32 in the file."""
    native = _text.MinHash(num_hashes, seed)
    if not len(texts):
        return np.empty((0, num_hashes), np.uint32)
    signatures_NH = np.memmap(file, np.uint32, "w+", shape=(len(texts), num_hashes))
    for begin in range(0, len(texts), BATCH):
        batch = [texts[i] for i in range(begin, min(begin + BATCH, len(texts)))]
        signatures_NH[begin : begin + BATCH] = native.sign(batch, ngram, unit)
    return signatures_NH


def _keys(band_NR: np.ndarray) -> np.ndarray:
    """(N,) uint64: a hash of each row."""
    keys_N = np.full(len(band_NR), 0x9E3779B97F4A7C15, np.uint64)
    for r in range(band_NR.shape[1]):
        keys_N = (keys_N ^ band_NR[:, r]) * np.uint64(0xD6E8FEB86659FD93)
        keys_N ^= keys_N >> np.uint64(32)
    return keys_N


def _buckets(keys_N: np.ndarray) -> Iterator[list[int]]:
    """Indices with equal keys, in order; those alone are left out."""
    order_N = np.argsort(keys_N, kind="stable")
    same_N = np.concatenate([[False], keys_N[order_N[1:]] == keys_N[order_N[:-1]], [False]])
    begins = np.flatnonzero(~same_N[:-1] & same_N[1:])
    ends = np.flatnonzero(same_N[:-1] & ~same_N[1:]) + 1
    for begin, end in zip(begins, ends, strict=True):
        yield order_N[begin:end].tolist()


def _join(bucket: list[int], parent: np.ndarray, similar) -> None:
    """Unite what is similar. A text is compared with those of other clusters alone, until one is similar: copies cost a
    comparison each."""
    clusters: list[list[int]] = []  # of the bucket's texts so far
    for index in bucket:
        home: list[int] | None = None
        for texts in clusters:
            a, b = _root(parent, index), _root(parent, texts[0])
            if a != b and not any(similar(other, index) for other in texts):
                continue
            parent[max(a, b)] = min(a, b)
            if home is None:
                home = texts
            else:
                home += texts
                texts.clear()
        if home is None:
            clusters.append([index])
        else:
            home.append(index)
            clusters = [texts for texts in clusters if texts]


def _root(parent: np.ndarray, index: int) -> int:
    """The first text of a cluster; halves the path to it."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return int(index)
