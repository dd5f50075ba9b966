"""Documents to token shards: each document's ids, then the end-of-text token."""

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cs336.data.corpus import in_validation
from cs336.utils.batching import batches
from cs336.utils.files import Paths, path_list
from cs336.utils.shards import SHARD_TOKENS, ShardWriter, TokenMeta, read_meta
from cs336.utils.special_tokens import END_OF_TEXT

BATCH_CHARS = 8 << 20  # enough work for every thread, little enough memory


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


def tokenize_documents(
    documents: Iterable[str],
    tokenizer: Encoder,
    directory: str | os.PathLike,
    *,
    eot_token: str = END_OF_TEXT,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool = False,
) -> TokenMeta:
    """Write documents as a directory of shards and return its sidecar.

    Raises ValueError if there is no document, or if the tokenizer has no eot_token.
    """
    with _writer(directory, tokenizer, eot_token, shard_tokens) as writer:
        for batch in _batches(documents, progress):
            _write(writer, tokenizer, batch, eot_token)
        if not writer.meta.documents:
            raise ValueError("there are no documents to tokenize: the source is empty or holds only white space")
    return writer.meta


def tokenize_corpus(
    documents: Iterable[str],
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

    Returns both sidecars. Raises ValueError if either side has no document.
    """
    directory = pathlib.Path(directory)
    train = _writer(directory / "train", tokenizer, eot_token, shard_tokens)
    val = _writer(directory / "val", tokenizer, eot_token, shard_tokens)
    with train, val:
        for batch in _batches(documents, progress):
            held_out = [in_validation(d, val_fraction, seed) for d in batch]
            for writer, side in ((train, False), (val, True)):
                _write(writer, tokenizer, [d for d, out in zip(batch, held_out, strict=True) if out is side], eot_token)
        for name, writer in (("training", train), ("validation", val)):
            if not writer.meta.documents:
                raise ValueError(
                    f"no {name} document: {train.meta.documents + val.meta.documents} documents in all, of which a "
                    f"fraction {val_fraction} is held out; give more documents, another fraction, or 0 to "
                    "`cs336 tokenizer encode --val-fraction` for one directory of shards"
                )
    return train.meta, val.meta


def tokenizer_of(shards: Paths) -> pathlib.Path | None:
    """The tokenizer.json that lies beside token shards; None if none does. See TokenMeta.tokenizer_file."""
    for path in path_list(shards):
        if path.is_dir() and (name := read_meta(path).tokenizer_file):
            return path / name
    return None


def _writer(directory: str | os.PathLike, tokenizer: Encoder, eot_token: str, shard_tokens: int) -> ShardWriter:
    if eot_token not in tokenizer.special_tokens:
        known = ", ".join(tokenizer.special_tokens) or "none"
        raise ValueError(f"the tokenizer has no special token {eot_token!r} (it has: {known}); train it with one")
    return ShardWriter(
        directory,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        eot_id=tokenizer.special_tokens[eot_token],
        shard_tokens=shard_tokens,
    )


def _write(writer: ShardWriter, tokenizer: Encoder, texts: list[str], eot_token: str) -> None:
    if texts:
        ids, num_bytes = tokenizer.encode_documents(texts, eot_token)
        writer.write(ids, documents=len(texts), text_bytes=num_bytes)


def _batches(documents: Iterable[str], progress: bool) -> Iterator[list[str]]:
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("tokenizing: {task.fields[note]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", note="0 documents")
        count = chars = 0
        for batch in batches(documents, BATCH_CHARS):
            yield batch
            count += len(batch)
            chars += sum(map(len, batch))
            bar.update(task, note=f"{count:,} documents, {chars / 1e6:,.0f} M characters")
