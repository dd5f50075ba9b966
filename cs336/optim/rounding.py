"""bfloat16 tensors that are updated in float32.

A step of lr 1e-4 moves a weight by less than half of bfloat16's spacing (2^-8 of its size): rounded to nearest it
would never move. Two ways out:

    stochastic    round up or down with probabilities that make the mean exact; nothing more is kept
    remainder     keep what rounding took away, 16 bits a weight: bfloat16 and remainder together are the float32 weight

The remainder is the difference of the bit patterns, so that join(*split(x)) is x bit for bit.
"""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "remainder"]
ROUNDINGS = ("nearest", "stochastic", "remainder")
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


def stochastic_round(x: Tensor) -> Tensor:
    """A float32 tensor in bfloat16, up with the probability of the place between its neighbours: the mean is exact.

    Draws from torch's generator of the device. What bfloat16 holds, infinities and NaN stay as they are.
    """
    noise = torch.randint(0, LOW + 1, x.shape, dtype=torch.int32, device=x.device)
    high = ((x.view(torch.int32) + noise) & ~LOW).view(torch.float32)
    return torch.where(x.isnan(), x, high).to(torch.bfloat16)
