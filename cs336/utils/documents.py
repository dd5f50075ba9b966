"""Text from files: as documents, out of text, JSON lines, parquet, compressed or not, or a directory of them.

The order is that of the sorted paths, and of the lines in a file: the same on every machine.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO

from cs336.utils.files import Paths, path_list
from cs336.utils.special_tokens import END_OF_TEXT

PIECE_CHARS = 8192  # at least, of a document that is a part of a text
BLOCK_CHARS = 1 << 20  # a separator that matters shows up in the first block
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
JSON_LINES = {".jsonl", ".ndjson"}


def holds_documents(path: str | os.PathLike) -> bool:
    """Whether a path is JSON lines, parquet or a directory, not one text."""
    path = pathlib.Path(path)
    return path.is_dir() or _suffix(path) in JSON_LINES | {".parquet"}


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
    """The bytes of a file; those of `.gz`, `.xz` and `.bz2` are unpacked as they are read."""
    return COMPRESSED.get(pathlib.Path(path).suffix.lower(), open)(path, "rb")  # type: ignore[operator]


def read_documents(paths: Paths, separator: str = END_OF_TEXT, *, without: pathlib.Path | None = None) -> Iterator[str]:
    """Yield the documents of a file, of every file below a directory, or of a list of either.

    - `.jsonl`, `.ndjson`: the field "text" of each line.
    - `.parquet`: the column "text". Needs pyarrow: pip install 'cs336[data]'.
    - any other file is text: its parts between separators, or the whole file. A text file without a separator that is
      named on its own, or longer than a million characters, is cut at line ends into pieces of about 8192 characters,
      so that it can be split and shuffled, and fits in memory.
    - `.gz`, `.xz` and `.bz2` around text or JSON lines are unpacked on the way.

    In a directory hidden files, `__pycache__`, binary files and the directory `without` are passed over. Bytes that are
    not UTF-8 become U+FFFD. Documents without a visible character are dropped.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    for path in path_list(paths):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: expected a text, JSON lines or parquet file, or a directory"
            )
        files = _read_directory(path, separator, without) if path.is_dir() else _read_file(path, separator, alone=True)
        for text in files:
            if text and not text.isspace():
                yield text


def _read_directory(directory: pathlib.Path, separator: str, without: pathlib.Path | None) -> Iterator[str]:
    for path in files_below(directory, without):
        yield from _read_file(path, separator, alone=False)


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


def _read_file(path: pathlib.Path, separator: str, alone: bool) -> Iterator[str]:
    suffix = _suffix(path)
    with unpacking(path):
        if suffix == ".parquet":
            yield from _read_parquet(path)
        elif suffix in JSON_LINES:
            yield from _read_json_lines(path)
        else:
            if alone:
                refuse_binary(path)
            elif is_binary(path):
                return
            yield from _read_text(path, separator, alone)


def _suffix(path: pathlib.Path) -> str:
    """The last that does not name a compression."""
    return next((s.lower() for s in reversed(path.suffixes) if s.lower() not in COMPRESSED), "")


@contextlib.contextmanager
def unpacking(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a damaged .gz, .xz or .bz2 makes its reader raise into a ValueError that names the file."""
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
        raise ValueError(f"{path} is binary: expected text, .jsonl or .parquet (or text, .jsonl as .gz, .xz, .bz2)")


def _read_text(path: pathlib.Path, separator: str, alone: bool) -> Iterator[str]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", errors="replace", newline="") as file:
        head = file.read(BLOCK_CHARS)
        if separator not in head and not alone and len(head) < BLOCK_CHARS:
            yield head
            return
        file.seek(0)
        yield from _split(file, separator) if separator in head else _cut(file)


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


def _read_json_lines(path: pathlib.Path) -> Iterator[str]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8", "replace"))["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'{path}:{number}: expected an object like {{"text": "..."}} ({error!r})') from None
            if not isinstance(text, str):
                raise ValueError(f'{path}:{number}: "text" must be a string, got {type(text).__name__}')
            yield text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")  # "\ud800" is valid JSON


def _read_parquet(path: pathlib.Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'cs336[data]'") from None
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from None
    if "text" not in table.schema_arrow.names:
        raise ValueError(f'{path} has no column "text", only: {", ".join(table.schema_arrow.names)}')
    for batch in table.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise ValueError(f'{path}: the column "text" must hold strings, got {type(text).__name__}')
            yield text or ""
