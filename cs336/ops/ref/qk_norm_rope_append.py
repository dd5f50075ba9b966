"""RMSNorm over each head of q and k, rotation, and writing to a paged cache, in plain torch, fp32 inside."""

import torch
from torch import Tensor

from cs336.ops.ref import rope
from cs336.ops.ref.paged_cache import append_kv_


def qk_norm_rope_append_(
    k_cache_PSHD: Tensor,
    v_cache_PSHE: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THE: Tensor,
    cos_LP: Tensor,
    sin_LP: Tensor,
    page_table_BM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    cos_T1P, sin_T1P = (table[position_T.clamp(min=0)][:, None] for table in (cos_LP, sin_LP))
    turned = []
    for x_THD, w_D in ((q_THD, q_weight_D), (k_THD, k_weight_D)):
        x = x_THD.to(torch.promote_types(x_THD.dtype, torch.float32))
        if w_D is not None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w_D.to(x.dtype)
        turned.append(rope.fwd(x, cos_T1P, sin_T1P, interleaved).to(x_THD.dtype))
    append_kv_(k_cache_PSHD, v_cache_PSHE, turned[1], v_THE, page_table_BM, sequence_T, position_T)
    return turned[0], turned[1]
