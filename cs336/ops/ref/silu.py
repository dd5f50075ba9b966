"""SiLU in plain torch, fp32 inside, any device."""

import torch
from torch import Tensor


def fwd(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(wide)).to(x.dtype)
