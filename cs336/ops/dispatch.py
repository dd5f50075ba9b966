"""What ops that have kernels on a GPU alone share: on a CPU they run their reference, unless a variant is forced."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cs336.ops import registry


def run(name: str, *args: Any) -> Any:
    """registry.call; on a CPU Triton's interpreter, which is for tests, must be forced."""
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    if first.is_cuda or registry.forced() is not None:
        return registry.call(name, *args)
    return registry.OPS[name].overloads["ref"](*args)


def transformed() -> bool:
    """Whether functorch transforms what runs, or forward mode follows it: plain torch alone knows how to take that."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_kernel(name: str, *args: Any) -> bool:
    """Whether `run` would take a kernel: a forced variant that is one, or a compiled one that accepts the arguments.

    Not where the call is transformed.
    """
    if transformed():
        return False
    if registry.forced() is not None:
        return registry.forced() != "ref"
    first = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return first.is_cuda and any(registry.why_not(name, v, *args) is None for v in ("triton", "native"))


def rows(x: Tensor) -> Tensor:
    """x with its last dim contiguous; copies only where it is not."""
    if x.dim() == 0 or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty tensor's strides as they are


def matrix(x: Tensor) -> Tensor:
    """x (..., K) as (M, K), also where K is 0."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def default_scale(q: Tensor) -> float:
    """1 / sqrt(q's last dim): of scores. Of a q that the op's own check is yet to refuse, 1."""
    return max(1, q.shape[-1] if q.dim() else 1) ** -0.5


def turn(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, H, S, D), and back; packed (T, H, D) stays."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def recomputed(function: Callable, *args: Any) -> Any:
    """Keeps the arguments alone for the backward; all under functorch, which takes no hooks."""
    if not transformed() and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
