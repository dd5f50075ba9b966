"""y = x W^T whose three products are of floats of 8 bits, for training (Micikevicius et al., arXiv 2209.05433).

x and W are rounded to e4m3 and dy to e5m2, each divided by one scale that takes its largest magnitude to the format's;
sums and scales are float32, and what is kept for the backward is x and W as they are:

    y = (x / a) (W / b)^T a b        dx = (dy / c) (W / b) c b        dW = (dy / c)^T (x / a) c a

Tensor cores multiply floats of 8 bits twice as fast as bfloat16. In memory both sides of a product run along what is
added up, so the backward rounds x, W and dy into transposed copies. N = rows, K = features of x, M = of y.
"""

import torch
from torch import Tensor

from cs336.ops.dispatch import matrix

X, DY = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # that N, K and M are of
_LEAST = 1e-12  # a largest magnitude: a tensor of zeros has a scale


def linear_scaled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in floats of 8 bits: x (..., K), weight (M, K), bias (M) -> (..., M).

    The result has x's dtype, or autocast's where it is on; the gradients those of what they are of. Each product is off
    by what rounding to 3 bits of mantissa (2, of gradients) makes of it: about 4 % of its size where x and W are normal.

    Raises ValueError where x's rows, K or M are no multiple of 16, TypeError for other floats than bfloat16 and float32
    and RuntimeError on a GPU before compute capability 8.9.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    if x.dtype not in (torch.bfloat16, torch.float32) or not weight.is_floating_point():
        raise TypeError(f"linear_scaled takes x of bfloat16 or float32, got x {x.dtype} and weight {weight.dtype}")
    rows, (features, inputs) = x.numel() // max(x.shape[-1], 1), weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"weight must be (M, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
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
        x_NK = matrix(x)
        a, b = _scale(x_NK, X), _scale(weight, X)
        ctx.save_for_backward(x, weight, a, b)
        y_NM = _product(_rounded(x_NK, a, X), _rounded(weight, b, X), a, b, x.dtype, fast=True)
        return y_NM.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        dy_NM, dx, dw = matrix(dy), None, None
        c = _scale(dy_NM, DY)
        dy8_NM = _rounded(dy_NM, c, DY)
        if ctx.needs_input_grad[0]:
            w8_KM = _rounded(weight, b, X).t().contiguous()
            dx = _product(dy8_NM, w8_KM, c, b, x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            x8_KN = _rounded(matrix(x), a, X).t().contiguous()
            dw = _product(dy8_NM.t().contiguous(), x8_KN, c, a, x.dtype).to(weight.dtype)
        return dx, dw


def _scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What x is to be divided by: float32 ()."""
    return x.abs().amax().float().clamp_min(_LEAST) / torch.finfo(dtype).max


def _rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype)  # beyond the largest there is only NaN


def _product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """(left left_scale) (right right_scale)^T; fast: with sums whose last bits the tensor cores cut off."""
    return torch._scaled_mm(left, right.t(), left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)
