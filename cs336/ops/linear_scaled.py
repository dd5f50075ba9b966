"""y = x W^T whose three products are of floats of 8 bits, for training (Micikevicius et al., arXiv 2209.05433).

x and W are rounded to e4m3 and dy to e5m2, each divided by one scale that takes its largest magnitude to the format's;
sums and scales are float32:

    y = (x / a) (W / b)^T a b        dx = (dy / c) (W / b) c b        dW = (dy / c)^T (x / a) c a

Tensor cores multiply floats of 8 bits twice as fast as bfloat16, where both sides run along what is added up: so all
three are rounded into two copies (ops.fp8_copies), and the backward keeps the transposed ones of x and W, a byte an
element. N = rows, K = features of x, M = of y.
"""

import torch
from torch import Tensor

from cs336.ops.dispatch import matrix, transformed
from cs336.ops.fp8_copies import fp8_copies

MULTIPLE = 16  # that N, K and M are of


def linear_scaled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in floats of 8 bits: x (..., K), weight (M, K), bias (M) -> (..., M).

    The result has x's dtype, or autocast's where it is on; the gradients those of what they are of. Rounding to 3 bits
    of mantissa, gradients to 2, makes y differ by 4 % of its size, dx and dW by 6 %, where all is normal.

    Raises ValueError where x's rows, K or M are no multiples of 16, TypeError for x that is not bfloat16 or float32,
    RuntimeError on a GPU before compute capability 8.9, and inside torch.func and forward mode.
    """
    if transformed():
        raise RuntimeError("linear_scaled has gradients for backward() alone: use torch.nn.functional.linear here")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dtype not in (torch.bfloat16, torch.float32) or not weight.is_floating_point():
        raise TypeError(f"linear_scaled takes x of bfloat16 or float32, got x {x.dtype} and weight {weight.dtype}")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., K) and weight (M, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    rows, (features, inputs) = x.numel() // max(x.shape[-1], 1), weight.shape
    if rows % MULTIPLE or features % MULTIPLE or inputs % MULTIPLE:
        raise ValueError(
            f"linear_scaled multiplies rows and features in multiples of {MULTIPLE}, got {rows} rows of {inputs} "
            f"features and {features} of y: use torch.nn.functional.linear"
        )
    y = _LinearScaled.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


class _LinearScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        x8_NK, x8_KN, a = fp8_copies(matrix(x))
        w8_MK, w8_KM, b = fp8_copies(weight)
        ctx.save_for_backward(x8_KN, w8_KM, a, b)
        ctx.dtypes = x.dtype, weight.dtype
        return _product(x8_NK, w8_MK, a, b, x.dtype, fast=True).view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x8_KN, w8_KM, a, b = ctx.saved_tensors
        (dtype, weight_dtype), dx, dw = ctx.dtypes, None, None
        dy8_NM, dy8_MN, c = fp8_copies(matrix(dy), gradient=True)
        if ctx.needs_input_grad[0]:
            dx = _product(dy8_NM, w8_KM, c, b, dtype).view(*dy.shape[:-1], len(w8_KM))
        if ctx.needs_input_grad[1]:
            dw = _product(dy8_MN, x8_KN, c, a, dtype).to(weight_dtype)
        return dx, dw


def _product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(left left_scale) (right right_scale)^T; fast: with sums whose last bits the tensor cores cut off."""
    with torch.autocast(left.device.type, enabled=False):  # which would round the scales
        return torch._scaled_mm(left, right.t(), left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)
