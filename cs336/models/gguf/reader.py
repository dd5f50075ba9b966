"""A GGUF file: its metadata, and where its tensors lie. Little-endian, versions 2 and 3.

    "GGUF", version u32, tensors u64, pairs u64
    a pair:    key string, type u32, value               string: bytes u64, UTF-8; array: type u32, count u64, values
    a tensor:  name string, dims u32, each u64 (the innermost first), type u32, offset u64
    padding to general.alignment, then the data that offsets count from

A file says how much follows: nothing is allocated or read by such a number before it is held against the bytes there
are, so that a damaged or hostile file is refused by name and takes no more memory than its own size.
"""

import math
import mmap
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from cs336.models.gguf.quants import FORMATS, dequantize

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMS, MOST_NESTING = 4, 3


@dataclass(frozen=True)
class Entry:
    shape: tuple[int, ...]
    """As torch has it: the innermost dim last."""
    kind: int
    """A key of FORMATS."""
    begin: int
    end: int
    """Bytes of the file."""


class GGUF:
    """metadata: key -> int, float, bool, str or a list of them; tensors: name -> where and what it is.

    Raises FileNotFoundError where there is no file, ValueError, naming what is wrong, for one that is not whole.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                self._refuse(f"has {size} bytes: no GGUF file is so short")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._take(4) != b"GGUF":
            self._refuse("does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            self._refuse(f"is of version {version}: 2 and 3 are read, of little-endian numbers")
        num_tensors, num_pairs = self._number("Q"), self._number("Q")
        self._check_count("tensors", num_tensors, 24)
        self._check_count("metadata keys", num_pairs, 13)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key")
            if key in self.metadata:
                self._refuse(f"has the metadata key {key!r} twice")
            self.metadata[key] = self._value(key, self._number("I"))
        entries = [self._entry() for _ in range(num_tensors)]
        self.tensors = self._placed(entries)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Metadata of one type; the default where there is none. Raises ValueError for another type."""
        value = self.metadata.get(key, default)
        if key in self.metadata and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            self._refuse(f"has {key} of type {type(value).__name__}: expected {kind.__name__}")
        return value

    def tensor(self, name: str) -> Tensor:
        """float32, of its shape."""
        entry = self.tensors[name]
        found = dequantize(memoryview(self._bytes)[entry.begin : entry.end], entry.kind)
        return torch.from_numpy(found).view(entry.shape)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name")
        num_dims = self._number("I")
        if not 1 <= num_dims <= MOST_DIMS:
            self._refuse(f"has tensor {name!r} of {num_dims} dims: expected 1 to {MOST_DIMS}")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in FORMATS:
            known = ", ".join(form.name for form in FORMATS.values())
            self._refuse(f"has tensor {name!r} in format {kind}: read are {known}")
        if shape[-1] % FORMATS[kind].elements != 0:
            self._refuse(f"has tensor {name!r} with rows of {shape[-1]}, which {FORMATS[kind].name} does not divide")
        return name, shape, kind, offset

    def _placed(self, entries: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, Entry]:
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"has general.alignment {alignment}: expected a power of two")
        base = -(-self._at // alignment) * alignment
        placed: dict[str, Entry] = {}
        for name, shape, kind, offset in entries:
            size = math.prod(shape) // FORMATS[kind].elements * FORMATS[kind].bytes
            begin = base + offset
            if name in placed:
                self._refuse(f"has tensor {name!r} twice")
            if offset % alignment or begin + size > len(self._bytes):
                self._refuse(f"is cut off or damaged: tensor {name!r} of {size} bytes would begin at byte {begin}")
            placed[name] = Entry(shape, kind, begin, begin + size)
        return placed

    def _value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string(key)
        if kind in SCALARS:
            number = self._number(SCALARS[kind])
            return float(str(np.float32(number))) if SCALARS[kind] == "f" else number  # 1e-5, as it was meant
        if kind != ARRAY or depth == MOST_NESTING:
            self._refuse(f"has {key} of an unknown type, {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            self._check_count(key, count, struct.calcsize("<" + SCALARS[inner]))
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self._take(count * struct.calcsize(SCALARS[inner]))))
        self._check_count(key, count, 8)
        return [self._value(key, inner, depth + 1) for _ in range(count)]

    def _string(self, what: str) -> str:
        size = self._number("Q")
        self._check_count(what, size, 1)
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            self._refuse(f"has {what} that is not UTF-8")

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, size: int) -> bytes:
        if size > len(self._bytes) - self._at:
            self._refuse(f"ends at byte {len(self._bytes)}, within its header")
        self._at += size
        return self._bytes[self._at - size : self._at]

    def _check_count(self, what: str, count: int, least: int) -> None:
        """least: bytes that each takes."""
        if count * least > len(self._bytes) - self._at:
            self._refuse(f"says that {what} take {count} entries, more than the file has bytes for")

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.path} {why}")
