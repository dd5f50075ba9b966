"""Distillation as a job of stages: text to tokens, the teacher's top logits on disk, a student that learns them, and
what came of it on held-out text. The same call goes on where one that was stopped left off, bit for bit on a CPU."""

import functools
import json
import os
import pathlib
import shutil
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from cs336.compression.distillation import Distill, Divergence, TopLogits, kl_of_top
from cs336.data.loader import permute
from cs336.inference.load import find_model, load_model, load_tokenizer, read_config
from cs336.inference.quantization.windows import Windows, tokenize
from cs336.inference.vocabulary import check_same_tokens
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.models.huggingface import has_weights
from cs336.nn import is_quantized
from cs336.optim import AdamW, clip_scale, cosine_schedule, grad_norm
from cs336.training import load_checkpoint, save_checkpoint
from cs336.utils.device import pick
from cs336.utils.files import write_json
from cs336.utils.stages import Outcome, Stage, run_stages

SHARDS, TOPS, CHECKPOINT, RESULT = "calibration", "teacher", "checkpoint", "compression.json"
CHECKPOINTS = 10  # a run
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Distilled:
    """Held-out text: bits per byte, and nats a token from the teacher."""

    bits_teacher: float
    bits_before: float
    bits_after: float
    kl_before: float
    kl_after: float

    def __str__(self) -> str:
        bits = f"{self.bits_before:.4f} -> {self.bits_after:.4f} bits per byte, the teacher {self.bits_teacher:.4f}"
        return f"{bits}; {self.kl_before:.4f} -> {self.kl_after:.4f} nats from it"


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns. Raises ValueError for values out of range."""

    steps: int = 200
    batch_size: int = 8
    """Windows a step."""
    lr: float = 1e-4
    """At most: it warms up in a twentieth of the steps, and falls to a tenth along a cosine."""
    top_k: int = 64
    """Tokens that the teacher names in each place."""
    samples: int = 1024
    """Windows of the text that are read."""
    divergence: Divergence = "forward"
    cross_entropy: float = 0.0
    """Its share of the loss."""
    seed: int = 0

    def __post_init__(self):
        Distill(self.divergence, self.cross_entropy)
        for name in ("steps", "batch_size", "top_k", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0, got {self.lr}")


def distill(
    teacher: str | os.PathLike,
    student: str | os.PathLike,
    out: str | os.PathLike,
    *,
    calibrate: str | os.PathLike,
    config: DistillConfig | None = None,
    device: str = "auto",
) -> Distilled:
    """Write a student, a smaller model of the same tokenizer, that has learned from its teacher; every verb takes it.

    calibrate: text, JSON lines or parquet, a tenth of which is held out to measure.
    Raises FileNotFoundError where there is no model or text, ValueError for models of different tokenizers, and for a
    directory that holds files of these names which the job did not make; FloatingPointError where training diverges.
    """
    if not pathlib.Path(calibrate).exists():
        raise FileNotFoundError(f"{calibrate} does not exist: expected a text to learn from")
    places = find_model(teacher), find_model(student), pathlib.Path(out), pathlib.Path(calibrate)
    return _Job(*places, config or DistillConfig(), device).run()


@dataclass(frozen=True)
class _Job:
    teacher: pathlib.Path
    student: pathlib.Path
    out: pathlib.Path
    text: pathlib.Path
    config: DistillConfig
    device: str

    def run(self) -> Distilled:
        check_same_tokens(load_tokenizer(self.teacher), load_tokenizer(self.student), str(self.student))
        both, settings = (self.teacher, self.student, self.text), asdict(self.config)
        named = {name: settings[name] for name in ("top_k", "samples")}
        student, whole = (self._learn, ("config.json",), both, settings), functools.partial(has_weights, self.out)
        stages = [
            Stage("tokens", "text to learn from", self._tokenize, (f"{SHARDS}/meta.json",), both, kept=(SHARDS,)),
            Stage("teacher", "what it expects", self._expect, (f"{TOPS}/index.json",), both, named, kept=(TOPS,)),
            Stage("learn", "the student", *student, kept=(CHECKPOINT,), is_whole=whole),
            Stage("measure", "held-out text", self._measure, (RESULT,), both, settings),
        ]
        run_stages(self.out, stages)
        shutil.rmtree(self.out / CHECKPOINT, ignore_errors=True)  # the export has what it held
        return Distilled(**json.loads((self.out / RESULT).read_text(encoding="utf-8")))

    def _load(self, path: pathlib.Path) -> Transformer:
        return load_model(path, str(pick(self.device)), torch.float32)

    @functools.cached_property
    def _configs(self) -> list[TransformerConfig]:
        return [read_config(path) for path in (self.teacher, self.student)]

    @property
    def _vocab_size(self) -> int:
        """Of what both have: those of one tokenizer may be padded to other sizes."""
        return min(config.vocab_size for config in self._configs)

    @functools.cached_property
    def _windows(self) -> Windows:
        """Of what both can read."""
        return Windows(self.out / SHARDS, min(self._configs, key=lambda config: config.context_length))

    def _tokenize(self) -> Outcome:
        return Outcome(f"{tokenize(self.teacher, self.text, self.out / SHARDS):,} tokens")

    def _expect(self) -> Outcome:
        windows = self._windows
        read = windows.read(self.config.samples)
        ids = [windows.data.windows(np.array([i]))[0, :-1] for i in read]
        TopLogits(self.out / TOPS).write(self._load(self.teacher), ids, self.config.top_k, self._vocab_size)
        return Outcome(f"{len(read):,} windows of {windows.context:,} tokens, {self.config.top_k} logits each")

    def _learn(self) -> Outcome:
        config, windows, tops = self.config, self._windows, TopLogits(self.out / TOPS)
        student, read = self._load(self.student).train(), windows.read(config.samples)
        if is_quantized(student):
            raise ValueError(f"{self.student} is quantised, and would not learn: give the model that it was made of")
        optimizer = AdamW(student.parameters(), lr=config.lr, weight_decay=0.0)
        objective, path, step = Distill(config.divergence, config.cross_entropy), self.out / CHECKPOINT, 0
        if path.exists():
            step = load_checkpoint(path, student, optimizer)
        while step < config.steps:
            torch.manual_seed(config.seed + step)  # of dropout
            place = range(step * config.batch_size, (step + 1) * config.batch_size)
            rows = [int(permute(np.array([i % len(read)]), len(read), config.seed, i // len(read))[0]) for i in place]
            ids = windows.data.windows(read[rows])
            batch = (ids[:, :-1], ids[:, 1:], *tops.read(np.array(rows)))
            loss, count, _ = objective(student, tuple(x.to(student.device) for x in batch))
            loss.backward()
            norm = grad_norm(student.parameters()) / count
            if not norm.isfinite():
                raise FloatingPointError(f"step {step + 1}: the gradient is not finite: a lower lr may avoid it")
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(step, config.lr, config.lr / 10, config.steps / 20, config.steps)
            optimizer.step(grad_scale=clip_scale(norm, MAX_GRAD_NORM) / count)
            optimizer.zero_grad()
            step += 1
            if step % max(1, config.steps // CHECKPOINTS) == 0:
                save_checkpoint(student, optimizer, step, path)
        save_pretrained(student, self.out, load_tokenizer(self.student))
        return Outcome(f"{config.steps:,} steps of {config.batch_size} windows")

    @torch.inference_mode()
    def _measure(self) -> Outcome:
        windows, found = self._windows, dict[str, Any]()
        teacher = self._load(self.teacher)
        models = {"before": self._load(self.student), "after": self._load(self.out)}
        for name, model in {"teacher": teacher, **models}.items():
            found[f"bits_{name}"] = windows.bits_per_byte(model)
        for name, model in models.items():
            sums = []
            for i in windows.held_out:
                ids_1T = windows.data.windows(np.array([i]))[:, :-1].to(model.device)
                logits = (m(ids_1T)[..., : self._vocab_size] for m in (model, teacher))
                q, p = (x.log_softmax(-1, dtype=torch.float32) for x in logits)
                sums.append(float(kl_of_top(q, p).mean()))
            found[f"kl_{name}"] = sum(sums) / len(sums)
        write_json(self.out / RESULT, {field.name: found[field.name] for field in fields(Distilled)}, indent=2)
        return Outcome(str(Distilled(**found)))
