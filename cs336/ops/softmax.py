"""Softmax.  softmax(x)_i = exp(x_i - max x) / sum_j exp(x_j - max x)"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import softmax as ref


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Exponentials of x along dim, scaled to sum to 1; no input overflows.

    x: (...) floating point. Returns a tensor like x; along a dim that is -inf throughout it is NaN, as torch's.
    Raises ValueError for a dtype or a dim that does not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    dims = max(1, x.dim())  # a scalar is a vector of one
    if not -dims <= dim < dims:
        raise ValueError(f"dim must be a dim of x {tuple(x.shape)}, got {dim}")
    return ref.fwd(x, dim) if registry.forced() == "ref" else torch.softmax(x, dim)
