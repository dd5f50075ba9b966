"""Documents from files: text, JSON lines, parquet, compressed or not, or a directory of them.

The order is that of the sorted paths, and of the lines in a file: the same on every machine. No torch here: the
tokenizer alone reads with this too.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from cs336.utils import zstd
from cs336.utils.files import Paths, path_list
from cs336.utils.special_tokens import END_OF_TEXT

PIECE_CHARS = 8192  # at least, of a document that is a part of a text
BLOCK_CHARS = 1 << 20  # a separator that matters shows up in the first block
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstd.open}
JSON_LINES = {".jsonl", ".ndjson"}
LONGEST_FIRST_LINE = 1 << 24  # bytes, of a `.json` file that may be JSON lines
LONGEST_LINE = 1 << 30  # bytes: a packed file of megabytes may be one line that no memory holds
TEXT_FIELD = "text"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from."""

    text: str
    id: str
    """The "id" that its file gives it, else the file and, of several, its number there: books.jsonl:3."""
    source: str
    """The file."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The other fields of a JSON line, the other columns of a parquet file."""


def text_of(document: Document | str) -> str:
    if isinstance(document, Document):
        return document.text
    if not isinstance(document, str):
        raise TypeError(f"a document must be a str or a Document, got {type(document).__name__}")
    return document


def holds_documents(path: str | os.PathLike, text_field: str = TEXT_FIELD) -> bool:
    """Whether a path is JSON lines, parquet or a directory, not one text."""
    path = pathlib.Path(path)
    return path.is_dir() or _suffix(path) == ".parquet" or _is_json_lines(path, text_field)


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
    """The bytes of a file; those of `.gz`, `.xz`, `.bz2` and `.zst` are unpacked as they are read."""
    return COMPRESSED.get(pathlib.Path(path).suffix.lower(), open)(path, "rb")  # type: ignore[operator]


def read_documents(
    paths: Paths,
    separator: str = END_OF_TEXT,
    *,
    text_field: str = TEXT_FIELD,
    metadata: bool = True,
    without: pathlib.Path | None = None,
) -> Iterator[Document]:
    """Yield the documents of a file, of every file below a directory, or of a list of either.

    - `.jsonl`, `.ndjson`, and `.json` whose first line is an object with a string in `text_field`: that of each line.
    - `.parquet`: the column `text_field`. Needs pyarrow: pip install 'cs336[data]'.
    - any other file is text: its parts between separators, or the whole file. A text file without a separator that is
      named on its own, or longer than a million characters, is cut at line ends into pieces of about 8192 characters,
      so that it can be split and shuffled, and fits in memory.
    - `.gz`, `.xz`, `.bz2` and `.zst` around text or JSON lines are unpacked on the way. `.zst` needs zstandard:
      pip install 'cs336[data]'.

    In a directory hidden files, `__pycache__`, binary files and the directory `without` are passed over. Bytes that are
    not UTF-8 become U+FFFD. Documents without a visible character are dropped.

    metadata: False leaves the other fields and columns out; those of a parquet file are then not read.

    Raises FileNotFoundError, ImportError that names the extra, or ValueError that names the file and the line.
    """
    reader = _Reader(separator, text_field, metadata)
    for path in path_list(paths):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: expected a text, JSON lines or parquet file, or a directory"
            )
        found = reader.directory(path, without) if path.is_dir() else reader.file(path, alone=True)
        for document in found:
            if document.text and not document.text.isspace():
                yield document


def read_texts(paths: Paths, *, text_field: str = TEXT_FIELD, without: pathlib.Path | None = None) -> Iterator[str]:
    """The texts of read_documents, for a reader that asks for nothing else."""
    return (d.text for d in read_documents(paths, text_field=text_field, metadata=False, without=without))


