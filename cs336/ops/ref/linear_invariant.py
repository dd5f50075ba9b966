"""y = x w^T + b in plain torch, fp32 inside, a row at a time: so a row's bits cannot depend on the others.

Each row is copied to memory of its own: BLAS may add up in an order that depends on where a row begins.
"""

import torch
from torch import Tensor


def linear_invariant(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    y_MN = x_MK.new_empty(x_MK.shape[0], w_NK.shape[0])
    w_NK, b_N = w_NK.to(wide), None if b_N is None else b_N.to(wide)
    for x_K, y_N in zip(x_MK, y_MN, strict=True):
        row_N = torch.mv(w_NK, x_K.to(wide, copy=True))
        y_N.copy_(row_N if b_N is None else row_N + b_N)
    return y_MN
