"""JSON lines, parquet and arrow files as records: a text a row."""

import bz2
import gzip
import lzma
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from cs336.data.sources.record import TEXT, Limits, Record, Unread
from cs336.utils import zstd
from cs336.utils.documents import is_blank, parse_line

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstd.open}
ROWS = 256  # of a parquet file, in memory at once
DEEPEST = 64  # levels of a row's fields: what can just be read may be too deep to be written or read again
FACTS = {  # names that fields have for what every document keeps
    "url": ("url", "uri", "link"),
    "date": ("date", "timestamp", "created", "published"),
    "licence": ("licence", "license"),
}


@dataclass(frozen=True)
class Rows:
    """How rows of a file become records."""

    file: str
    text_field: str
    limits: Limits
    first: int = 0
    """Number of the first record."""

    def read(self) -> Iterator[Record | Unread]:
        path = pathlib.Path(self.file)
        if path.suffix.lower() in (".parquet", ".arrow"):
            yield from self._table(path)
        else:
            yield from self._lines(path)

    # ---- JSON lines ----

    def _lines(self, path: pathlib.Path) -> Iterator[Record | Unread]:
        most = self.limits.record_bytes
        number, line_number = self.first, 0
        with path.open("rb") as raw:
            opener = OPENERS.get(path.suffix.lower())
            file: IO[bytes] = raw if opener is None else opener(raw)  # type: ignore[operator]
            while True:
                line_number += 1
                where = f"{path}:{line_number}"
                try:
                    line = file.readline(most + 1)
                    size = len(line)
                    while len(line) > most and not line.endswith(b"\n"):  # the rest of a line that is too long
                        line = file.readline(most + 1)
                        size += len(line)
                except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                    yield Unread(number, where, str(path), "damaged", f"the file cannot be unpacked further: {error}")
                    return
                if not size:
                    return
                if size - line.endswith(b"\n") > most:
                    detail = f"a line of {size:,} bytes; {most:,} are read"
                    yield Unread(number, where, str(path), "too large", detail, position=raw.tell())
                elif not is_blank(line):
                    yield self._line(line, where, number, raw.tell())
                else:
                    continue
                number += 1

    def _line(self, line: bytes, where: str, number: int, position: int) -> Record | Unread:
        try:
            row = parse_line(line)
        except (ValueError, RecursionError) as error:
            return Unread(number, where, self.file, "damaged", f"it is not JSON: {error}", position=position)
        if not isinstance(row, dict):
            return Unread(number, where, self.file, "damaged", "it is no JSON object", position=position)
        return self._row(row, where, number, position)

    # ---- tables ----

    def _table(self, path: pathlib.Path) -> Iterator[Record | Unread]:
        try:
            from pyarrow import ArrowException
        except ImportError:
            raise ImportError(f"reading {path} needs pyarrow: pip install 'cs336[data]'") from None
        number, size = self.first, path.stat().st_size
        try:
            for row, share in _parquet_rows(path) if path.suffix.lower() == ".parquet" else _arrow_rows(path):
                yield self._row(row, f"{path}:{number - self.first + 1}", number, int(share * size))
                number += 1
        except (ArrowException, ValueError, OSError) as error:
            detail = f"the rest of the file cannot be read: {error}"
            yield Unread(number, f"{path}:{number - self.first + 1}", str(path), "damaged", detail, position=size)

    def _row(self, row: dict[str, Any], where: str, number: int, position: int) -> Record | Unread:
        text = row.pop(self.text_field, None)
        if not isinstance(text, str):
            known = ", ".join(map(repr, row)) or "no field"
            detail = f'"{self.text_field}" must be a text; it has {known}: name one with text_field'
            return Unread(number, where, self.file, "damaged", detail, position=position)
        if _deeper(row.values(), DEEPEST):
            detail = f"its fields are nested more than {DEEPEST} deep"
            return Unread(number, where, self.file, "damaged", detail, position=position)
        if len(text) > self.limits.record_bytes:
            detail = f"{len(text):,} characters; {self.limits.record_bytes:,} are read"
            return Unread(number, where, self.file, "too large", detail, position=position)
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # "\ud800" is valid JSON
        name = str(row.pop("id", where))
        return Record(number, name, self.file, TEXT, text, _facts(row), position)


def _deeper(values: Iterable[Any], most: int) -> bool:
    """Whether lists and tables are nested in each other more than so deep."""
    level = [value for value in values if isinstance(value, dict | list)]
    for _ in range(most):
        inner = (child for value in level for child in (value.values() if isinstance(value, dict) else value))
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with url, date and licence under one name."""
    facts = dict(row)
    for fact, names in FACTS.items():
        given = next((facts[name] for name in names if isinstance(facts.get(name), str) and facts[name]), None)
        if given is not None:
            facts[fact] = given
    return facts


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], float]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(path)
    done, total = 0, max(1, table.metadata.num_rows)
    for batch in table.iter_batches(batch_size=ROWS):
        for row in batch.to_pylist():
            done += 1
            yield row, done / total


def _arrow_rows(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], float]]:
    """Of Hugging Face's save_to_disk, which are streams; or of an arrow file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        size = max(1, source.size())
        begin = source.read(6)
        source.seek(0)
        if begin == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            for begin_row in range(0, len(batch), ROWS):
                for row in batch.slice(begin_row, ROWS).to_pylist():
                    yield row, source.tell() / size
