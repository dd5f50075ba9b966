"""Floats of 8 bits and their scale in plain torch: the definition of ops.fp8_copies."""

import torch
from torch import Tensor

LEAST = 1e-12  # what takes the place of a smaller largest magnitude


def fp8_copies(x: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    largest = torch.where(largest < LEAST, LEAST, largest)  # and NaN stays
    most = torch.full_like(
        largest, torch.finfo(dtype).max
    )  # a number would be divided by as its reciprocal is multiplied
    rounded = (x.float() * (most / largest)).clamp(-most, most).to(dtype)  # above most there is only NaN
    return rounded, rounded.t().contiguous(), largest / most
