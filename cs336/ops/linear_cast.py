"""y = x W^T in a dtype narrower than W's.  dx = dy W, and dW = dy^T x in W's dtype from the product on.

Autocast rounds dW to bfloat16 where the product ends, and casts it back: 8 bytes are moved of a float32 weight, and the
4 that must here. N = rows, K = features of x, M = those of y.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops.dispatch import matrix


def linear_cast(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """F.linear(x, weight) in `dtype`, which is narrower than weight's: (..., K) by (M, K) -> (..., M)."""
    return _LinearCast.apply(x.to(dtype), weight, dtype)


class _LinearCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, dtype):
        low = weight.to(dtype)
        ctx.save_for_backward(x, low)
        ctx.dtype = weight.dtype
        return F.linear(x, low)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, low = ctx.saved_tensors
        dx = dy @ low if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.ops.cs336.weight_gradient.default(matrix(dy), matrix(x), ctx.dtype)
        return dx, dweight, None


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return dy.t().to(dtype) @ x.to(dtype)  # torch has the other on a GPU alone


# dy^T x of (N, M) and (N, K) in `dtype`, without rounding in between: opaque to torch.compile
torch.library.define(
    "cs336::weight_gradient",
    "(Tensor dy, Tensor x, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("cs336::weight_gradient", "CompositeExplicitAutograd")(_weight_gradient)
torch.library.register_fake(
    "cs336::weight_gradient", lambda dy, x, dtype: dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
)
