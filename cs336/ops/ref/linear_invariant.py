"""y = x w^T + b in plain torch, fp32 inside, a row at a time: so a row's bits cannot depend on the others.

Each row is copied to memory of its own: BLAS may add up in an order that depends on where a row begins.
"""

import torch
from torch import Tensor


def linear_invariant(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    if not x_MK.shape[0]:
        return x_MK.new_empty(0, w_NK.shape[0])
    w_NK = w_NK.to(wide)
    y_MN = torch.stack([torch.mv(w_NK, x_K.to(wide, copy=True)) for x_K in x_MK])
    return (y_MN if b_N is None else y_MN + b_N.to(wide)).to(x_MK.dtype)
