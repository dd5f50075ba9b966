"""From a source of text to merges: files and documents are fed to the counter of the C++ core in bounded memory."""

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

from cs336 import _text
from cs336.tokenizer.patterns import for_core
from cs336.utils.batching import batches
from cs336.utils.documents import (
    COMPRESSED,
    JSON_LINES,
    files_below,
    holds_documents,
    is_binary,
    open_bytes,
    read_texts,
    unpacking,
)

Source = str | os.PathLike | Iterable[str | bytes | os.PathLike]
BLOCK = 8 << 20  # bytes of text in memory at a time
MOST_MERGES = 1 << 24  # ids go no further
SUFFIXES = {".txt", ".parquet", *JSON_LINES, *COMPRESSED}  # of what can only be the name of a file
_PATH = re.compile(r"(\S*/)?[\w-]+\.[A-Za-z]\w{0,7}|(/|\./|\.\./|~/)\S+")  # and of what looks like one


def train(
    source: Source, vocab_size: int, specials: list[str], pattern: str, num_threads: int, progress: bool
) -> list[tuple[int, int]]:
    """The merges as pairs of ids: 0..255 are the bytes, 256 + i is the result of merge i. See Tokenizer.train."""
    num_merges = vocab_size - 256 - len(specials)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens need "
            f"{256 + len(specials)}"
        )
    counter = _text.WordCounter(for_core(pattern), [text.encode() for text in specials], num_threads)
    with _bar(progress) as show:
        count = 0
        for size in _count(counter, source):
            count += size
            show(f"read {count / 1e6:,.0f} MB", 0, None)
        merges = counter.train(min(num_merges, MOST_MERGES), lambda done: show(f"{done:,} merges", done, num_merges))
    if len(merges) < num_merges:
        warnings.warn(
            f"no pair is left to merge after {len(merges)} merges: the vocabulary has "
            f"{256 + len(merges) + len(specials)} tokens, not {vocab_size}; give more text or ask for fewer",
            stacklevel=3,
        )
    return merges


def _count(counter: _text.WordCounter, source: Source) -> Iterator[int]:
    """Count all of a source, and yield the size of each part of it."""
    if isinstance(source, bytes):
        raise ValueError("source is bytes: give a path, or a list of documents")
    if isinstance(source, (str, os.PathLike)):
        source = [Path(source)]
    elif isinstance(source, (list, tuple)) and all(isinstance(item, str) and _is_name(item) for item in source):
        source = [Path(item) for item in source]
    items = iter(source)
    for first in items:
        if isinstance(first, os.PathLike):
            yield from _count_file(counter, first)
            continue
        if isinstance(first, str) and _is_file(first):
            raise ValueError(
                f"source has the document {first!r}, which is the name of a file, and others that are not, or it is no "
                "list: give pathlib.Path objects to train on what files contain"
            )
        yield from _count_documents(counter, itertools.chain([first], cast(Iterator[str | bytes], items)))


def _is_name(text: str) -> bool:
    """Whether a text is a path, or looks like that of a file that is not there."""
    one_line = len(text) < 256 and "\n" not in text and "\0" not in text
    return one_line and bool(os.path.exists(text) or Path(text).suffix.lower() in SUFFIXES or _PATH.fullmatch(text))


def _is_file(text: str) -> bool:
    return len(text) < 256 and "\n" not in text and "\0" not in text and os.path.isfile(text)


def _count_documents(counter: _text.WordCounter, documents: Iterable[str | bytes]) -> Iterator[int]:
    for batch in batches(documents, BLOCK):
        counter.add_documents(batch)
        yield sum(map(len, batch))


def _count_file(counter: _text.WordCounter, path: str | os.PathLike) -> Iterator[int]:
    if os.path.isdir(path):
        for inside in files_below(path):
            if holds_documents(inside) or not is_binary(inside):
                yield from _count_file(counter, inside)
        return
    if holds_documents(path):
        yield from _count_documents(counter, read_texts(path))
        return
    with unpacking(path), open_bytes(path) as file:
        buffer, held = bytearray(BLOCK), 0
        while size := file.readinto(memoryview(buffer)[held:]):  # type: ignore[attr-defined]
            held += size
            done = counter.add_front(memoryview(buffer)[:held])
            buffer[: held - done] = buffer[done:held]
            held -= done
            if held * 2 > len(buffer):
                buffer += bytes(len(buffer))
            yield size
    counter.add_documents([bytes(buffer[:held])])


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    if not shown:
        yield lambda text, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("training the tokenizer"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
