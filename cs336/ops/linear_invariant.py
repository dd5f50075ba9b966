"""A linear layer whose rows have the same bits in any batch: y = x w^T + b.

A matrix product picks its tiles, and with them the order of its sums, by the number of rows: so cuBLAS gives a token
other last bits alone than among 255 others. Here every sum runs over K in one order, whatever else is computed: with
it, the norms and our attention a sequence's log-probabilities in training, rollout and serving are equal bit for bit.
FLOPs 2 M N K; bytes that must move: x, w and y once.

M = rows, K = in_features, N = out_features.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, no_float64
from cs336.ops.dispatch import matrix, rows, run, transformed
from cs336.ops.ref import linear_invariant as ref


def linear_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, each row with the bits that it has alone.

    Args:
        x: (..., K) floating point.
        weight: (N, K) like x; bias: (N,) like x, or None. Under autocast all are cast to its dtype.

    Returns y (..., N) like x. The gradients are plain torch's, and may depend on the batch. Transforms of torch.func
    and forward mode take the reference: other bits than a GPU's kernel gives, and under vmap bits of the batch. Raises
    ValueError for arguments that do not fit.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., K), got no dims")
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    x_MK, weight = rows(matrix(x)), rows(weight)
    check_linear(x_MK, weight, bias)
    function = ref.linear_invariant if transformed() else _LinearInvariant.apply
    y = function(x_MK, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


class _LinearInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return run("linear_invariant", x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            dy @ weight if for_x else None,
            dy.transpose(0, 1) @ x if for_weight else None,
            dy.sum(0) if for_bias and ctx.has_bias else None,
        )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight must be (M, K) and (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if not x.is_floating_point() or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be floating point like x, {x.dtype} on {x.device}, got {weight.dtype} on {weight.device}"
        )
    check_last_dims(x=x, weight=weight)
    if bias is None:
        return
    if bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device or not bias.is_contiguous():
        raise ValueError(
            f"bias must be contiguous ({weight.shape[0]},) {x.dtype} on {x.device}, got {tuple(bias.shape)} "
            f"{bias.dtype} on {bias.device}"
        )


registry.define(
    "linear_invariant(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    ref=ref.linear_invariant,
    triton="linear_invariant.linear_invariant",
    check=check_linear,
    supports={"triton": no_float64},
)
