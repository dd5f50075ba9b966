"""Experts' gated units in plain torch, fp32 inside (fp64 for fp64): the host waits for the loads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops.ref.wide import wide


def expert_swiglu(x_NM: Tensor, token_R: Tensor, load_E: Tensor, gate_EFM: Tensor, up_EFM: Tensor) -> Tensor:
    """h (R, F) like x."""
    parts = wide(x_NM)[token_R].split(load_E.tolist())
    hidden = [
        F.silu(F.linear(p, wide(g))) * F.linear(p, wide(u)) for p, g, u in zip(parts, gate_EFM, up_EFM, strict=True)
    ]
    return torch.cat(hidden).to(x_NM.dtype)
