"""bfloat16 tensors that are updated in float32.

A step of lr 1e-4 moves a weight by less than half of bfloat16's spacing (2^-8 of its size): rounded to nearest it
would never move. Two ways out:

    stochastic    round up or down with probabilities that make the mean exact; nothing more is kept
    remainder     keep what rounding took away, 16 bits a weight: bfloat16 and remainder together are the float32 weight
"""

from typing import Literal

import torch
from torch import Tensor

from cs336.ops.ref.rounding import LOW
from cs336.ops.ref.rounding import join as join
from cs336.ops.ref.rounding import split as split

Rounding = Literal["nearest", "stochastic", "remainder"]
ROUNDINGS = ("nearest", "stochastic", "remainder")


def stochastic_round(x: Tensor) -> Tensor:
    """A float32 tensor in bfloat16, up with the probability of the place between its neighbours: the mean is exact.

    Draws from torch's generator of the device. What bfloat16 holds, infinities and NaN stay as they are.
    """
    noise = torch.randint(0, LOW + 1, x.shape, dtype=torch.int32, device=x.device)
    high = ((x.view(torch.int32) + noise) & ~LOW).view(torch.float32)
    return torch.where(x.isnan(), x, high).to(torch.bfloat16)
