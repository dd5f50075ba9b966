"""Pruning as a job of stages: calibration text to tokens, a smaller model, and what that cost on text that it did not
read. The same call goes on where one that was stopped left off."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cs336.compression.narrowing import prune_depth, prune_width
from cs336.compression.pruning import prune_weights_, zeros
from cs336.inference.load import find_model, load_model, load_tokenizer
from cs336.inference.quantization.windows import Windows, tokenize
from cs336.models import Transformer, save_pretrained
from cs336.models.huggingface import has_weights
from cs336.utils.device import pick
from cs336.utils.files import write_json
from cs336.utils.stages import Outcome, Stage, run_stages

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
    masks = method in ("magnitude", "wanda")
    for name, share in options.items():
        if not (share == "2:4" and masks) and (isinstance(share, str) or not 0 <= share < 1):
            raise ValueError(f"{name} must be {'2:4 or ' * masks}a share from 0 to below 1, got {share!r}")
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
        whole = functools.partial(has_weights, self.out)
        stages = [
            Stage("tokens", "calibration text", self._tokenize, (f"{SHARDS}/meta.json",), inputs, kept=(SHARDS,)),
            Stage("prune", self.method, self._prune, ("config.json",), inputs, settings, is_whole=whole),
            Stage("measure", "bits per byte", self._measure, (RESULT,), inputs, settings),
        ]
        run_stages(self.out, stages)
        return Pruned(**json.loads((self.out / RESULT).read_text(encoding="utf-8")))

    def _tokenize(self) -> Outcome:
        return Outcome(f"{tokenize(self.found, self.text, self.out / SHARDS):,} tokens")

    def _prune(self) -> Outcome:
        model = load_model(self.found, str(pick(self.device)))
        windows = Windows(self.out / SHARDS, model.config)
        smaller = METHODS[self.method](model, windows.batches(windows.read(self.samples)), **self.options)
        save_pretrained(smaller.cpu(), self.out, load_tokenizer(self.found))
        return Outcome(f"{len(windows.read(self.samples)):,} windows of {windows.context:,} tokens read")

    def _measure(self) -> Outcome:
        found: dict[str, Any] = {}
        for when, path in (("before", self.found), ("after", self.out)):
            model = load_model(path, str(pick(self.device)))
            found[f"bits_{when}"] = Windows(self.out / SHARDS, model.config).bits_per_byte(model)
            found[f"parameters_{when}"] = model.config.num_parameters()
        found["zeros"] = zeros(model)
        write_json(self.out / RESULT, found, indent=2)
        return Outcome(str(Pruned(**found)))
