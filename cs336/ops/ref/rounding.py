"""A float32 tensor in two parts of 16 bits: bfloat16, and the remainder that rounding took away.

The remainder is the difference of the bit patterns, so that join(*split(x)) is x bit for bit.
"""

import torch
from torch import Tensor

HALF, LOW = 1 << 15, 0xFFFF


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as (bfloat16, int16): it rounded to nearest, ties away from zero, and the bits that leaves."""
    bits = x.view(torch.int32)
    high = (bits + HALF) & ~LOW
    nan = x.isnan()  # whose bits may be all ones: half more would make it -0
    rounded = high.view(torch.float32).to(torch.bfloat16)
    return torch.where(nan, torch.nan, rounded), (bits - high).masked_fill(nan, 0).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that `split` took apart."""
    bits = rounded.float().view(torch.int32) + remainder.to(torch.int32)
    return bits.view(torch.float32)
