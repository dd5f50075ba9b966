"""Floats of 8 bits and their scale in plain torch: the definition of ops.fp8_copies."""

import torch
from torch import Tensor

LEAST = 1e-12  # the largest magnitude of a tensor of zeros, as good as any


def fp8_copies(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    most = torch.finfo(dtype).max
    amax = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    amax = torch.where(amax < LEAST, LEAST, amax)  # and NaN stays
    rounded = (x.float() * (most / amax)).clamp(-most, most).to(dtype)  # above most there is only NaN
    return rounded, rounded.t().contiguous(), amax / most
