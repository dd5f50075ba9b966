"""Gradient clipping by the global norm (Pascanu et al. 2013, arXiv:1211.5063), without waiting for the device.

Two ways, equal but for rounding:
    norm = clip_grad_norm_(params, 1.0)                          # one more pass over the gradients
    norm = grad_norm(params)
    optimizer.step(grad_scale=clip_scale(norm, 1.0))             # in the optimizer's own pass
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

TINY = 1e-6  # added to the norm, as in torch: a zero gradient stays finite


@torch.no_grad()
def grad_norm(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, in one pass over them.

    Returns a scalar tensor on the first gradient's device: float32 (float64 if any gradient is), accumulated in that
    precision whatever the gradients' own. Zero where there is no gradient.
    Raises ValueError for sparse gradients.
    """
    return _norm(_gradients(parameters))


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this norm by: max_norm / norm where that is below 1, else 1.

    NaN stays NaN, and an infinite norm gives zero, as in torch.
    Raises ValueError unless max_norm >= 0.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    return (max_norm / (norm + TINY)).clamp(max=1.0)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale all gradients in place so that their norm together is at most max_norm.

    Returns the norm before clipping: see grad_norm.
    Raises ValueError for sparse gradients or a negative max_norm, and RuntimeError for a norm that is not finite if
    error_if_nonfinite, which makes the host wait for the device. By default the gradients then become NaN or zero.
    """
    grads = _gradients(parameters)
    norm = _norm(grads)
    scale = clip_scale(norm, max_norm)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"the norm of the gradients is {norm.item()}: they cannot be clipped")
    for (device, dtype), group in _grouped(grads).items():
        factor = scale.to(device)
        if dtype == factor.dtype:
            torch._foreach_mul_(group, factor)
        else:
            for g in group:  # with g's dims the factor takes part in type promotion; with none it is rounded to g's
                g.mul_(factor.view([1] * g.dim()))
    return norm


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(g.layout != torch.strided for g in grads):
        raise ValueError("sparse gradients have no norm here: make them dense, e.g. Embedding(sparse=False)")
    return grads


def _norm(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    norms = []
    for (device, dtype), group in _grouped(grads).items():
        accumulator = torch.promote_types(dtype, torch.float32)
        if device.type == "cpu":
            rows, group = _split_rows(group)
            norms += [torch.linalg.vector_norm(r, dim=1, dtype=accumulator) for r in rows]
        norms.append(torch.stack(torch._foreach_norm(group, 2, dtype=accumulator)))
    return torch.linalg.vector_norm(torch.cat([n.to(grads[0].device) for n in norms]))


def _split_rows(tensors: list[Tensor], row: int = 4096) -> tuple[list[Tensor], list[Tensor]]:
    """Each tensor as (rows, row), and what is left over.

    torch's CPU norm adds in 8 chains, which swallow small terms: 0.3 % off for 38M normal values, 2 % for equal ones.
    Over rows it is exact to 1e-5 and as fast.
    """
    flat = [t.reshape(-1) for t in tensors]
    ends = [t.numel() // row * row for t in flat]
    pairs = list(zip(flat, ends, strict=True))
    return [t[:end].view(-1, row) for t, end in pairs if end], [t[end:] for t, end in pairs]


def _grouped(grads: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    groups = defaultdict(list)
    for g in grads:
        groups[g.device, g.dtype].append(g)
    return groups
