"""SwiGLU's gate in plain torch, fp32 inside, any device."""

import torch
from torch import Tensor

from cs336.ops.ref import silu


def fwd(gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu.fwd(gate.to(wide)) * up.to(wide)).to(gate.dtype)
