"""The documents of a stage: JSON lines files, named in an index, read in order or one by one."""

import json
import pathlib
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from cs336.data.build.counts import Counts
from cs336.utils.contents import Contents
from cs336.utils.documents import Document
from cs336.utils.files import write_json

INDEX = "index.json"
BLOCK = 1 << 22
_UNIT = re.compile(r"\d{5,}\.jsonl?")


def write_index(directory: pathlib.Path, names: Sequence[str], facts: dict[str, Any], seen: Contents) -> None:
    """DIRECTORY/index.json: the files of the stage's documents with their digests, and what was counted.

    What an earlier build of more units left in the stage's folders goes.
    """
    stems = {pathlib.Path(name).stem for name in names}
    for path in directory.glob("*/[0-9]*.json*"):
        if _UNIT.fullmatch(path.name) and path.stem not in stems:
            path.unlink()
    files = [[name, seen.file(directory / "documents" / name)] for name in names]
    write_json(directory / INDEX, {"files": files, **facts}, indent=1)


def is_whole(directory: pathlib.Path, seen: Contents) -> bool:
    """Whether the files that a stage's index names are there: what it left, as it was then, and what it removed."""
    try:
        names = [name for name, _ in read_index(directory)["files"]]
    except ValueError:
        return False
    there = all((directory / folder / name).exists() for folder in ("documents", "removed") for name in names)
    return there and not changed(directory, seen)


def changed(directory: pathlib.Path, seen: Contents) -> list[str]:
    """The files of documents that are there and not what the stage's index says; none without an index."""
    try:
        files = read_index(directory)["files"]
    except (FileNotFoundError, ValueError):
        return []
    found = ((name, digest, directory / "documents" / name) for name, digest in files)
    return [name for name, digest, path in found if path.exists() and seen.file(path) != digest]


def read_index(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / INDEX).read_text(encoding="utf-8"))


def counts_of(directory: pathlib.Path) -> Counts:
    return Counts.from_json(read_index(directory)["counts"])


class Store:
    """The documents of a stage's directory. 8 bytes of memory a document."""

    def __init__(self, directory: pathlib.Path):
        self.files = [directory / "documents" / name for name, _ in read_index(directory)["files"]]
        ends = [_line_ends(path) for path in self.files]
        self._ends = ends
        self._first_D = np.cumsum([0, *map(len, ends)])

    def __len__(self) -> int:
        return int(self._first_D[-1])

    def __iter__(self) -> Iterator[Document]:
        return (document for path in self.files for document in read_file(path))

    def document(self, index: int) -> Document:
        place = int(np.searchsorted(self._first_D, index, "right")) - 1
        ends, at = self._ends[place], index - int(self._first_D[place])
        begin = ends[at - 1] if at else 0
        with self.files[place].open("rb") as file:
            file.seek(begin)
            return document_of_line(file.read(ends[at] - begin))

    @property
    def texts(self) -> "Texts":
        return Texts(self, range(len(self)))


class Texts(Sequence[str]):
    """The texts of documents in an order of their own, each read when it is asked for."""

    def __init__(self, store: Store, order: Sequence[int] | np.ndarray):
        self._store, self._order = store, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Texts": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Texts(self._store, self._order[index])
        return self._store.document(int(self._order[index])).text


def read_file(path: pathlib.Path) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from map(document_of_line, file)


def document_of_line(line: bytes) -> Document:
    row = json.loads(line)
    return Document(row["text"], row["id"], row["source"], row["metadata"])


def _line_ends(path: pathlib.Path) -> array:
    """Where each line of a file ends: bytes from its beginning."""
    ends = array("q")
    at = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            ends.frombytes((np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at + 1).astype(np.int64).tobytes())
            at += len(block)
    return ends
