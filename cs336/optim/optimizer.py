"""What the optimizers share: torch.optim.Optimizer, with a step that scales gradients on their way."""

import difflib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ELEMENT_COST = 5000
"""FLOPs that pass while a step moves one element's weight, gradient and state: 28 bytes at 190 FLOPs a byte (H200)."""


class Optimizer(torch.optim.Optimizer):
    """A subclass updates the parameters of a group and says what its state takes."""

    capturable = True
    """Whether a step never waits for the device, so that a CUDA graph can hold it."""

    group_options: frozenset[str] = frozenset()
    """What a group may have beside the defaults."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_names(self, self.param_groups[-1], self.group_options)
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients and returns the loss, which step returns.
            grad_scale: one element, float32 or the float64 that such gradients give, which multiplies the gradients on
                their way, e.g. clip_scale(norm, 1.0).

        Raises ValueError for sparse gradients, before any parameter of their group is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, grad_scale)
        return loss

    def state_bytes(self) -> int:
        """Bytes that the state takes once every parameter has made a step."""
        raise NotImplementedError

    def step_cost(self, p: Tensor, group: dict[str, Any]) -> int:
        """What a step of one parameter takes, in FLOPs or their time: by this ShardedOptimizer deals parameters."""
        return p.numel() * ELEMENT_COST

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for numbers or dtypes that do not fit."""
        raise NotImplementedError

    def _step_group(self, group: dict[str, Any], grad_scale: Tensor | None) -> None:
        raise NotImplementedError


def gradient(p: Tensor) -> Tensor | None:
    """A parameter's gradient, in its memory order. Raises ValueError for a sparse one."""
    g = p.grad
    if g is None:
        return None
    if g.is_sparse:
        raise ValueError(
            f"this optimizer takes dense gradients, and the one of a parameter of shape {tuple(p.shape)} is sparse: "
            "make it dense, e.g. Embedding(sparse=False)"
        )
    if not (g.is_contiguous() and p.is_contiguous()) and g.stride() != p.stride():
        g = torch.empty_like(p, dtype=g.dtype).copy_(g)
    return g


def check_names(optimizer: torch.optim.Optimizer, group: dict[str, Any], more: frozenset[str]) -> None:
    """Raises TypeError for an option misspelt, of the defaults or more. Others are the caller's own, as in torch's."""
    known = optimizer.defaults.keys() | more
    for name in sorted(group.keys() - known - {"params"}):
        if near := difflib.get_close_matches(name, known, 1, 0.85):
            kind = type(optimizer).__name__
            raise TypeError(f"{kind} has no option {name}, which a group has: is {near[0]} meant?")


def check_group(group: dict[str, Any], *, not_negative: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError for negative or infinite numbers and parameters of other dtypes."""
    for name in not_negative:
        value = group[name]
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must {'not be negative' if value < 0 else 'be finite'}, got {value}")
    for p in group["params"]:
        if p.dtype not in dtypes:
            raise ValueError(
                f"parameters must be float32, float16, bfloat16 or float64, got {p.dtype} {tuple(p.shape)}"
            )
