"""The gated delta rule token by token, fp32 inside (fp64 for fp64), any device: the definition.

    S_t = exp(g_t) (S_{t-1} - beta_t k_t (k_t^T S_{t-1})) + beta_t k_t v_t^T        o_t = scale S_t^T q_t

A state S holds values under keys; the rule replaces what it holds under k_t by v_t, beta_t of the way. Shapes and
segments as in ref/linear_attention.py.
"""

import torch
from torch import Tensor

from cs336.ops.ref.linear_attention import continues, heads, start
from cs336.ops.ref.wide import wide


def step(q_BHK, k_BHK, v_BHV, beta_BH, g_BH, state_BHKV, scale):
    """One token: o (B, H, V) and the state after it."""
    if g_BH is not None:
        state_BHKV = state_BHKV * torch.exp(g_BH)[..., None, None]
    held_BHV = (k_BHK[..., None, :] @ state_BHKV)[..., 0, :]
    state_BHKV = state_BHKV + k_BHK[..., None] * (beta_BH[..., None] * (v_BHV - held_BHV))[..., None, :]
    return scale * (q_BHK[..., None, :] @ state_BHKV)[..., 0, :], state_BHKV


def fwd(
    q_BGTK: Tensor,
    k_BGTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    g_BHT: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) like v, stored by token, and the state after the last token, in float32."""
    H = v_BHTV.shape[1]
    q, k, v = heads(wide(q_BGTK), H), heads(wide(k_BGTK), H), wide(v_BHTV)
    state, os = start(k, v, state_BHKV), []
    for t in range(v.shape[2]):
        if segments_BT is not None:
            state = torch.where(continues(segments_BT, t), state, 0)
        g_BH = None if g_BHT is None else g_BHT[:, :, t]
        o_BHV, state = step(q[:, :, t], k[:, :, t], v[:, :, t], beta_BHT[:, :, t], g_BH, state, scale)
        os.append(o_BHV)
    o_BTHV = torch.stack(os, 1) if os else v.transpose(1, 2)
    return o_BTHV.to(v_BHTV.dtype).contiguous().transpose(1, 2), state.clone()
