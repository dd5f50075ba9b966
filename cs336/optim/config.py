"""Which optimizer and which schedule, as configurations. A new one is a class here and a member of its union."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import torch

from cs336.optim import schedules
from cs336.optim.adamw import AdamW, param_groups


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW; norms and biases do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be more than 0 (inf: never clip), got {self.max_grad_norm}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")

    def build(self, model: torch.nn.Module) -> AdamW:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        groups = param_groups(model, weight_decay=self.weight_decay)
        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


OptimizerConfig = AdamWConfig  # with a second: Annotated[AdamWConfig | ..., pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class _Warmup:
    """What the schedules share."""

    warmup_steps: int | None = None
    """Steps of linear warm-up, in a time budget at the speed measured first. None: a twentieth of the run."""

    def __post_init__(self):
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a run of `total`."""
        return total // 20 if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class _Decaying(_Warmup):
    min_lr_ratio: float = 0.1
    """Learning rate at the end, over the highest."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in 0..1, got {self.min_lr_ratio}")


@dataclass(frozen=True)
class CosineConfig(_Decaying):
    """Half a cosine down to the end."""

    kind: Literal["cosine"] = "cosine"

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        low, warmup = top * self.min_lr_ratio, self.warmup(total)
        return schedules.cosine_schedule(step, max_lr=top, min_lr=low, warmup_steps=warmup, total_steps=total)


@dataclass(frozen=True)
class LinearConfig(_Decaying):
    """A straight line down to the end."""

    kind: Literal["linear"] = "linear"

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        low, warmup = top * self.min_lr_ratio, self.warmup(total)
        return schedules.linear_schedule(step, max_lr=top, min_lr=low, warmup_steps=warmup, total_steps=total)


@dataclass(frozen=True)
class WSDConfig(_Decaying):
    """Warm-up, stable, decay: at the top until the last part of the run."""

    kind: Literal["wsd"] = "wsd"
    decay_part: float = 0.2
    """Of the run, at its end, in which the learning rate falls."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay_part <= 1:
            raise ValueError(f"decay_part must be in 0..1, got {self.decay_part}")

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        low, warmup = top * self.min_lr_ratio, self.warmup(total)
        decay = min(self.decay_part * total, total - warmup)
        return schedules.wsd_schedule(
            step, max_lr=top, min_lr=low, warmup_steps=warmup, decay_steps=decay, total_steps=total
        )


@dataclass(frozen=True)
class ConstantConfig(_Warmup):
    """At the top after the warm-up, for ever."""

    kind: Literal["constant"] = "constant"

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        return schedules.constant_schedule(step, max_lr=top, warmup_steps=self.warmup(total))


ScheduleConfig = Annotated[
    CosineConfig | LinearConfig | WSDConfig | ConstantConfig, pydantic.Field(discriminator="kind")
]
