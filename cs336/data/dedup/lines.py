"""Exact duplicates: lines of files, and whole files."""

import contextlib
import hashlib
import mmap
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cs336 import _text
from cs336.data.dedup.outputs import copy, plan_outputs
from cs336.utils.files import Paths, replacing
from cs336.utils.threads import thread_count

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
    files: Paths,
    out_dir: str | os.PathLike,
    keep: Literal["none", "first"] = "none",
    max_memory: int = 1 << 32,
    num_threads: int | None = None,
) -> DedupReport:
    """Write each file to `out_dir` under its name, without the lines that occur more than once in all of them.

    keep: `"none"` drops every copy of such a line (navigation, boilerplate), `"first"` keeps the first one.
    max_memory: bytes for the table of lines; where they are not enough, the files are read several times, for a part of
        the lines each, and one byte a line is needed beside it.
    num_threads: None for as many as this process may run on. The result is the same for any number.

    A line is the bytes before "\\n"; empty lines are lines too. Lines are compared by 64-bit hashes: among n different
    ones a pair is taken for equal with a chance of n^2 / 2^65 (1e-3 at 2e8). The files may be larger than memory.
    """
    check_repeats(keep, max_memory)
    threads, first = thread_count(num_threads), keep == "first"
    pairs = plan_outputs(files, out_dir)
    drops: list[np.ndarray | None] = [None] * len(pairs)
    parts = 1
    if sum(source.stat().st_size for source, _ in pairs) * TABLE_BYTES > max_memory:  # which were enough in any case
        counts = [_counted(source) for source, _ in pairs]
        parts = max(1, -(-sum(counts) * TABLE_BYTES // max_memory))
        if parts > 1:
            drops = [np.zeros(count, np.uint8) for count in counts]
    report = DedupReport(0, 0)
    for part in range(parts):
        lines = _text.LineDedup(part, parts, threads)
        if not first:
            for source, _ in pairs:
                with _mapped(source) as text:
                    lines.count(text)
        for (source, target), drop in zip(pairs, drops, strict=True):
            with _mapped(source) as text:
                if part < parts - 1:
                    lines.drop_repeated(text, first, drop, None)
                    continue
                with replacing(target, "wb") as out:
                    total, dropped = lines.drop_repeated(text, first, drop, out.fileno())
            report = DedupReport(report.total + total, report.dropped + dropped)
    return report


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


def check_repeats(keep: str, max_memory: int) -> None:
    """Raises ValueError for what makes no sense."""
    if keep not in ("none", "first"):
        raise ValueError(f'keep is "none" (drop every copy) or "first", got {keep!r}')
    if max_memory < 1:
        raise ValueError(f"max_memory is bytes, 1 or more, got {max_memory}")


class RepeatedLines:
    """Which lines of many texts others have: known before anything is written. A byte a line, and the table of a part.

    texts: gives the texts, in order, as often as it is called. keep, max_memory: as dedup_lines has them.
    """

    def __init__(self, texts: Callable[[], Iterable[bytes]], keep: Literal["none", "first"], max_memory: int):
        self._begins_D = np.cumsum([0, *(_text.count_lines(text) for text in texts())])
        self._drop_L = np.zeros(int(self._begins_D[-1]), np.uint8)
        parts = max(1, -(-len(self._drop_L) * TABLE_BYTES // max_memory))
        for part in range(parts):
            lines = _text.LineDedup(part, parts, 1)
            if keep == "none":
                for text in texts():
                    lines.count(text)
            for index, text in enumerate(texts()):
                lines.drop_repeated(text, keep == "first", self.of(index), None)

    def __len__(self) -> int:
        return len(self._drop_L)

    def of(self, index: int) -> np.ndarray:
        """(lines of a text,) uint8: 1 for those that go."""
        return self._drop_L[self._begins_D[index] : self._begins_D[index + 1]]


@contextlib.contextmanager
def _mapped(path: pathlib.Path) -> Iterator[mmap.mmap | bytes]:
    if path.stat().st_size == 0:  # which cannot be mapped
        yield b""
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def _counted(path: pathlib.Path) -> int:
    with _mapped(path) as text:
        return _text.count_lines(text)
