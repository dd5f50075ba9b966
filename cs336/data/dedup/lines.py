"""Exact duplicates: lines of files, and whole files."""

import contextlib
import hashlib
import mmap
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cs336 import _text
from cs336.data.dedup.outputs import copy, plan_outputs
from cs336.utils.files import Paths, replacing

CHUNK_BYTES = 1 << 26
TABLE_BYTES = 80  # a distinct line, at most: a table at a quarter of its load, and the smaller one it grew from


@dataclass(frozen=True)
class DedupReport:
    """What went in and what was dropped: lines, or documents."""

    total: int
    dropped: int

    @property
    def kept(self) -> int:
        return self.total - self.dropped


def dedup_lines(
    files: Paths, out_dir: str | os.PathLike, keep: Literal["none", "first"] = "none", max_memory: int = 1 << 32
) -> DedupReport:
    """Write each file to `out_dir` under its name, without the lines that occur more than once in all of them.

    keep: `"none"` drops every copy of such a line (navigation, boilerplate), `"first"` keeps the first one.
    max_memory: bytes for the table of lines; where they are not enough, the files are read several times, for a part of
        the lines each. One byte a line is needed beside it.

    A line is the bytes before "\\n"; empty lines are lines too. Lines are compared by 64-bit hashes: among n different
    ones a pair is taken for equal with a chance of n^2 / 2^65 (1e-3 at 2e8). The files may be larger than memory.
    """
    if keep not in ("none", "first"):
        raise ValueError(f'keep is "none" (drop every copy) or "first", got {keep!r}')
    pairs = plan_outputs(files, out_dir)
    drops = []
    for source, _ in pairs:
        with _mapped(source) as text:
            drops.append(np.zeros(_text.count_lines(text), np.uint8))
    parts = max(1, -(-sum(map(len, drops)) * TABLE_BYTES // max_memory))
    for part in range(parts):
        counts = _text.LineCounts(part, parts)
        if keep == "none":
            for source, _ in pairs:
                with _mapped(source) as text:
                    counts.add(text)
        mark = counts.mark_repeated if keep == "none" else counts.mark_seen
        for (source, _), drop in zip(pairs, drops, strict=True):
            with _mapped(source) as text:
                mark(text, drop)
    for (source, target), drop in zip(pairs, drops, strict=True):
        _write_kept(source, target, drop)
    return DedupReport(sum(map(len, drops)), int(sum(drop.sum(dtype=np.int64) for drop in drops)))


def dedup_documents(files: Paths, out_dir: str | os.PathLike) -> DedupReport:
    """Copy to `out_dir` the first of the files with equal bytes, under its name."""
    pairs = plan_outputs(files, out_dir)
    seen: set[bytes] = set()
    for source, target in pairs:
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if digest not in seen:
            copy(source, target)
        seen.add(digest)
    return DedupReport(len(pairs), len(pairs) - len(seen))


@contextlib.contextmanager
def _mapped(path: pathlib.Path) -> Iterator[mmap.mmap | bytes]:
    if path.stat().st_size == 0:  # which cannot be mapped
        yield b""
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def _write_kept(source: pathlib.Path, target: pathlib.Path, drop: np.ndarray) -> None:
    """Chunk by chunk, each of whole lines."""
    with _mapped(source) as text, replacing(target, "wb") as out, memoryview(text) as view:
        begin = line = 0
        while begin < len(view):
            end = text.find(b"\n", min(begin + CHUNK_BYTES, len(view))) + 1 or len(view)
            with view[begin:end] as chunk:
                lines = _text.count_lines(chunk)
                out.write(_text.keep_lines(chunk, drop[line : line + lines]))
            begin, line = end, line + lines
