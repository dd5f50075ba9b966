"""Pruning as a job of stages: calibration text to tokens, a smaller model, and what that cost on text that it did not
read. The same call goes on where one that was stopped left off."""

import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cs336.compression.narrowing import prune_depth, prune_width
from cs336.compression.pruning import prune_weights_, zeros
from cs336.data import TokenDataset, tokenize_documents
from cs336.inference.load import find_model, load_model, load_tokenizer
from cs336.models import Transformer, save_pretrained
from cs336.training.evaluators import bits_per_byte
from cs336.utils.device import pick
from cs336.utils.documents import read_texts
from cs336.utils.files import replacing
from cs336.utils.shards import read_meta
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.stages import Outcome, Stage, run_stages

MOST_CONTEXT = 2048  # tokens of a window
BATCH_TOKENS = 4096  # through a block at once
HELD_OUT = 10  # one window of so many is measured and not read
SHARDS, RESULT = "calibration", "compression.json"


@dataclass(frozen=True)
class Pruned:
    """What a model was and what became of it; bits per byte of calibration text that was held out."""

    bits_before: float
    bits_after: float
    parameters_before: int
    parameters_after: int
    zeros: float
    """The share of the linear layers' weights that are zero."""

    def __str__(self) -> str:
        weights = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, {self.zeros:.1%} zeros"
        return f"{weights}; {self.bits_before:.4f} -> {self.bits_after:.4f} bits per byte"


def prune(
    model: str | os.PathLike,
    out: str | os.PathLike,
    method: str,
    *,
    calibrate: str | os.PathLike,
    samples: int = 128,
    device: str = "auto",
    **options: Any,
) -> Pruned:
    """Write a pruned model, which every verb takes.

    Args:
        model: an export, a checkpoint or a run directory.
        out: the directory to write, new or of the same job.
        method: magnitude or wanda, with sparsity, a share or "2:4"; prune-depth with sparsity; prune-width with
            sparsity and head_sparsity.
        calibrate: text, JSON lines or parquet, a tenth of which is held out to measure.
        samples: windows of it that are read, of the model's context or 2048 tokens.

    Raises FileNotFoundError where there is no model or text, ValueError for options out of range and for a directory
    that holds files of these names which the job did not make.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    if not pathlib.Path(calibrate).exists():
        raise FileNotFoundError(f"{calibrate} does not exist: expected a text to calibrate with")
    return _Job(find_model(model), pathlib.Path(out), method, pathlib.Path(calibrate), samples, device, options).run()


def _masked(score, model: Transformer, batches: Sequence[Tensor], **options: Any) -> Transformer:
    return prune_weights_(model, score, batches=batches, **options)


METHODS: Mapping[str, Any] = {
    "magnitude": functools.partial(_masked, "magnitude"),
    "wanda": functools.partial(_masked, "wanda"),
    "prune-depth": lambda model, batches, **options: prune_depth(model, batches=batches, **options),
    "prune-width": lambda model, batches, **options: prune_width(model, batches=batches, **options),
}


@dataclass(frozen=True)
class _Job:
    found: pathlib.Path
    out: pathlib.Path
    method: str
    text: pathlib.Path
    samples: int
    device: str
    options: Mapping[str, Any]

    def run(self) -> Pruned:
        inputs = self.found, self.text
        settings = {"method": self.method, "samples": self.samples, **self.options}
        stages = [
            Stage("tokens", "calibration text", self._tokenize, (f"{SHARDS}/meta.json",), inputs, kept=(SHARDS,)),
            Stage("prune", self.method, self._prune, ("config.json",), inputs, settings),
            Stage("measure", "bits per byte", self._measure, (RESULT,), inputs, settings),
        ]
        run_stages(self.out, stages)
        return Pruned(**json.loads((self.out / RESULT).read_text(encoding="utf-8")))

    def _tokenize(self) -> Outcome:
        tokenizer, ends = load_tokenizer(self.found), load_model(self.found, "cpu").end_ids
        end = next((text for text, i in tokenizer.special_tokens.items() if i in ends), END_OF_TEXT)
        meta = tokenize_documents(read_texts(self.text), tokenizer, self.out / SHARDS, eot_token=end)
        return Outcome(f"{meta.tokens:,} tokens")

    def _prune(self) -> Outcome:
        model = load_model(self.found, str(pick(self.device)))
        windows = _Windows(self.out / SHARDS, model)
        smaller = METHODS[self.method](model, windows.batches(windows.read(self.samples)), **self.options)
        save_pretrained(smaller.cpu(), self.out, load_tokenizer(self.found))
        return Outcome(f"{len(windows.read(self.samples)):,} windows of {windows.context:,} tokens read")

    def _measure(self) -> Outcome:
        found: dict[str, Any] = {}
        for when, path in (("before", self.found), ("after", self.out)):
            model = load_model(path, str(pick(self.device)))
            found[f"bits_{when}"] = _Windows(self.out / SHARDS, model).bits_per_byte(model)
            found[f"parameters_{when}"] = model.config.num_parameters()
        found["zeros"] = zeros(model)
        with replacing(self.out / RESULT) as file:
            json.dump(found, file, indent=2)
        return Outcome(str(Pruned(**found)))


class _Windows:
    """Calibration text in windows, one of HELD_OUT of them set aside; a text of one window is read and measured."""

    def __init__(self, shards: pathlib.Path, model: Transformer):
        meta = read_meta(shards)
        assert meta is not None
        self.tokens, self.bytes = meta.tokens, meta.text_bytes
        self.context = max(1, min(model.config.context_length, MOST_CONTEXT, (meta.tokens - 1) // 2))
        self.data = TokenDataset(shards, self.context, vocab_size=model.config.vocab_size)
        self.held_out = np.arange(len(self.data))[HELD_OUT - 1 :: HELD_OUT]
        if not len(self.held_out):
            self.held_out = np.arange(len(self.data))[-1:]

    def read(self, samples: int) -> np.ndarray:
        """The windows to calibrate with, at most so many, spread evenly."""
        rest = np.setdiff1d(np.arange(len(self.data)), self.held_out)
        rest = rest if len(rest) else self.held_out
        return rest[np.unique(np.arange(samples) * len(rest) // samples)]

    def batches(self, index_N: np.ndarray) -> list[Tensor]:
        """Token ids (B, S) of windows, BATCH_TOKENS or one window at a time."""
        size = max(1, BATCH_TOKENS // self.context)
        parts = np.split(index_N, range(size, len(index_N), size))
        return [self.data.windows(part)[:, :-1] for part in parts]

    @torch.inference_mode()
    def bits_per_byte(self, model: Transformer) -> float:
        losses = []
        for index in self.held_out:
            ids_1T = self.data.windows(np.array([index])).to(model.device)
            losses.append(float(model(ids_1T[:, :-1], targets=ids_1T[:, 1:])))
        loss = math.fsum(losses) / (len(losses) * self.context)
        return bits_per_byte(loss, self.tokens, self.bytes)
