"""Linear attention token by token, fp32 inside (fp64 for fp64), any device: the definition.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t        S_{-1} = state, which the first segment sees

A token whose segment is not that of the token before begins with S = 0. B = batch, H = heads, G = heads of q and k,
T = tokens, K = features of a key, V = of a value.
"""

import torch
from torch import Tensor

from cs336.ops.ref.wide import wide


def step(q_BHK, k_BHK, v_BHV, g_BH, state_BHKV, scale):
    """One token: o (B, H, V) and the state after it."""
    if g_BH is not None:
        state_BHKV = state_BHKV * torch.exp(g_BH)[..., None, None]
    state_BHKV = state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
    return scale * (q_BHK[..., None, :] @ state_BHKV)[..., 0, :], state_BHKV


def continues(segments_BT: Tensor, t: int) -> Tensor:
    """(B, 1, 1, 1): whether token t goes on with what is before it."""
    same_B = segments_BT[:, t] == segments_BT[:, t - 1] if t else torch.ones_like(segments_BT[:, 0], dtype=torch.bool)
    return same_B[:, None, None, None]


def heads(x_BGTK: Tensor, H: int) -> Tensor:
    """For each head of the values, which share heads of the keys in groups."""
    G = x_BGTK.shape[1]
    return x_BGTK if G == H else x_BGTK.repeat_interleave(H // G, dim=1)


def start(k_BHTK: Tensor, v_BHTV: Tensor, state_BHKV: Tensor | None) -> Tensor:
    (B, H, _, K), V = k_BHTK.shape, v_BHTV.shape[-1]
    return k_BHTK.new_zeros(B, H, K, V) if state_BHKV is None else state_BHKV.to(k_BHTK.dtype)


def fwd(
    q_BGTK: Tensor,
    k_BGTK: Tensor,
    v_BHTV: Tensor,
    g_BHT: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) like v, stored by token, and the state after the last token, in float32."""
    return run(step, q_BGTK, k_BGTK, v_BHTV, g_BHT, state_BHKV=state_BHKV, segments_BT=segments_BT, scale=scale)


def run(step, q_BGTK, k_BGTK, v_BHTV, *gates_BHT, state_BHKV, segments_BT, scale) -> tuple[Tensor, Tensor]:
    """What fwd returns, by any step(q, k, v, *gates, state, scale)."""
    H = v_BHTV.shape[1]
    q, k, v = heads(wide(q_BGTK), H), heads(wide(k_BGTK), H), wide(v_BHTV)
    state, os = start(k, v, state_BHKV), []
    for t in range(v.shape[2]):
        if segments_BT is not None:
            state = torch.where(continues(segments_BT, t), state, 0)
        token = (None if x is None else x[:, :, t] for x in (q, k, v, *gates_BHT))
        o_BHV, state = step(*token, state, scale)
        os.append(o_BHV)
    o_BTHV = torch.stack(os, 1) if os else v.transpose(1, 2)
    return o_BTHV.to(v_BHTV.dtype).contiguous().transpose(1, 2), state.clone()


def bwd(
    do_BHTV: Tensor,
    dstate_BHKV: Tensor | None,
    q_BGTK: Tensor,
    k_BGTK: Tensor,
    v_BHTV: Tensor,
    g_BHT: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, stored by token, dg (B, H, T), and the gradient of the state before the first token."""
    (_, H, T, _), G = v_BHTV.shape, q_BGTK.shape[1]
    q, k, v, do = heads(wide(q_BGTK), H), heads(wide(k_BGTK), H), wide(v_BHTV), wide(do_BHTV)
    decay_BHT = torch.ones_like(v[..., 0]) if g_BHT is None else torch.exp(g_BHT)
    state, before = start(k, v, state_BHKV), []
    for t in range(T):
        if segments_BT is not None:
            state = torch.where(continues(segments_BT, t), state, 0)
        before.append(state)
        state = decay_BHT[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
    d = torch.zeros_like(state) if dstate_BHKV is None else dstate_BHKV.to(state.dtype)
    dq, dk, dv, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(decay_BHT)
    for t in reversed(range(T)):
        after = decay_BHT[:, :, t, None, None] * before[t] + k[:, :, t, :, None] * v[:, :, t, None, :]
        d = d + scale * q[:, :, t, :, None] * do[:, :, t, None, :]
        dq[:, :, t] = scale * (after @ do[:, :, t, :, None])[..., 0]
        dk[:, :, t] = (d @ v[:, :, t, :, None])[..., 0]
        dv[:, :, t] = (k[:, :, t, None, :] @ d)[..., 0, :]
        dg[:, :, t] = decay_BHT[:, :, t] * (before[t] * d).sum((-1, -2))
        d = decay_BHT[:, :, t, None, None] * d
        if segments_BT is not None:
            d = torch.where(continues(segments_BT, t), d, 0)
    if G != H:
        dq, dk = (x.unflatten(1, (G, H // G)).sum(2) for x in (dq, dk))
    dq, dk, dv = (x.to(v_BHTV.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (dq, dk, dv))
    return dq, dk, dv, dg, d.clone()
