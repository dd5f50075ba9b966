"""Rows of a table.  y[n] = weight[ids[n]], and backward dweight[v] = sum of dy[n] where ids[n] = v

The kernel's backward sorts the ids and adds up each run of equal ones in order, in fp32: without atomics, so that the
same input gives the same bits. N = ids, V = rows, D = features. Bytes that must move, in elements: ND read, VD written.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import like, no_float64
from cs336.ops.dispatch import has_kernel
from cs336.ops.norm import rows
from cs336.ops.ref import embedding as ref


def _check(dy: Tensor, ids: Tensor, num_rows: int) -> None:
    if dy.dim() != 2 or not dy.is_floating_point() or (dy.shape[1] > 1 and dy.stride(1) != 1):
        raise ValueError(f"dy must be (N, D), floating point, its last dim contiguous, got {like(dy)} {dy.stride()}")
    if ids.shape != dy.shape[:1] or ids.dtype != torch.int64 or ids.device != dy.device:
        raise ValueError(f"ids must be ({dy.shape[0]},) int64 on {dy.device}, got {like(ids)}")
    if num_rows < 1:
        raise ValueError(f"num_rows must be 1 or more, got {num_rows}")


registry.define(
    "embedding_bwd(Tensor dy, Tensor ids, int num_rows) -> Tensor",
    fake=lambda dy, ids, num_rows: dy.new_empty(num_rows, dy.shape[1]),
    ref=ref.bwd,
    triton="embedding.bwd",
    check=_check,
    supports={"triton": no_float64},
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        ids_N, dy_ND = ids.reshape(-1).long(), rows(dy)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # linear: differentiable again
            return None, ref.bwd(dy_ND, ids_N, ctx.num_rows)
        return None, registry.call("embedding_bwd", dy_ND, ids_N, ctx.num_rows)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (V, D) at ids (...), int64 or int32 in [0, V): (..., D).

    Its gradient is summed in fp32, and on a GPU in a fixed order.
    Raises ValueError for shapes or dtypes that do not fit, IndexError on a CPU for ids out of range; on a GPU those end
    the process's CUDA context.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be int64 or int32, got {ids.dtype}")
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point() or weight.device != ids.device:
        raise ValueError(f"weight must be (V, D), floating point, on {ids.device}, got {like(weight)}")
    learns = weight.requires_grad and torch.is_grad_enabled()
    forced_ref = registry.forced() == "ref" and not torch._C._are_functorch_transforms_active()
    if learns and (forced_ref or has_kernel("embedding_bwd", weight)):
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)
