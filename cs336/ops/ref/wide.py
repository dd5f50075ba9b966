"""The dtype that references compute in, and the way back."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def narrow(y: Tensor, x: Tensor) -> Tensor:
    """y in x's dtype: what an autograd.Function that runs plain torch returns. torch 2.11 compiles one that ends in a
    .to() which does nothing, and loses its gradient."""
    return y if y.dtype == x.dtype else y.to(x.dtype)
