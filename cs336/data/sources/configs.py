"""The sources of a recipe: each finds its files, parts them into units of work, and reads the records of a unit."""

import functools
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pydantic

from cs336.data.sources import unit as units_of
from cs336.data.sources.licence import licence_of
from cs336.data.sources.record import HTML, PDF, TEXT, Limits, Record, Unread
from cs336.data.sources.rows import Rows
from cs336.data.sources.unit import Unit
from cs336.data.sources.warc import read_archive

CODE = (
    "py pyi c h cc cpp hpp cu cuh rs go java kt scala js jsx ts tsx rb php cs swift m sh sql lua pl r jl hs ml ex erl "
    "clj zig f90 proto cmake toml yaml yml rst md"
)
LEFT_OUT = {"node_modules", "vendor", "third_party", "build", "dist", "target", "site-packages"}
README_LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class _Source:
    paths: tuple[str, ...]
    """Files, directories, or patterns such as crawl/*.warc.gz."""
    name: str = ""
    """Kept in each document's metadata as "collection"."""
    licence: str | None = None
    """Of documents that name none themselves."""

    suffixes = frozenset[str]()

    def units(self, without: pathlib.Path | None = None) -> list[Unit]:
        """In order. without: a directory that is passed over. Raises FileNotFoundError for a path without files."""
        return units_of.each(units_of.found_files(self.paths, self.suffixes, without))

    def read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        """The records of a unit, and what could not be one; each bounded by `limits`."""
        given = {"collection": self.name} if self.name else {}
        for found in self._read(unit, limits):
            if isinstance(found, Record):
                licence = found.metadata.get("licence") or self.licence
                known = {"licence": licence} if licence else {}
                found = replace(found, metadata={**found.metadata, **given, **known})
            yield found

    def _read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        raise NotImplementedError

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty: name files, directories or patterns")


@dataclass(frozen=True)
class Warc(_Source):
    """Archives of a crawl: WARC, WET, ARC; plain, .gz or .zst."""

    kind: Literal["warc"] = "warc"

    suffixes = frozenset({".warc", ".wet", ".arc"})

    def _read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        (path,) = unit.files
        with open(path, "rb") as file:
            try:
                yield from read_archive(file, path, limits)
            except ValueError as error:
                yield Unread(0, path, path, "damaged", str(error))


@dataclass(frozen=True)
class _Files(_Source):
    type = TEXT

    def units(self, without: pathlib.Path | None = None) -> list[Unit]:
        found = units_of.found_files(self.paths, self.suffixes, without)
        return units_of.runs(pair for pair in found if self._wanted(*pair))

    def _wanted(self, path: pathlib.Path, root: pathlib.Path) -> bool:
        return True

    def _read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        position = 0
        for number, name in enumerate(unit.files):
            path = pathlib.Path(name)
            try:
                size = path.stat().st_size
                position += size
                if size > limits.record_bytes:
                    detail = f"{size:,} bytes; {limits.record_bytes:,} are read"
                    yield Unread(number, name, name, "too large", detail, position=position)
                    continue
                content = path.read_bytes()
            except OSError as error:
                yield Unread(number, name, name, "damaged", error.strerror or str(error), position=position)
                continue
            yield self._record(Record(number, name, name, self.type, content, {}, position), unit)

    def _record(self, record: Record, unit: Unit) -> Record | Unread:
        return record


@dataclass(frozen=True)
class Html(_Files):
    """Saved pages, one a file."""

    kind: Literal["html"] = "html"

    suffixes = frozenset({".html", ".htm", ".xhtml"})
    type = HTML


@dataclass(frozen=True)
class Pdf(_Files):
    """Papers, one a file. Needs pypdfium2."""

    kind: Literal["pdf"] = "pdf"

    suffixes = frozenset({".pdf"})
    type = PDF


@dataclass(frozen=True)
class Text(_Files):
    """Plain text and markdown, one document a file."""

    kind: Literal["text"] = "text"

    suffixes = frozenset({".txt", ".md", ".markdown", ".rst", ".text"})

    def _record(self, record: Record, unit: Unit) -> Record | Unread:
        return _text(record)


