"""Token shards: llm.c's .bin files, memory-mapped, and a sidecar that says which tokenizer made them.

    DIR/00000.bin, 00001.bin, ...  a header of 256 int32 (magic, version, number of tokens), then the tokens
    DIR/meta.json                  written last: a directory without it is unfinished

Everything is little-endian. Tokens are uint16 where the vocabulary fits, else uint32.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from cs336.utils.files import Paths, is_name, path_list, replacing, write_json

HEADER = 256  # int32
FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
MAGIC = {dtype: (magic, version) for magic, (version, dtype) in FORMATS.items()}
META, TOKENIZER = "meta.json", "tokenizer.json"
SHARD_TOKENS = 100_000_000
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in int32


@dataclasses.dataclass(frozen=True)
class TokenMeta:
    """What meta.json says of a directory of shards."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    vocab_size: int
    """Every token is below it."""
    eot_id: int
    """Stands after each document."""
    documents: int
    tokens: int
    """End-of-text tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    shards: tuple[str, ...]
    """File names, in order."""
    tokenizer_file: str | None = None
    """The tokenizer itself, in the same directory."""
    format: int = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds every id below vocab_size."""
    if not 0 < vocab_size <= 2**32:
        raise ValueError(f"vocab_size must be in 1..2**32, got {vocab_size}")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """Memory-map one shard: (tokens,) uint16 or uint32, read-only.

    Raises ValueError, naming the file, if its header, version or length is wrong.
    """
    size = os.path.getsize(path)
    if size < 4 * HEADER:
        raise ValueError(f"{path}: a token shard begins with a header of {4 * HEADER} bytes, the file has {size}")
    magic, version, count = (int(v) for v in np.fromfile(path, "<i4", 3))
    if magic not in FORMATS:
        raise ValueError(
            f"{path}: not a token shard: its magic number is {magic}, expected {' or '.join(map(str, FORMATS))}"
        )
    wanted, dtype = FORMATS[magic]
    if version != wanted:
        raise ValueError(f"{path}: version {version} of the shard format, expected {wanted}")
    expected = 4 * HEADER + count * dtype.itemsize
    if count < 0 or size != expected:
        raise ValueError(f"{path}: the header promises {count} tokens, {expected} bytes in all; the file has {size}")
    if count == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", offset=4 * HEADER, shape=(count,))


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> None:
    """Write tokens (N,) uint16 or uint32 as one shard, atomically. Raises ValueError for another dtype or shape."""
    tokens = np.asarray(tokens)
    dtype = tokens.dtype.newbyteorder("<")
    if tokens.ndim != 1 or dtype not in MAGIC:
        raise ValueError(f"tokens must be 1-D uint16 or uint32, got shape {tokens.shape} {tokens.dtype}")
    with replacing(path, "wb") as file:
        file.write(_header(dtype, len(tokens)))
        file.write(np.ascontiguousarray(tokens, dtype).data)


def _header(dtype: np.dtype, count: int) -> bytes:
    if count > MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds at most {MAX_SHARD_TOKENS} tokens, got {count}: split it")
    header = np.zeros(HEADER, "<i4")
    header[:3] = *MAGIC[dtype], count
    return header.tobytes()


