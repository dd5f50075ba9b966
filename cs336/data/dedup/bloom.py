"""A Bloom filter: a set of texts in a few bits each, which may call a new text known, never a known one new."""

import os
import pathlib
from collections.abc import Iterable

from cs336 import _text
from cs336.utils.files import replacing


class BloomFilter:
    """A set for `capacity` texts, at most a share `error` of which is taken for known by mistake once it is full.

    It takes 1.44 log2(1 / error) bits a text: 9.6 at an error of 0.01. Keys are str or bytes; a str is its UTF-8.
    Raises ValueError for a capacity below 1 or an error outside 0..1.
    """

    def __init__(self, capacity: int, error: float = 0.01):
        if capacity < 1 or not 0 < error < 1:
            raise ValueError(
                f"a Bloom filter needs a capacity of 1 or more and an error between 0 and 1, got {capacity}, {error}"
            )
        self._native = _text.BloomFilter(capacity, error)

    def add(self, key: str | bytes) -> bool:
        """Whether the key was known, by mistake or not. It is now."""
        return self._native.add(key)

    def add_many(self, keys: Iterable[str | bytes]):
        """(N,) bool: what `add` says of each, in order."""
        if isinstance(keys, str | bytes):
            raise TypeError(f"expected a list of keys, got one {type(keys).__name__}: give [key]")
        return self._native.add_many(list(keys))

    def __contains__(self, key: str | bytes) -> bool:
        return self._native.contains(key)

    @property
    def num_bits(self) -> int:
        return self._native.num_bits()

    @property
    def num_probes(self) -> int:
        return self._native.num_probes()

    def save(self, path: str | os.PathLike) -> None:
        with replacing(path, "wb") as file:
            file.write(self._native.bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BloomFilter":
        """Raises ValueError that names the file if it is not a whole filter."""
        bloom = cls.__new__(cls)
        try:
            bloom._native = _text.BloomFilter(pathlib.Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return bloom
