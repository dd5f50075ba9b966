"""One token of a recurrence in plain torch, fp32 inside (fp64 for fp64): the formulas are in ops/recurrent_step.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops.ref import gated_delta_rule, linear_attention
from cs336.ops.ref.linear_attention import heads
from cs336.ops.ref.wide import wide


def recurrent_step_(
    memory_NRHKV: Tensor,
    q_BGK: Tensor,
    k_BGK: Tensor,
    v_BHV: Tensor,
    lengths_B: Tensor,
    places_B: Tensor | None,
    g_BH: Tensor | None,
    A_log_H: Tensor | None,
    dt_bias_H: Tensor | None,
    beta_BH: Tensor | None,
    D_H: Tensor | None,
    norm_V: Tensor | None,
    gate_BHV: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    R, H, dtype = *memory_NRHKV.shape[1:3], memory_NRHKV.dtype
    place_B = torch.arange(len(v_BHV), device=v_BHV.device) if places_B is None else places_B.long()
    state_BHKV = memory_NRHKV[place_B, lengths_B.long() % R].masked_fill((lengths_B == 0)[:, None, None, None], 0)
    q, k, v = heads(wide(q_BGK), H), heads(wide(k_BGK), H), wide(v_BHV)
    written, g = v, None if g_BH is None else g_BH.to(dtype)
    if g is not None and A_log_H is not None and dt_bias_H is not None:
        dt_BH = F.softplus(g + dt_bias_H.to(dtype))
        g = -torch.exp(A_log_H.to(dtype)) * dt_BH
        if D_H is not None:
            written = dt_BH[..., None] * v
    if beta_BH is None:
        o_BHV, state_BHKV = linear_attention.step(q, k, written, g, state_BHKV, scale)
    else:
        beta, q, k = torch.sigmoid(beta_BH.to(dtype)), F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        o_BHV, state_BHKV = gated_delta_rule.step(q, k, written, beta, g, state_BHKV, scale)
    memory_NRHKV.index_put_((place_B, (lengths_B.long() + 1) % R), state_BHKV)
    if D_H is not None:
        o_BHV = o_BHV + D_H.to(dtype)[:, None] * v
    if norm_V is not None:
        o_BHV = o_BHV * torch.rsqrt(o_BHV.square().mean(-1, keepdim=True) + eps) * norm_V.to(dtype)
    if gate_BHV is not None:
        o_BHV = o_BHV * F.silu(wide(gate_BHV))
    return o_BHV.to(v_BHV.dtype)
