"""Dropout.  y = x / (1 - p) where word >= p 2^32, else 0            Srivastava et al. 2014

Element i's word is one of four that Philox-4x32-10 makes of the counter i / 4 and the seed: it depends on nothing else,
so the backward makes it again and no mask is kept. All variants make the same words. Bytes that must move: 2 numel(x)
elements, with a residual, to which y is added, 3; about 25 integer instructions an element.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import like, no_float64
from cs336.ops.dispatch import has_kernel, transformed
from cs336.ops.ref import dropout as ref


def _check(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> None:
    if not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(f"x must be floating point and contiguous, got {like(x)} {x.stride()}")
    if residual is not None and (
        (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device)
        or not residual.is_contiguous()
    ):
        raise ValueError(f"residual must be like x, {like(x)}, and contiguous, got {like(residual)}")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {like(seed)}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")


registry.define(
    "dropout_fwd(Tensor x, Tensor? residual, Tensor seed, float p) -> Tensor",
    fake=lambda x, residual, seed, p: x.new_empty(x.shape),
    ref=ref.fwd,
    triton="dropout.fwd",
    check=_check,
    supports={"native": no_float64, "triton": no_float64},
)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, seed, p):
        ctx.save_for_backward(seed)
        ctx.p = p
        return _run(x.contiguous(), None if residual is None else residual.contiguous(), seed, p)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        dresidual = dy if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dresidual, None, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx = _Dropout.apply(dy, None, seed, ctx.p)  # linear in x: differentiable again
        else:
            dx = _run(dy.contiguous(), None, seed, ctx.p)
        return dx, dresidual, None, None


def _run(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    if has_kernel("dropout_fwd", x, residual, seed, p):
        return registry.call("dropout_fwd", x, residual, seed, p)
    return ref.fwd(x, residual, seed, p)


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, residual: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    """x with each element 0 with probability p, or divided by 1 - p; added to residual if there is one, in fp32.

    Args:
        x: any shape, floating point.
        p: in [0, 1].
        training: without it x stays as it is.
        residual: like x.
        seed: one int64 on x's device that decides which elements stay; if None, drawn by torch's generator there, and
            where no kernel runs torch's dropout does.

    Returns a tensor like x. Raises ValueError for shapes, dtypes, devices or a p that do not fit.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    some_seed = x.new_zeros((), dtype=torch.int64) if seed is None else seed
    _check(x.contiguous(), None if residual is None else residual.contiguous(), some_seed, 0.0)
    if not training or p in (0, 1) or (seed is None and not has_kernel("dropout_fwd", x)):
        y = F.dropout(x, p, training)
        return y if residual is None else y + residual
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    if transformed():
        return ref.fwd(x, residual, seed, p)
    return _Dropout.apply(x, residual, seed, p)
