"""A trained model on held-out token shards: what evaluation.json says of it."""

import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from cs336.data import TokenDataset, tokenize_documents
from cs336.evaluation.baseline import MOST_COUNTED, Baseline, baselines
from cs336.evaluation.held_out import mean_loss
from cs336.models import Transformer
from cs336.training.evaluators import bits_per_byte
from cs336.utils.files import Paths, write_json
from cs336.utils.shards import TokenMeta, open_tokens

MOST_TOKENS = 150_000  # 5 s for a small model on two idle CPU cores, and more hardly changes the mean


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...
    def decode(self, ids: np.ndarray) -> str: ...


@dataclass(frozen=True)
class Evaluation:
    """Of one model on one text."""

    loss: float
    """Mean nats per token."""
    bits_per_byte: float
    text: str
    """Names it; "" is what the run held out."""
    how: str
    baselines: tuple[Baseline, ...]
    step: int | None = None
    """Of training, where the model is a run's."""

    def save(self, directory: str | os.PathLike) -> pathlib.Path:
        """Write evaluation.json into a directory, and return its path."""
        path = pathlib.Path(directory) / "evaluation.json"
        write_json(path, asdict(self), indent=2)
        return path


def evaluate(
    model: Transformer,
    tokenizer: Decoder,
    held_out: Paths,
    train: Paths | None = None,
    *,
    text: str = "",
    most_tokens: int = MOST_TOKENS,
    loss: float | None = None,
    step: int | None = None,
) -> Evaluation:
    """Loss and bits per byte over the windows of token shards, beside what needs no neural network.

    Args:
        held_out, train: token shards with their sidecar; without those the model was trained on there is no unigram.
        text: what the report calls the held-out text.
        most_tokens: read about no more than this, in windows spread evenly.
        loss: what validation found, so that it is not measured again.
        step: of training, of a run's model.

    Raises ValueError for shards of another tokenizer, without a sidecar, or too short for one window, and
    for most_tokens below 1.
    """
    context = model.config.context_length
    data = TokenDataset(held_out, context, vocab_size=model.config.vocab_size, tokenizer=tokenizer.fingerprint)
    if data.meta is None:
        raise ValueError(f"{held_out} has no meta.json, which counts the bytes of its text")
    how = f"{data.meta.documents:,} documents, {data.meta.text_bytes / 1e6:.2f} MB, read {context} tokens at a time"
    if loss is None:
        if most_tokens < 1:
            raise ValueError(f"at least 1 token has to be read, not {most_tokens}")
        windows = min(len(data), max(1, most_tokens // context))
        loss = mean_loss(model, data, most_windows=windows)
        if windows < len(data):
            how += f", {windows:,} of {len(data):,} such windows, spread evenly"
    train_text = None if train is None else _first(texts(train, tokenizer), MOST_COUNTED)
    others = baselines(train_text, texts(held_out, tokenizer), train, held_out)
    bits = bits_per_byte(loss, data.meta.tokens, data.meta.text_bytes)
    return Evaluation(loss, bits, text, how, tuple(others), step)


def evaluate_text(
    model: Transformer, tokenizer: Any, documents: Iterable[str], train: Paths | None = None, **options: Any
) -> Evaluation:
    """`evaluate` on documents. Raises ValueError, too, if there are none."""
    with tempfile.TemporaryDirectory() as shards:
        tokenize_documents(documents, tokenizer, shards, progress=True)
        try:
            return evaluate(model, tokenizer, shards, train, **options)
        except ValueError as error:
            raise ValueError(str(error).replace(shards, options.get("text") or "the text")) from None


def last_step(run_dir: str | os.PathLike) -> int | None:
    """The last step that a run's metrics.jsonl has; None without one."""
    return last_validation(run_dir)[0]


def last_validation(run_dir: str | os.PathLike) -> tuple[int | None, float | None]:
    """The last step that a run's metrics.jsonl has, and the loss that validation found there; None for what is not."""
    try:
        lines = (pathlib.Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[-8:]]  # a step has few
        step = rows[-1]["step"]
        return step, next((row["val/loss"] for row in rows if row.get("step") == step and "val/loss" in row), None)
    except (FileNotFoundError, IndexError, ValueError, KeyError):
        return None, None


def _first(documents: Iterable[str], size: int) -> Iterator[str]:
    """Documents until they hold `size` characters in all."""
    for document in documents:
        yield document
        size -= len(document)
        if size <= 0:
            return


def texts(paths: Paths, tokenizer: Decoder) -> Iterator[str]:
    """The documents of token shards, as text; one that lies across two files comes in two parts."""
    shards, meta = open_tokens(paths)
    if meta is None:
        raise ValueError(f"{paths} has no meta.json, which names the token that ends a document")
    return (text for shard in shards for text in _documents(shard, meta, tokenizer))


def _documents(shard: np.ndarray, meta: TokenMeta, tokenizer: Decoder) -> Iterator[str]:
    start = 0
    for end in (*np.flatnonzero(shard == meta.eot_id), len(shard)):
        yield tokenizer.decode(shard[start:end])
        start = end + 1