def files_below(directory: str | os.PathLike, without: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """The files of a directory, in order, as `read_documents` takes them; binary ones too."""
    left_out = None if without is None else without.resolve()
    for root, folders, names in os.walk(pathlib.Path(directory), onerror=_raise):
        if pathlib.Path(root).resolve() == left_out:
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for path in (pathlib.Path(root, n) for n in sorted(names) if not n.startswith(".")):
            if path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _suffix(path: pathlib.Path) -> str:
    """The last that does not name a compression."""
    return next((s.lower() for s in reversed(path.suffixes) if s.lower() not in COMPRESSED), "")


def _is_json_lines(path: pathlib.Path, text_field: str) -> bool:
    """By the name; a `.json` file, which may also be a table of settings, by its first line."""
    if (suffix := _suffix(path)) != ".json":
        return suffix in JSON_LINES
    with unpacking(path), open_bytes(path) as file:
        try:
            row = parse_line(file.readline(LONGEST_FIRST_LINE))
        except (ValueError, RecursionError):
            return False
    return isinstance(row, dict) and isinstance(row.get(text_field), str)


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def parse_line(line: bytes) -> Any:
    """The JSON value of a line, which may begin with a byte order mark. Raises ValueError or RecursionError."""
    return json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"))


@contextlib.contextmanager
def unpacking(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a damaged compressed file makes its reader raise into a ValueError that names the file."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is damaged: {error}") from None  # what gzip and bz2 raise


def is_binary(path: str | os.PathLike) -> bool:
    """Whether a zero byte is near the front of a file, unpacked. Raises ValueError if it cannot be unpacked."""
    with unpacking(path), open_bytes(path) as file:
        return b"\0" in file.read(8192)


def refuse_binary(path: str | os.PathLike) -> None:
    """Raises ValueError for a binary file."""
    if is_binary(path):
        raise ValueError(
            f"{path} is binary: expected text, .jsonl or .parquet (or text, .jsonl as .gz, .xz, .bz2, .zst)"
        )


@dataclass(frozen=True)
class _Reader:
    """How documents are told apart in a file."""

    separator: str
    text_field: str
    metadata: bool

    def directory(self, directory: pathlib.Path, without: pathlib.Path | None) -> Iterator[Document]:
        for path in files_below(directory, without):
            yield from self.file(path, alone=False)

    def file(self, path: pathlib.Path, alone: bool) -> Iterator[Document]:
        suffix = _suffix(path)
        with unpacking(path):
            if suffix == ".parquet":
                yield from self._parquet(path)
            elif _is_json_lines(path, self.text_field):
                yield from self._json_lines(path)
            else:
                if alone:
                    refuse_binary(path)
                elif is_binary(path):
                    return
                yield from self._text(path, alone)

    def _text(self, path: pathlib.Path, alone: bool) -> Iterator[Document]:
        with _open_text(path) as file:
            head = file.read(BLOCK_CHARS)
        if self.separator not in head and not alone and len(head) < BLOCK_CHARS:
            yield Document(head, str(path), str(path))
            return
        with _open_text(path) as file:
            texts = _split(file, self.separator) if self.separator in head else _cut(file)
            for number, text in enumerate(texts, 1):
                yield Document(text, f"{path}:{number}", str(path))

    def _json_lines(self, path: pathlib.Path) -> Iterator[Document]:
        name = self.text_field
        with open_bytes(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if is_blank(line):
                    continue
                where = f"{path}:{number}"
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"{where}: a line of more than {LONGEST_LINE:,} bytes, which is no document")
                try:
                    row = parse_line(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f'{where}: expected an object like {{"{name}": "..."}} ({error})') from None
                if not isinstance(row, dict) or name not in row:
                    known = f"it has {_names(row)}: name one with text_field" if isinstance(row, dict) else "it is none"
                    raise ValueError(f'{where}: expected an object like {{"{name}": "..."}}; {known}')
                text = row.pop(name)
                if not isinstance(text, str):
                    raise ValueError(f'{where}: "{name}" must be a string, got {type(text).__name__}')
                text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # "\ud800" is valid JSON
                yield Document(text, str(row.pop("id", where)), str(path), row if self.metadata else {})

    def _parquet(self, path: pathlib.Path) -> Iterator[Document]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise ImportError(f"reading {path} needs pyarrow: pip install 'cs336[data]'") from None
        try:
            table = parquet.ParquetFile(path)
        except ArrowException as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from None
        try:
            yield from self._rows(path, table)
        except (ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def _rows(self, path: pathlib.Path, table: Any) -> Iterator[Document]:
        names = table.schema_arrow.names
        if self.text_field not in names:
            raise ValueError(
                f'{path} has no column "{self.text_field}", only: {", ".join(names)}; name one with text_field'
            )
        wanted = None if self.metadata else [n for n in (self.text_field, "id") if n in names]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                text = row.pop(self.text_field)
                if not isinstance(text, str | None):
                    raise ValueError(
                        f'{path}: the column "{self.text_field}" must hold strings, got {type(text).__name__}'
                    )
                yield Document(text or "", str(row.pop("id", f"{path}:{number}")), str(path), row)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def _open_text(path: pathlib.Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace", newline="")


def _split(file: IO[str], separator: str) -> Iterator[str]:
    document: list[str] = []
    tail = ""  # may hold the beginning of a separator
    while block := file.read(BLOCK_CHARS):
        *whole, rest = (tail + block).split(separator)
        for text in whole:
            yield "".join(document) + text
            document = []
        end = max(0, len(rest) - len(separator) + 1)
        document.append(rest[:end])
        tail = rest[end:]
    yield "".join(document) + tail


def _cut(file: IO[str]) -> Iterator[str]:
    piece: list[str] = []
    chars = 0
    while line := file.readline(BLOCK_CHARS):
        piece.append(line)
        chars += len(line)
        if chars >= PIECE_CHARS:
            yield "".join(piece)
            piece, chars = [], 0
    yield "".join(piece)
