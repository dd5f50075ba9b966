"""Linear recurrences in chunks of tokens: matmuls inside one, a state from one to the next; plain torch, fp32 inside.

Inside a chunk, with c_i the sum of the log-decays up to token i (Mamba-2's state-space duality, arXiv:2405.21060,
which is RetNet's chunkwise form, arXiv:2307.08621):

    o_i = scale (exp(c_i) S^T q_i + sum_{j <= i} exp(c_i - c_j) (q_i k_j) v_j)
    S  <- exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T

The delta rule writes corrected values in place of v (the WY form, arXiv:2406.06484, with decay arXiv:2412.06464):
u - W S, where (I + A) [u, W] = [beta v, beta exp(c) k] and A_ij = beta_i exp(c_i - c_j) k_i k_j below the diagonal.

B = batch, H = heads, T = tokens, N = chunks, C = tokens of a chunk, K = features of a key, V = of a value.
"""

import torch
from torch import Tensor

from cs336.ops.ref.linear_attention import heads, start
from cs336.ops.ref.wide import wide

CHUNK = 64  # tokens: the work inside a chunk grows with it, the number of steps from chunk to chunk falls


def linear_attention(
    q_BGTK: Tensor,
    k_BGTK: Tensor,
    v_BHTV: Tensor,
    g_BHT: Tensor | None,
    state_BHKV: Tensor | None,
    segments_BT: Tensor | None,
    scale: float,
    beta_BHT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) like v and the state after the last token; with beta by the delta rule."""
    (_, H, T, _), like = v_BHTV.shape, v_BHTV
    if T == 0:
        return v_BHTV.clone(), start(heads(wide(k_BGTK), H), v_BHTV, state_BHKV)
    q, k, v = (_cut(heads(wide(x), H)) for x in (q_BGTK, k_BGTK, v_BHTV))
    g_BHNC = None if g_BHT is None else _cut(wide(g_BHT)[..., None])[..., 0]
    causal_CC = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=v.device).tril()
    enters, leaves, goes_through = None, None, None
    if segments_BT is not None:
        run_BNC = _cut(segments_BT[:, None, :, None].expand(-1, 1, -1, -1), last=True)[:, :, :, :, 0]  # (B, 1, N, C)
        causal_CC = causal_CC & (run_BNC[..., :, None] == run_BNC[..., None, :])
        before = torch.cat((run_BNC[:, :, :1, 0], run_BNC[:, :, :-1, -1]), 2)[..., None]  # the run before each chunk
        enters, leaves = run_BNC == before, run_BNC == run_BNC[..., -1:]
        goes_through = enters & leaves
    if g_BHNC is None:
        c_BHNC = v.new_zeros(v.shape[:-1])
    elif segments_BT is None:
        c_BHNC = g_BHNC.cumsum(-1)
    else:  # from the segment's start, so that what was before it does not even change how this is rounded
        c_BHNC = torch.where(causal_CC, g_BHNC[..., None, :], 0).sum(-1)
    decay = torch.exp((c_BHNC[..., :, None] - c_BHNC[..., None, :]).masked_fill(~causal_CC, -torch.inf))
    with _full_precision(v.device):
        p = q @ k.transpose(-1, -2) * decay
        into, out = torch.exp(c_BHNC), torch.exp(c_BHNC[..., -1:] - c_BHNC)
        through = into[..., -1]
        if enters is not None and leaves is not None and goes_through is not None:
            into, out, through = into * enters, out * leaves, through * goes_through[..., -1]
        q_in, k_out = q * into[..., None], k * out[..., None]
        w = None
        if beta_BHT is not None:
            beta = _cut(wide(beta_BHT)[..., None])
            a = (beta * (k @ k.transpose(-1, -2)) * decay).tril(-1)
            right = torch.cat((beta * v, beta * k * into[..., None]), -1)
            solved = torch.linalg.solve_triangular(a, right, upper=False, unitriangular=True)
            v, w = solved.split((v.shape[-1], k.shape[-1]), -1)
        state, os = start(k[:, :, 0], v, state_BHKV), []
        for n in range(v.shape[2]):
            values = v[:, :, n] if w is None else v[:, :, n] - w[:, :, n] @ state
            os.append(q_in[:, :, n] @ state + p[:, :, n] @ values)
            state = state * through[:, :, n, None, None] + k_out[:, :, n].transpose(-1, -2) @ values
    o_BHTV = scale * torch.stack(os, 2).flatten(2, 3)[:, :, :T]
    return o_BHTV.to(like.dtype), state


def _cut(x_BHTD: Tensor, last: bool = False) -> Tensor:
    """In chunks (B, H, N, C, D), filled up with zeros, or with the last token's."""
    T = x_BHTD.shape[2]
    if missing := -T % CHUNK:
        filler = x_BHTD[:, :, -1:] if last else torch.zeros_like(x_BHTD[:, :, :1])
        x_BHTD = torch.cat((x_BHTD, filler.expand(-1, -1, missing, -1)), 2)
    return x_BHTD.unflatten(2, (-1, CHUNK))


def _full_precision(device: torch.device):
    """Autocast would cast the operands of a matmul back to 16 bits."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)
