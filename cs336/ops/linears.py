"""y_i = x W_i^T of several matrices, in a dtype that may be narrower than theirs.  dx = sum dy_i W_i, dW_i = dy_i^T x

Autocast rounds dW to bfloat16 where the product ends, and casts it back: 8 bytes are moved of a float32 weight. Here
the product writes the 4 that must be. The terms of dx are added by the products themselves, not in a pass of its own.
774M on an H200: 0.4 and 0.6 % of a step. N = rows, K = features of x, M = those of y.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops.dispatch import matrix


def linears(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """F.linear(x, weight) of each weight (M, K), in `dtype`: theirs, or a narrower one. x (..., K) -> (..., M) each."""
    return _Linears.apply(x.to(dtype), dtype, *weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, *weights):
        lows = [weight.to(dtype) for weight in weights]
        ctx.save_for_backward(x, *lows)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(F.linear(x, low) for low in lows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, *lows = ctx.saved_tensors
        x_NK, dys_NM = matrix(x), [matrix(dy) for dy in dys]
        dx = dys_NM[0] @ lows[0] if len(lows) == 1 else torch.ops.cs336.sum_of_products.default(dys_NM, lows)
        grads = [
            (dy_NM.t() @ x_NK if dtype == x.dtype else torch.ops.cs336.wide_product.default(dy_NM, x_NK, dtype))
            if wanted
            else None
            for dy_NM, dtype, wanted in zip(dys_NM, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)
        ]
        return dx.view(x.shape) if ctx.needs_input_grad[0] else None, None, *grads


# ---- opaque to torch.compile ----


def _sum_of_products(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    dx = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx


def _wide_product(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return dy.t().to(dtype) @ x.to(dtype)  # torch has the other on a GPU alone


def _define(name: str, signature: str, function, fake) -> None:
    torch.library.define(f"cs336::{name}", signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"cs336::{name}", "CompositeExplicitAutograd")(function)
    torch.library.register_fake(f"cs336::{name}", fake)


_define(
    "sum_of_products",  # dy W of all pairs (N, M) and (M, K)
    "(Tensor[] dys, Tensor[] weights) -> Tensor",
    _sum_of_products,
    lambda dys, weights: dys[0].new_empty(dys[0].shape[0], weights[0].shape[1]),
)
_define(
    "wide_product",  # dy^T x of (N, M) and (N, K) in `dtype`, without rounding in between
    "(Tensor dy, Tensor x, ScalarType dtype) -> Tensor",
    _wide_product,
    lambda dy, x, dtype: dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype),
)