@dataclass(frozen=True)
class Code(_Files):
    """Source trees: a document a file, with the licence that it or its tree names. Hidden, vendored, built and binary
    files are passed over."""

    kind: Literal["code"] = "code"

    suffixes = frozenset(f".{name}" for name in CODE.split())

    def _wanted(self, path: pathlib.Path, root: pathlib.Path) -> bool:
        return not LEFT_OUT & set(path.parts[len(root.parts) : -1])

    def _record(self, record: Record, unit: Unit) -> Record | Unread:
        assert isinstance(record.content, bytes)
        licence = licence_of(pathlib.Path(record.source), record.content, pathlib.Path(unit.root))
        return _text(replace(record, metadata={"licence": licence} if licence else {}))


def _text(record: Record) -> Record | Unread:
    assert isinstance(record.content, bytes)
    if b"\0" in record.content[:8192]:
        return Unread(record.number, record.id, record.source, "binary", damaged=False, position=record.position)
    return replace(record, content=record.content.decode("utf-8", "replace").removeprefix("\ufeff"))


@dataclass(frozen=True)
class _Rows(_Source):
    text_field: str = "text"
    """The field or column that holds the text."""

    def _read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        return Rows(unit.files[0], self.text_field, limits).read()


@dataclass(frozen=True)
class Jsonl(_Rows):
    """JSON lines, an object with a text each; plain, .gz, .zst, .xz or .bz2."""

    kind: Literal["jsonl"] = "jsonl"

    suffixes = frozenset({".jsonl", ".ndjson", ".json"})


@dataclass(frozen=True)
class Parquet(_Rows):
    """Parquet files, a text a row. Needs pyarrow."""

    kind: Literal["parquet"] = "parquet"

    suffixes = frozenset({".parquet"})


@dataclass(frozen=True)
class HuggingFace(_Rows):
    """A directory of a data set: as the hub lays it out (parquet, JSON lines), or as save_to_disk does (arrow)."""

    split: str | None = "train"
    """Of the files alone whose name or folder begins with it; every file where none names a split."""
    kind: Literal["huggingface"] = "huggingface"

    suffixes = frozenset({".parquet", ".jsonl", ".arrow"})

    def units(self, without: pathlib.Path | None = None) -> list[Unit]:
        units = super().units(without)
        if self.split is None:
            return units
        splits = {unit.files[0]: _split_of(unit) for unit in units}
        if not any(splits.values()):
            return units
        chosen = [unit for unit in units if splits[unit.files[0]] == self.split]
        if not chosen:
            known = ", ".join(sorted({name for name in splits.values() if name}))
            raise ValueError(f"{', '.join(self.paths)} has no split {self.split!r}, only {known}")
        return chosen

    def _read(self, unit: Unit, limits: Limits) -> Iterator[Record | Unread]:
        licence = _readme_licence(unit.root)
        for found in super()._read(unit, limits):
            if licence and isinstance(found, Record):
                found = replace(found, metadata={"licence": licence, **found.metadata})
            yield found


def _split_of(unit: Unit) -> str | None:
    """train of data/train-00000-of-00002.parquet, or of train/data-00000-of-00001.arrow."""
    path = pathlib.Path(unit.files[0])
    for word in (path.name.partition("-")[0].partition(".")[0], path.parent.name):
        if word in ("train", "test", "validation", "dev", "valid"):
            return word
    return None


@functools.lru_cache(64)
def _readme_licence(root: str) -> str | None:
    readme = pathlib.Path(root) / "README.md"
    if not readme.is_file():
        return None
    head = readme.read_text(encoding="utf-8", errors="replace")[:8192]
    found = README_LICENCE.search(head) if head.startswith("---") else None
    return found[1] if found else None


Source = Annotated[
    Warc | Html | Pdf | Text | Code | Jsonl | Parquet | HuggingFace, pydantic.Field(discriminator="kind")
]
