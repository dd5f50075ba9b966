"""What is measured and shown between steps: validation, samples. A run has a list of these."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from cs336.data import TokenDataset
from cs336.data.dataset import to_device
from cs336.models import Transformer
from cs336.parallel.launch import on_first
from cs336.training.budget import PAUSED_PART
from cs336.training.config import TrainConfig
from cs336.training.decisions import Pause
from cs336.training.division import Division
from cs336.training.learner import Learner
from cs336.training.objectives import Batch, Terms
from cs336.utils.terminal import visible

EVALS, SAMPLES = 20, 10  # a run, where the configuration does not say
MOST_TOKENS = 262_144  # of one validation, and of
LEAST_STEPS, MOST_STEPS = 2, 32  # steps' tokens, where the configuration does not say
FORWARD_PART = 0.5  # of a step's time, at most: what a forward pass of its batch takes

Sample = Callable[[Transformer], list[dict[str, Any]]]


@dataclass(frozen=True)
class Finding:
    metrics: dict[str, float] = field(default_factory=dict)
    """A row of metrics.jsonl."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Rows of samples.jsonl."""
    text: str = ""
    """For the terminal."""


class Evaluator(Protocol):
    pause: Pause

    def __call__(self, learner: Learner, total_steps: int) -> Finding:
        """Look at the model. total_steps: of the run, as first planned."""


class Validation:
    """Mean cross-entropy over part of the data: "val/loss" in nats per token, and "val/bpb" in bits per byte.

    The windows are spread evenly, whole batches of them, and the same each time, on however many ranks. Bits per byte
    need the data's sidecar.
    """

    def __init__(self, data: TokenDataset, config: TrainConfig):
        self.data, self.config = data, config
        self.size = min(config.micro_batch_size or config.batch_size, len(data))
        self.tokens_per_step = config.batch_size * data.context_length
        self.pause = Pause("validate", config.eval_interval, EVALS, self._steps)

    def __call__(self, learner: Learner, total_steps: int) -> Finding:
        with learner.evaluating():
            size = min(self.size, learner.micro_batch_size)
            windows, division = self.windows(total_steps), learner.division
            loss = mean_loss(learner.terms, self.data, windows, size, learner.device, division)
        metrics, text = {"val/loss": loss}, f"validation loss {loss:.4f}"
        meta = self.data.meta
        if meta is not None and meta.text_bytes:
            metrics["val/bpb"] = bits_per_byte(loss, meta.tokens, meta.text_bytes)
            text += f", {metrics['val/bpb']:.4f} bits per byte"
        return Finding(metrics, text=text)

    def windows(self, total_steps: int) -> int:
        """How many are read, in a run of so many steps: with the default, no more than a twentieth of them takes."""
        tokens, interval, affordable = self.config.eval_tokens, self.config.eval_interval, PAUSED_PART / FORWARD_PART
        if tokens is None:
            steps = affordable * (total_steps / EVALS if interval is None else interval or total_steps)
            if interval is None:  # rather seldom than of too little text
                steps = min(max(steps, LEAST_STEPS), affordable * total_steps)
            tokens = min(MOST_TOKENS, int(min(steps, MOST_STEPS) * self.tokens_per_step))
        count = min(len(self.data), max(self.size, tokens // self.data.context_length))
        return count // self.size * self.size

    def _steps(self, total_steps: int) -> float:
        return FORWARD_PART * self.windows(total_steps) * self.data.context_length / self.tokens_per_step


def mean_loss(
    terms: Callable[[Batch], Terms],
    data: TokenDataset,
    count: int,
    size: int,
    device: torch.device | str,
    division: Division | None = None,
) -> float:
    """Mean loss over `count` windows spread evenly over the data, `size` at a time: of an objective that minimises more
    than the cross-entropy, the cross-entropy alone, which is what a text costs.

    division: among ranks, each of which calls this. They make equally many calls of `terms`, in which they may wait
    for one another: one that has no windows left repeats some, which count for nothing.

    Raises ValueError where no target counts.
    """
    total = torch.zeros(2, device=device, dtype=torch.float64)
    parts = list(spread(len(data), count, size))
    mine, ranks = (0, 1) if division is None else division.row_place
    for i in range(mine, -(-len(parts) // ranks) * ranks, ranks):
        loss, counted, metrics = terms(to_device(data.windows(parts[i % len(parts)]), device))
        loss = metrics.get("cross_entropy", loss)
        if i < len(parts):
            total += torch.stack([loss.detach().double(), counted.double()])
    loss_sum, num_targets = (total if division is None else division.total(total)).tolist()
    if not num_targets:
        raise ValueError(f"{data.paths} has no targets that count: all are the ignore_index of the objective")
    return loss_sum / num_targets


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """How many bits a model needs for each byte of a text, whatever its tokens are. An arithmetic coder driven by the
    model would reach it (Shannon 1948), which makes a compressor a fair rival.

    loss: mean nats per token; tokens: of the text, end-of-text tokens included; num_bytes: of the text in UTF-8.
    """
    return loss * tokens / (math.log(2) * num_bytes)


def spread(windows: int, count: int, size: int) -> Iterator[np.ndarray]:
    """`count` of `windows` indices, evenly, in parts of `size`."""
    index_N = np.arange(count) * windows // count
    return iter(np.split(index_N, range(size, count, size)))


class Samples:
    """What the model writes: rows like {"prompt": ..., "text": ...} that `sample` returns, called in eval mode.

    Where there are several ranks, on the first.
    """

    def __init__(self, sample: Sample, config: TrainConfig):
        self.sample = sample
        self.pause = Pause("sample", config.sample_interval, SAMPLES)

    def __call__(self, learner: Learner, total_steps: int) -> Finding:
        with learner.division.whole() as whole, learner.evaluating(whole) as model:
            rows = on_first(lambda: self.sample(model))
        text = visible(f"{rows[0].get('prompt', '')}{rows[0].get('text', '')}") if rows else ""
        return Finding(samples=rows, text=text)
