"""alpha x x^T + beta c in plain torch, fp32 inside."""

import torch
from torch import Tensor


def gram(x_BMN: Tensor, c_BMM: Tensor | None, alpha: float, beta: float) -> Tensor:
    wide_BMN = x_BMN.to(torch.promote_types(x_BMN.dtype, torch.float32))
    y_BMM = alpha * (wide_BMN @ wide_BMN.mT)
    if c_BMM is not None:
        y_BMM += beta * c_BMM.to(y_BMM.dtype)
    return y_BMM.to(x_BMN.dtype)
