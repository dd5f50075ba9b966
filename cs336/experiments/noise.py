"""The gradient noise scale of McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1), measured during a run.

For gradients of batches of b and of B sequences, with true gradient G and covariance trace S of one sequence's:

    |G|^2 ~ (B |G_B|^2 - b |G_b|^2) / (B - b)        S ~ (|G_b|^2 - |G_B|^2) / (1/b - 1/B)        B_simple = S / |G|^2

Both are unbiased and each alone is noisy, so they are averaged over measurements before they are divided. At a batch of
B_simple a step makes half of the progress of a step along the true gradient, from half of the sequences that it costs.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cs336.data import TokenDataset, TokenLoader
from cs336.nn.moe import forget_loads
from cs336.ops import registry
from cs336.training import TrainConfig
from cs336.training.decisions import Pause
from cs336.training.evaluators import Finding
from cs336.training.learner import Learner
from cs336.training.objectives import Batch

PARTS = 8  # small batches in a large one
TIMES = 40  # measurements a run
SEED = 0x6E6F6973  # of batches that training does not see in this order


@dataclass(frozen=True)
class NoiseScale:
    """One measurement, or the mean of several."""

    signal: float
    """|G|^2; a single estimate may be below zero."""
    noise: float
    """S, of one sequence."""

    @property
    def batch_size(self) -> float:
        """B_simple in sequences; infinity where no signal was seen."""
        return max(0.0, self.noise) / self.signal if self.signal > 0 else math.inf

    @staticmethod
    def of(small_norms: Sequence[float], large_norm: float, small: int) -> "NoiseScale":
        """From squared norms: of the gradients of batches of `small` sequences, and of the mean of them all."""
        count = len(small_norms)
        if count < 2:
            raise ValueError(f"two batches or more make a noise scale, got {count}")
        large, mean = small * count, sum(small_norms) / count
        signal = (large * large_norm - small * mean) / (large - small)
        return NoiseScale(signal, (mean - large_norm) / (1 / small - 1 / large))

    @staticmethod
    def mean(found: Sequence["NoiseScale"]) -> "NoiseScale":
        return NoiseScale(*(sum(part) / len(found) for part in zip(*map(dataclasses.astuple, found), strict=True)))


def measure(learner: Learner, batches: Sequence[Batch]) -> NoiseScale:
    """From equal batches, without a step: gradients are dropped. Raises ValueError for fewer than two."""
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    total: list[Tensor] = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    norms = []
    for batch in batches:
        learner.optimizer.zero_grad()
        loss, count, _ = learner.terms(batch)
        with registry.determinism(learner.deterministic):
            loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.float() / count for p in parameters]
        norms.append(_squared(gradients))
        torch._foreach_add_(total, gradients)
    learner.optimizer.zero_grad()
    forget_loads(learner.model)
    return NoiseScale.of(
        [norm.item() for norm in norms], _squared(total).item() / len(batches) ** 2, len(batches[0][0])
    )


def _squared(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()


class Noise:
    """An evaluator: rows "noise/signal" and "noise/noise" of a run. The batches are drawn apart from training's."""

    def __init__(self, data: TokenDataset, config: TrainConfig):
        self.small = max(1, config.batch_size // PARTS)
        self.loader = TokenLoader(data, self.small, seed=config.seed ^ SEED)
        self.pause = Pause("noise scale", None, TIMES, lambda total: 1.0)

    def __call__(self, learner: Learner, total_steps: int) -> Finding:
        batches = [tuple(t.to(learner.device) for t in next(self.loader)) for _ in range(PARTS)]
        found = measure(learner, batches)
        metrics = {"noise/signal": found.signal, "noise/noise": found.noise}
        return Finding(metrics, text=f"noise scale {found.batch_size:.3g} sequences, of one measurement")


def smoothed(rows: Sequence[dict[str, Any]], reach: int) -> list[tuple[int, float]]:
    """(step, B_simple) of each measurement in a run's rows, averaged with `reach` neighbours on either side."""
    found = [(row["step"], NoiseScale(row["noise/signal"], row["noise/noise"])) for row in rows if "noise/noise" in row]
    scales = [scale for _, scale in found]
    return [
        (step, NoiseScale.mean(scales[max(0, i - reach) : i + reach + 1]).batch_size)
        for i, (step, _) in enumerate(found)
    ]
