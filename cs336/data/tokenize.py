"""Documents to token shards: each document's ids, then the end-of-text token."""

import contextlib
import itertools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cs336.data.corpus import in_validation
from cs336.utils.batching import batches
from cs336.utils.documents import Document, text_of
from cs336.utils.files import Paths, path_list, write_json
from cs336.utils.locks import locked
from cs336.utils.shards import SHARD_TOKENS, ShardWriter, TokenMeta, read_meta
from cs336.utils.special_tokens import END_OF_TEXT

BATCH_CHARS = 8 << 20  # enough work for every thread, little enough memory
SAVE_SECONDS = 5.0  # between two records of how far it is: the most that a kill costs


class Encoder(Protocol):
    """What is needed of a tokenizer: cs336.tokenizer.Tokenizer has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...

    def encode_documents(self, texts: list[str], eot_token: str) -> tuple[np.ndarray, int]:
        """Ids of all texts, each followed by eot_token, and the bytes of the texts."""

    def save(self, path: str | os.PathLike) -> None: ...


def tokenize_documents(
    documents: Iterable[Document | str],
    tokenizer: Encoder,
    directory: str | os.PathLike,
    *,
    eot_token: str = END_OF_TEXT,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> TokenMeta:
    """Write documents as a directory of shards, the tokenizer beside them, and return its sidecar.

    The same call goes on where one that was killed stopped, and leaves the same bytes.
    Raises ValueError if there is no document, or if the tokenizer has no eot_token; RuntimeError if another process
    writes there.
    """
    writers = {"": _writer(directory, tokenizer, eot_token, shard_tokens)}
    settings = _settings(tokenizer, eot_token, shard_tokens)
    with Encoding(directory, writers, tokenizer, eot_token, settings, progress) as encoding:
        encoding.run(documents, lambda document: "")
        if not writers[""].meta.documents:
            raise ValueError("there are no documents to tokenize: the source is empty or holds only white space")
    return writers[""].meta


def tokenize_corpus(
    documents: Iterable[Document | str],
    tokenizer: Encoder,
    directory: str | os.PathLike,
    *,
    val_fraction: float = 0.02,
    seed: int = 0,
    eot_token: str = END_OF_TEXT,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> tuple[TokenMeta, TokenMeta]:
    """Write DIRECTORY/train and DIRECTORY/val in one pass, split by cs336.data.corpus.in_validation.

    Returns both sidecars. Raises ValueError if either side has no document, and as `tokenize_documents`, whose way with
    a call that was killed it shares.
    """
    directory = pathlib.Path(directory)
    writers = {side: _writer(directory / side, tokenizer, eot_token, shard_tokens) for side in ("train", "val")}
    settings = _settings(tokenizer, eot_token, shard_tokens) | {"val_fraction": val_fraction, "seed": seed}
    with Encoding(directory, writers, tokenizer, eot_token, settings, progress) as encoding:
        encoding.run(documents, lambda document: "val" if in_validation(document, val_fraction, seed) else "train")
        train, val = (writers[side].meta for side in writers)
        for name, meta in (("training", train), ("validation", val)):
            if not meta.documents:
                raise ValueError(
                    f"no {name} document: {train.documents + val.documents} documents in all, of which a "
                    f"fraction {val_fraction} is held out; give more documents, another fraction, or 0 for one "
                    "directory of shards (--val-fraction of `cs336 tokenizer encode`, val_fraction of a recipe)"
                )
    return writers["train"].meta, writers["val"].meta


class Encoding:
    """One pass over documents into writers of shards, which a later process can continue.

    DIRECTORY/.encoding.json says how far it is: the settings, how many documents are done, a checksum of their text,
    and the writers' states. Settings must be the same for it to be taken up.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        writers: dict[str, ShardWriter],
        tokenizer: Encoder,
        eot_token: str,
        settings: dict[str, Any],
        progress: bool,
    ):
        self.directory, self.writers = pathlib.Path(directory), writers
        self.tokenizer, self.eot_token, self.settings = tokenizer, eot_token, settings
        self.path = self.directory / ".encoding.json"
        self.done, self.checksum = 0, 0
        self.console = Console(stderr=True, highlight=False)
        self.progress = progress
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Encoding":
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.directory, advice="encode into another directory"))
            for writer in self.writers.values():
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.path.unlink(missing_ok=True)  # first: what takes its place is no longer unfinished
        self._stack.__exit__(kind, error, trace)

    def run(self, documents: Iterable[Document | str], side: Callable[[str], str]) -> None:
        """Encode each document into the writer that `side` names."""
        if isinstance(documents, str | bytes | os.PathLike):
            raise ValueError(f"expected a list of documents, got one text or path: {type(documents).__name__}")
        texts_of = map(text_of, documents)
        self._continue(texts_of)
        saved = time.monotonic()
        for batch in _batches(texts_of, self.console, self.progress):
            sides = [side(document) for document in batch]
            for name, writer in self.writers.items():
                if texts := [d for d, its in zip(batch, sides, strict=True) if its == name]:
                    ids, num_bytes = self.tokenizer.encode_documents(texts, self.eot_token)
                    writer.write(ids, documents=len(texts), text_bytes=num_bytes)
            self._count(batch)
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._save()
                saved = time.monotonic()

    def _count(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.done += 1
            self.checksum = zlib.crc32(f"{len(text)} {text}".encode("utf-8", "surrogatepass"), self.checksum)

    def _save(self) -> None:
        states = {name: writer.state_dict() for name, writer in self.writers.items()}
        state = {"settings": self.settings, "documents": self.done, "checksum": self.checksum, "writers": states}
        write_json(self.path, state)

    def _continue(self, documents: Iterator[str]) -> None:
        """Pass over what an earlier process has done. Raises ValueError if these are other documents."""
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        if state["settings"] != self.settings:
            return
        if not all(writer.load_state_dict(state["writers"][name]) for name, writer in self.writers.items()):
            raise ValueError(self._forget("a part of its shards is not there any more"))
        self._count(itertools.islice(documents, state["documents"]))
        if (self.done, self.checksum) != (state["documents"], state["checksum"]):
            raise ValueError(self._forget("it was of other documents"))
        if self.progress:
            self.console.print(f"continuing after {self.done:,} documents that were encoded before")

    def _forget(self, why: str) -> str:
        self.path.unlink()
        return (
            f"{self.directory} held an encoding that was stopped, and {why}: run the same command again to begin anew"
        )


def _settings(tokenizer: Encoder, eot_token: str, shard_tokens: int) -> dict[str, Any]:
    return {"tokenizer": tokenizer.fingerprint, "eot_token": eot_token, "shard_tokens": shard_tokens}


def tokenizer_of(shards: Paths) -> pathlib.Path | None:
    """The tokenizer.json that lies beside token shards; None if none does. See TokenMeta.tokenizer_file."""
    for path in path_list(shards):
        if path.is_dir() and (name := read_meta(path).tokenizer_file):
            return path / name
    return None


def _writer(directory: str | os.PathLike, tokenizer: Encoder, eot_token: str, shard_tokens: int) -> ShardWriter:
    if eot_token not in tokenizer.special_tokens:
        specials = list(tokenizer.special_tokens)
        known = ", ".join(specials[:8]) + (f" and {len(specials) - 8} more" if len(specials) > 8 else "") or "none"
        raise ValueError(
            f"the tokenizer has no special token {eot_token!r} (it has: {known}); train it with one, or give the token "
            "that ends a document: --eot-token, eot_token=..."
        )
    return ShardWriter(
        directory,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        eot_id=tokenizer.special_tokens[eot_token],
        shard_tokens=shard_tokens,
        save_tokenizer=tokenizer.save,
    )


def _batches(documents: Iterable[str], console: Console, progress: bool) -> Iterator[list[str]]:
    columns = SpinnerColumn(), TextColumn("tokenizing: {task.fields[note]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", note="0 documents")
        count = chars = 0
        for batch in batches(documents, BATCH_CHARS):
            yield batch
            count += len(batch)
            chars += sum(map(len, batch))
            bar.update(task, note=f"{count:,} documents, {chars / 1e6:,.0f} M characters")
