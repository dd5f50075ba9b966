"""Units of work: a file of many records, or a run of files of one record each; and the paths they are found at."""

import glob
import os
import pathlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cs336.utils.documents import COMPRESSED, files_below

RUN_BYTES, RUN_FILES = 64 << 20, 2000  # of one unit of small files


@dataclass(frozen=True)
class Unit:
    files: tuple[str, ...]
    size: int
    """Bytes of the files."""
    root: str
    """The directory, or the file, that the source names."""

    @property
    def name(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"


def found_files(
    paths: Iterable[str], suffixes: frozenset[str], without: pathlib.Path | None
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """(file, the path that it was found below), in order: of patterns, files, and those with a suffix in directories.

    Raises FileNotFoundError for a path or pattern that names nothing, or a directory without such a file.
    """
    for path in paths:
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        any_found = False
        for match in map(pathlib.Path, matches):
            if not match.exists():
                raise FileNotFoundError(f"{match} does not exist: expected a file, a directory or a pattern")
            files = files_below(match, without) if match.is_dir() else iter([match])
            for file in files:
                if file == match or suffix_of(file) in suffixes or "*" in suffixes:
                    any_found = True
                    yield file, match
        if not any_found:
            kinds = ", ".join(sorted(suffixes)[:12])
            raise FileNotFoundError(f"{path} holds no file of this source: expected {kinds}")


def suffix_of(path: pathlib.Path) -> str:
    """The last that does not name a compression: .jsonl of x.jsonl.gz."""
    return next((s.lower() for s in reversed(path.suffixes) if s.lower() not in COMPRESSED), "")


def each(files: Iterable[tuple[pathlib.Path, pathlib.Path]]) -> list[Unit]:
    """A unit a file."""
    return [Unit((str(file),), file.stat().st_size, str(root)) for file, root in files]


def runs(files: Iterable[tuple[pathlib.Path, pathlib.Path]]) -> list[Unit]:
    """Units of neighbouring small files."""
    units: list[Unit] = []
    run: list[str] = []
    size, below = 0, ""
    for file, root in files:
        if run and (size >= RUN_BYTES or len(run) >= RUN_FILES or str(root) != below):
            units.append(Unit(tuple(run), size, below))
            run, size = [], 0
        run.append(str(file))
        size += os.stat(file).st_size
        below = str(root)
    return [*units, Unit(tuple(run), size, below)] if run else units
