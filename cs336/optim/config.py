"""Which optimizer and which schedule, as configurations. A new one is a class here and a member of its union."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch

from cs336.optim import schedules
from cs336.optim.adamw import AdamW, param_groups, scaled_groups
from cs336.optim.lion import Lion
from cs336.optim.muon import Muon, Orthogonalization, muon_param_groups
from cs336.optim.rounding import Rounding
from cs336.optim.schedules import Decay
from cs336.optim.sgd import SGD
from cs336.optim.soap import SOAP


class _Checked:
    """What the optimizers' configurations refuse."""

    def __post_init__(self):
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= getattr(self, name, 0) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("weight_decay_end", "momentum"):
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:  # type: ignore[attr-defined]
            raise ValueError(f"max_grad_norm must be more than 0 (inf: never clip), got {self.max_grad_norm}")  # type: ignore[attr-defined]
        betas = getattr(self, "betas", ())
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(betas)}")
        for name in ("ns_steps", "frequency", "max_dim"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class AdamWConfig(_Checked):
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
    weight_decay_end: float = 1.0
    """Weight decay at the end of the run, over that at its start; in between it goes in a straight line."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the moments."""
    rounding: Rounding = "remainder"
    """Of weights that are bfloat16 (precision = "bf16_weights"): see cs336.optim.rounding."""

    def build(self, model: torch.nn.Module) -> AdamW:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        groups = scaled_groups(param_groups(model, weight_decay=self.weight_decay), model)
        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, **_storage(self, model))


