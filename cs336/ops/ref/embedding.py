"""The gradient of an embedding's table in plain torch, fp32 inside, any device."""

import torch
from torch import Tensor

from cs336.ops.ref.wide import wide


def bwd(dy_ND: Tensor, ids_N: Tensor, num_rows: int) -> Tensor:
    total_VD = torch.zeros(num_rows, dy_ND.shape[1], dtype=wide(dy_ND[:0]).dtype, device=dy_ND.device)
    return total_VD.index_add_(0, ids_N, wide(dy_ND)).to(dy_ND.dtype)
