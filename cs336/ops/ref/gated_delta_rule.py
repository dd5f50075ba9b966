"""The gated delta rule token by token, fp32 inside (fp64 for fp64), any device: the definition.

    S_t = exp(g_t) (S_{t-1} - beta_t k_t (k_t^T S_{t-1})) + beta_t k_t v_t^T        o_t = scale S_t^T q_t

A state S holds values under keys; the rule replaces what it holds under k_t by v_t, beta_t of the way. Shapes and
segments as in ref/linear_attention.py.
"""

import torch
from torch import Tensor

from cs336.ops.ref.linear_attention import continues, heads, run, start
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
    gates = beta_BHT, g_BHT
    return run(step, q_BGTK, k_BGTK, v_BHTV, *gates, state_BHKV=state_BHKV, segments_BT=segments_BT, scale=scale)


def bwd(
    do_BHTV: Tensor,
    dstate_BHKV: Tensor | None,
    q_BGTK: Tensor,
    k_BGTK: Tensor,
    v_BHTV: Tensor,
    beta_BHT: Tensor,
    g_BHT: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbeta and dg (B, H, T), and the gradient of the state before the first token."""
    (_, H, T, _), G = v_BHTV.shape, q_BGTK.shape[1]
    q, k, v, do = heads(wide(q_BGTK), H), heads(wide(k_BGTK), H), wide(v_BHTV), wide(do_BHTV)
    decay_BHT = torch.ones_like(v[..., 0]) if g_BHT is None else torch.exp(g_BHT)
    state, before = start(k, v, state_BHKV), []
    for t in range(T):
        if segments_BT is not None:
            state = torch.where(continues(segments_BT, t), state, 0)
        before.append(state)
        g_BH = None if g_BHT is None else g_BHT[:, :, t]
        _, state = step(q[:, :, t], k[:, :, t], v[:, :, t], beta_BHT[:, :, t], g_BH, state, scale)
    d = torch.zeros_like(state) if dstate_BHKV is None else dstate_BHKV.to(state.dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbeta, dg = torch.zeros_like(decay_BHT), torch.zeros_like(decay_BHT)
    for t in reversed(range(T)):
        k_t, beta_t, decay_t = k[:, :, t], beta_BHT[:, :, t, None], decay_BHT[:, :, t, None, None]
        faded = decay_t * before[t]
        missing = v[:, :, t] - _read(faded, k_t)
        after = faded + k_t[..., None] * (beta_t * missing)[..., None, :]
        dq[:, :, t] = scale * _under(after, do[:, :, t])
        d = d + scale * q[:, :, t, :, None] * do[:, :, t, None, :]
        dwritten = _read(d, k_t)
        dv[:, :, t] = beta_t * dwritten
        dbeta[:, :, t] = (missing * dwritten).sum(-1)
        dk[:, :, t] = _under(d, beta_t * missing) - _under(faded, beta_t * dwritten)
        d = d - k_t[..., None] * (beta_t * dwritten)[..., None, :]
        dg[:, :, t] = (faded * d).sum((-1, -2))
        d = decay_t * d
        if segments_BT is not None:
            d = torch.where(continues(segments_BT, t), d, 0)
    if G != H:
        dq, dk = (x.unflatten(1, (G, H // G)).sum(2) for x in (dq, dk))
    return *(x.to(v_BHTV.dtype).contiguous() for x in (dq, dk, dv)), dbeta, dg, d.clone()


def _read(state_BHKV: Tensor, k_BHK: Tensor) -> Tensor:
    return (k_BHK[..., None, :] @ state_BHKV)[..., 0, :]


def _under(state_BHKV: Tensor, v_BHV: Tensor) -> Tensor:
    return (state_BHKV @ v_BHV[..., None])[..., 0]