@dataclass(frozen=True)
class MuonConfig(_Checked):
    """Muon for the matrices of linear layers, AdamW for embeddings, head and vectors, under one learning rate."""

    kind: Literal["muon"] = "muon"
    lr: float = 3e-3
    """Highest learning rate."""
    momentum: float = 0.95
    nesterov: bool = True
    method: Orthogonalization = "polar_express"
    """polar_express, or newton_schulz: the classic quintic iteration."""
    ns_steps: int = 5
    """Of the iteration."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of all but norms and biases."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""
    weight_decay_end: float = 1.0
    """Weight decay at the end of the run, over that at its start; in between it goes in a straight line."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's moments."""
    rounding: Rounding = "remainder"
    """Of weights that are bfloat16 (precision = "bf16_weights"): see cs336.optim.rounding."""

    def build(self, model: torch.nn.Module) -> Muon:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        _check_unscaled(self.kind, model)
        return Muon(
            muon_param_groups(model, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            method=self.method,
            ns_steps=self.ns_steps,
            betas=self.betas,
            eps=self.eps,
            **_storage(self, model),
        )


@dataclass(frozen=True)
class SOAPConfig(_Checked):
    """SOAP for the matrices of linear layers, AdamW for the rest, under one learning rate."""

    kind: Literal["soap"] = "soap"
    lr: float = 3e-3
    """Highest learning rate."""
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Of all but norms and biases."""
    frequency: int = 10
    """Steps between two updates of the bases."""
    max_dim: int = 8192
    """A side longer than this has no basis of its own."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""
    weight_decay_end: float = 1.0
    """Weight decay at the end of the run, over that at its start; in between it goes in a straight line."""

    def build(self, model: torch.nn.Module) -> SOAP:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        _check_unscaled(self.kind, model)
        groups = muon_param_groups(model, self.weight_decay)
        return SOAP(groups, lr=self.lr, betas=self.betas, eps=self.eps, frequency=self.frequency, max_dim=self.max_dim)


@dataclass(frozen=True)
class LionConfig(_Checked):
    """Lion; norms and biases do not decay."""

    kind: Literal["lion"] = "lion"
    lr: float = 3e-4
    """Highest learning rate: how far each element moves in a step."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.3
    """Of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""
    weight_decay_end: float = 1.0
    """Weight decay at the end of the run, over that at its start; in between it goes in a straight line."""

    def build(self, model: torch.nn.Module) -> Lion:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        _check_unscaled(self.kind, model)
        return Lion(param_groups(model, weight_decay=self.weight_decay), lr=self.lr, betas=self.betas)


@dataclass(frozen=True)
class SGDConfig(_Checked):
    """Gradient descent; weight decay is added to the gradient of matrices."""

    kind: Literal["sgd"] = "sgd"
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0
    """Of matrices; norms have none."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it; inf: never."""
    weight_decay_end: float = 1.0
    """Weight decay at the end of the run, over that at its start; in between it goes in a straight line."""

    def __post_init__(self):
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum, and momentum is 0: set one, or nesterov = false")

    def build(self, model: torch.nn.Module) -> SGD:
        """The optimizer of the model's parameters. Its step takes grad_scale, which multiplies the gradients."""
        _check_unscaled(self.kind, model)
        groups = param_groups(model, weight_decay=self.weight_decay)
        return SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


def _check_unscaled(kind: str, model: torch.nn.Module) -> None:
    if getattr(model, "lr_scales", dict)():
        raise ValueError(f"mup_base_width scales AdamW's learning rates: use optimizer.kind = adamw, got {kind}")


def _storage(config: AdamWConfig | MuonConfig, model: torch.nn.Module) -> dict[str, Any]:
    """How moments and weights are kept, where that is not in float32."""
    low = any(p.dtype == torch.bfloat16 for p in model.parameters())
    rounding: Rounding = config.rounding if low else "nearest"
    return {"state_dtype": getattr(torch, config.state_dtype), "rounding": rounding}


OptimizerConfig = Annotated[
    AdamWConfig | MuonConfig | SOAPConfig | LionConfig | SGDConfig, pydantic.Field(discriminator="kind")
]


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
class _Stable(_Decaying):
    decay_part: float = 0.2
    """Of the run, or of each of its periods, at the end, in which the learning rate falls."""
    decay: Decay = "sqrt"
    """How it falls: sqrt is 1 - sqrt(progress)."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay_part <= 1:
            raise ValueError(f"decay_part must be in 0..1, got {self.decay_part}")


@dataclass(frozen=True)
class WSDConfig(_Stable):
    """Warm-up, stable, decay: at the top until the last part of the run."""

    kind: Literal["wsd"] = "wsd"

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        low, warmup = top * self.min_lr_ratio, self.warmup(total)
        return schedules.wsd_schedule(step, top, low, warmup, self._fall(total), total, decay=self.decay)

    def stable_steps(self, total: int) -> int:
        """Steps before the rate falls: up to there a run of any `total` is the same, if warmup_steps is given."""
        return math.floor(total - self._fall(total))

    def _fall(self, total: int) -> float:
        return min(self.decay_part * total, total - self.warmup(total))


@dataclass(frozen=True)
class WSDSConfig(_Stable):
    """WSD in periods: each ends in a decay, whose checkpoint is a finished model, and the next is at the top again."""

    kind: Literal["wsd_s"] = "wsd_s"
    periods: int = 3
    """Of equal length."""

    def __post_init__(self):
        super().__post_init__()
        if self.periods < 1:
            raise ValueError(f"periods must be at least 1, got {self.periods}")

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        if total < self.periods:
            raise ValueError(
                f"a run of {total} steps has no {self.periods} periods: set schedule.periods lower or give more budget"
            )
        ends = [total * (i + 1) // self.periods for i in range(self.periods)]
        warmup = min(self.warmup(total), ends[0])
        low = top * self.min_lr_ratio
        return schedules.wsd_s_schedule(step, top, low, warmup, ends, self.decay_part, decay=self.decay)


@dataclass(frozen=True)
class ConstantConfig(_Warmup):
    """At the top after the warm-up, for ever."""

    kind: Literal["constant"] = "constant"

    def lr(self, step: float, total: int, top: float) -> float:
        """The learning rate of a step of `total`, `top` the highest."""
        return schedules.constant_schedule(step, max_lr=top, warmup_steps=self.warmup(total))


ScheduleConfig = Annotated[
    CosineConfig | LinearConfig | WSDConfig | WSDSConfig | ConstantConfig, pydantic.Field(discriminator="kind")
]
