"""y = x w^T + b in plain torch, fp32 inside."""

import torch
from torch import Tensor


def linear_few_rows(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None, constant: bool = False) -> Tensor:
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    y_MN = x_MK.to(wide) @ w_NK.to(wide).t()
    return (y_MN if b_N is None else y_MN + b_N.to(wide)).to(x_MK.dtype)
