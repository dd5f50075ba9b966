"""Rows of a table, and its gradient in fp32, in plain torch, any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops.ref.wide import wide


def look_up(table: Tensor, ids: Tensor, name: str) -> Tensor:
    """Rows of table (N, D) at ids (...), int64 or int32 in [0, N): (..., D). Errors call the ids `name`.

    Raises ValueError for another dtype, IndexError for ids out of range; on a GPU those end the process's CUDA context.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {ids.dtype}")
    try:
        return F.embedding(ids, table)
    except IndexError:
        got = ", got others"
        if not torch._C._are_functorch_transforms_active():  # which has no numbers to show
            got = f", got some from {ids.min().item()} to {ids.max().item()}"
        raise IndexError(f"{name} must be 0 to {len(table) - 1}{got}") from None


def bwd(dy_ND: Tensor, ids_N: Tensor, num_rows: int) -> Tensor:
    total_VD = torch.zeros(num_rows, dy_ND.shape[1], dtype=wide(dy_ND[:0]).dtype, device=dy_ND.device)
    return total_VD.index_add_(0, ids_N, wide(dy_ND)).to(dy_ND.dtype)
