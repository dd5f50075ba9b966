"""The rows of a run that goes on, or was killed: metrics.jsonl, in which a torn line, which a kill leaves, is passed
over."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]
BLOCK = 16 << 10  # bytes read at once from the end


def read_rows(run_dir: pathlib.Path) -> list[Row]:
    """All, in their order; none where there is no file."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            return list(_parsed(file))
    except FileNotFoundError:
        return []


def newest_row(run_dir: pathlib.Path, wanted: Callable[[Row], bool] = lambda row: True) -> Row | None:
    """The last that is wanted; reads no more of the file than that takes."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            return next((row for row in _parsed(_backwards(file)) if wanted(row)), None)
    except FileNotFoundError:
        return None


def _parsed(lines) -> Iterator[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _backwards(file) -> Iterator[bytes]:
    """Its lines from the last to the first."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start:
        begin = max(0, start - BLOCK)
        file.seek(begin)
        first, *whole = (file.read(start - begin) + rest).split(b"\n")
        yield from reversed(whole)
        start, rest = begin, first
    yield rest