class ShardWriter:
    """Write a stream of tokens as a directory of shards.

        with ShardWriter("tokens/train", vocab_size=50257, tokenizer=fingerprint, eot_id=50256) as writer:
            writer.write(ids, documents=1, text_bytes=len(text.encode()))
        writer.meta

    Shards are written into DIR/.unfinished. When the block ends they take the place of those that the directory held;
    if it raises, or the process dies before it ends, those are as they were. One writer at a time.

    What `state_dict` returned lets a later writer go on from there, after an error or the death of the process:
    `load_state_dict`. Once it has been asked for, an error leaves the unfinished shards where they are.

    save_tokenizer: called with a path when all is written; that file then travels with the shards.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        vocab_size: int,
        tokenizer: str,
        eot_id: int,
        shard_tokens: int = SHARD_TOKENS,
        save_tokenizer: Callable[[str | os.PathLike], None] | None = None,
    ):
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens must be in 1..{MAX_SHARD_TOKENS}, got {shard_tokens}")
        self.dtype = token_dtype(vocab_size)
        self.directory = pathlib.Path(directory)
        self.shard_tokens = shard_tokens
        self.meta = TokenMeta(tokenizer, vocab_size, eot_id, documents=0, tokens=0, text_bytes=0, shards=())
        self._save_tokenizer = save_tokenizer
        self._file: IO[bytes] | None = None  # the shard being written
        self._filled = 0
        self._unfinished = self.directory / ".unfinished"
        self._begun = False
        self._kept = False  # what is unfinished may be continued

    def write(self, ids: np.ndarray, *, documents: int = 0, text_bytes: int = 0) -> None:
        """Append ids (N,), which hold `documents` documents of `text_bytes` bytes of text.

        Raises ValueError if an id is negative or not below vocab_size.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"ids must be 1-D integers, got shape {ids.shape} {ids.dtype}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.meta.vocab_size:
            raise ValueError(f"ids must be in 0..{self.meta.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
        rest = np.ascontiguousarray(ids, self.dtype)
        while len(rest):
            head, rest = np.split(rest, [self.shard_tokens - self._filled])
            with self._named():
                self._begin_shard().write(head.data)
                self._filled += len(head)
                if self._filled == self.shard_tokens:
                    self._finish_shard()
        self.meta = dataclasses.replace(
            self.meta,
            documents=self.meta.documents + documents,
            tokens=self.meta.tokens + len(ids),
            text_bytes=self.meta.text_bytes + text_bytes,
        )

    def close(self) -> TokenMeta:
        """Finish the last shard, put all in their place, and write meta.json."""
        self._begin()
        if self._file is not None:
            with self._named():
                self._finish_shard()
        (self.directory / META).unlink(missing_ok=True)  # first: from here on the directory is unfinished
        for path in self.directory.glob("*.bin"):
            if path.stem.isdecimal():  # not another's 2024-01.bin
                path.unlink()
        for name in self.meta.shards:
            (self._unfinished / name).rename(self.directory / name)
        self._unfinished.rmdir()
        if self._save_tokenizer is not None:
            self._save_tokenizer(self.directory / TOKENIZER)
            self.meta = dataclasses.replace(self.meta, tokenizer_file=TOKENIZER)
        write_json(self.directory / META, dataclasses.asdict(self.meta), indent=2)
        return self.meta

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what was to be written still, where that was what failed
                self._file.close()
        if self._begun and not self._kept:
            shutil.rmtree(self._unfinished)

    def state_dict(self) -> dict[str, Any]:
        """How far the shards are, as JSON values. What is written so far is on the disk when this returns."""
        self._begin()
        if self._file is not None:
            with self._named():
                self._file.flush()
                os.fsync(self._file.fileno())
        self._kept = True
        return {"meta": dataclasses.asdict(self.meta), "filled": self._filled}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on where another writer of the same settings was. False, and nothing has changed, where its shards are not
        there any more."""
        meta = TokenMeta(**(state["meta"] | {"shards": tuple(state["meta"]["shards"])}))
        sizes = [4 * HEADER + self.shard_tokens * self.dtype.itemsize] * len(meta.shards)
        if state["filled"]:
            sizes[-1] = 4 * HEADER + state["filled"] * self.dtype.itemsize
        paths = [self._unfinished / name for name in meta.shards]
        if not all(path.exists() and path.stat().st_size >= size for path, size in zip(paths, sizes, strict=True)):
            return False
        self.meta, self._filled, self._begun, self._kept = meta, state["filled"], True, True
        for path in self._unfinished.iterdir():
            if path not in paths:  # begun later
                path.unlink()
        if self._filled:
            self._file = open(paths[-1], "r+b")  # noqa: SIM115 (open until the shard is full)
            self._file.truncate(sizes[-1])
            self._file.seek(sizes[-1])
        return True

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk names no file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or os.fspath(self.directory)
            raise

    def _begin(self) -> None:
        if not self._begun:
            if self._unfinished.exists():  # of a process that died
                shutil.rmtree(self._unfinished)
            self._unfinished.mkdir(parents=True)
            self._begun = True

    def _begin_shard(self) -> IO[bytes]:
        self._begin()
        if self._file is None:
            name = f"{len(self.meta.shards):05d}.bin"
            self._file = open(self._unfinished / name, "wb")  # noqa: SIM115 (open until the shard is full)
            self._file.write(_header(self.dtype, 0))
            self.meta = dataclasses.replace(self.meta, shards=(*self.meta.shards, name))
        return self._file

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(_header(self.dtype, self._filled))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file, self._filled = None, 0


def shards_are_whole(directory: str | os.PathLike) -> bool:
    """Whether the files that a directory's sidecar names are there."""
    try:
        meta = read_meta(directory)
    except (OSError, ValueError):
        return False
    names = [*meta.shards, *([meta.tokenizer_file] if meta.tokenizer_file else [])]
    return all((pathlib.Path(directory) / name).exists() for name in names)


def read_meta(directory: str | os.PathLike) -> TokenMeta:
    """The sidecar of a directory of shards. Raises ValueError if it is missing, damaged or of another version."""
    path = pathlib.Path(directory) / META
    if not path.exists():
        inside = sorted(str(found.parent) for found in pathlib.Path(directory).glob(f"*/{META}"))
        advice = f"did you mean {' or '.join(inside)}?" if inside else "tokenize the corpus again"
        if not os.path.exists(directory):
            raise ValueError(
                f"{directory} has no {META}, for it does not exist: `cs336 tokenizer encode --shards` makes it"
            )
        raise ValueError(f"{directory} has no {META}: it is unfinished or holds no tokens; {advice}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != TokenMeta.format:
            raise ValueError(f"format {found.get('format')!r}, expected {TokenMeta.format}")
        if not isinstance(found["shards"], list):
            raise ValueError(f"shards must be a list of names, got {found['shards']!r:.80}")
        meta = TokenMeta(**(found | {"shards": tuple(found["shards"])}))
        _check_meta(meta)
        return meta
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({error}); tokenize the corpus again") from None


def _check_meta(meta: TokenMeta) -> None:
    """Raises ValueError for a field of another kind, and for a file that is not in the directory itself."""
    for name in ("vocab_size", "eot_id", "documents", "tokens", "text_bytes"):
        value = getattr(meta, name)
        if type(value) is not int or value < (name == "vocab_size"):
            raise ValueError(f"{name} must be a whole number that counts, got {value!r:.80}")
    if not isinstance(meta.tokenizer, str):
        raise ValueError(f"tokenizer must be a fingerprint, got {meta.tokenizer!r:.80}")
    for file in (*meta.shards, *([] if meta.tokenizer_file is None else [meta.tokenizer_file])):
        if not is_name(file):
            raise ValueError(f"it names {file!r:.80}, which is no file of its directory")


def open_tokens(paths: Paths) -> tuple[list[np.ndarray], TokenMeta | None]:
    """Map every shard of a directory, a .bin file, or a list of either.

    Returns the shards in order, and one TokenMeta for all of them: None if some are bare .bin files.
    Raises ValueError if a directory does not hold the tokens its meta.json names, or if tokenizers differ.
    """
    shards: list[np.ndarray] = []
    metas: list[TokenMeta | None] = []
    for path in path_list(paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: expected a directory of token shards or a .bin file")
        meta = read_meta(path) if path.is_dir() else None
        found = [read_shard(path / name) for name in meta.shards] if meta else [read_shard(path)]
        if meta and sum(map(len, found)) != meta.tokens:
            raise ValueError(f"{path}: {META} counts {meta.tokens} tokens, the shards hold {sum(map(len, found))}")
        shards += found
        metas.append(meta)
    return shards, _merge(metas)


def shard_files(paths: Paths) -> list[pathlib.Path]:
    """The files of the shards that open_tokens maps, in the same order."""
    files: list[pathlib.Path] = []
    for path in path_list(paths):
        files += [path / name for name in read_meta(path).shards] if path.is_dir() else [path]
    return files


def _merge(metas: list[TokenMeta | None]) -> TokenMeta | None:
    known = [m for m in metas if m is not None]
    if len({m.tokenizer for m in known}) > 1:
        raise ValueError("these token directories were made by different tokenizers; tokenize them with one")
    if not known or len(known) < len(metas):
        return None
    return dataclasses.replace(
        known[0],
        documents=sum(m.documents for m in known),
        tokens=sum(m.tokens for m in known),
        text_bytes=sum(m.text_bytes for m in known),
        shards=tuple(name for m in known for name in m.shards),
    )
