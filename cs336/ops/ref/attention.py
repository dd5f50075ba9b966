"""Attention in plain torch, fp32 inside (fp64 for float64), any device: the whole (B, Hq, S, T) score matrix.

    s = scale q k^T,  s = softcap tanh(s / softcap),  s = s + mask - slope |i + T - S - j|,  hidden keys: -inf
    lse = log sum_j exp(s)      p = exp(s - lse)      o = dropout(p) v

`fwd` is differentiable by autograd; `bwd` is what the kernels compute. The varlen pair runs each sequence by itself.
"""

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cs336.ops.ref.philox import philox


def fwd(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    mask: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """o (B, Hq, S, E) stored as (B, S, Hq, E), lse (B, Hq, S). first_batch counts dropout's sequences."""
    (B, Hq, S, _), T = q_BHSD.shape, k_BHTD.shape[2]
    q, k, v = (_wide(x) for x in (q_BHSD, k_BHTD, v_BHTE))
    k, v = (_for_each_query_head(x, Hq) for x in (k, v))
    with _full_precision(q.device):
        s_BHST = _bounded(q @ k.transpose(-1, -2) * scale, softcap)
        if alibi_slopes is not None:
            s_BHST = s_BHST + _alibi(alibi_slopes, S, T)
        if mask is not None and mask.dtype != torch.bool:
            s_BHST = s_BHST + mask
        allowed = visible(S, T, causal, window_left, window_right, mask, q.device)
        if allowed is not None:
            s_BHST = s_BHST.masked_fill(~allowed, torch.finfo(q.dtype).min)
        p_BHST, lse_BHS = torch.softmax(s_BHST, -1), torch.logsumexp(s_BHST, -1)
        if allowed is not None:  # a row that sees nothing is zero, not NaN
            p_BHST = p_BHST.masked_fill(~allowed, 0.0)
            lse_BHS = lse_BHS.masked_fill(~allowed.any(-1), -torch.inf)
        if dropout_p > 0:
            p_BHST = p_BHST * _dropout(seed, dropout_p, first_batch, (B, Hq, S, T))
        return _stored_by_token((p_BHST @ v).to(q_BHSD.dtype)), lse_BHS


def bwd(
    do_BHSE: Tensor,
    dlse_BHS: Tensor | None,
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    o_BHSE: Tensor,
    lse_BHS: Tensor,
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    deterministic: bool,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, stored by token. Always deterministic."""
    (B, Hq, S, _), (_, Hkv, T, _) = q_BHSD.shape, k_BHTD.shape
    do, q, k, v, o = (_wide(x) for x in (do_BHSE, q_BHSD, k_BHTD, v_BHTE, o_BHSE))
    k, v = (_for_each_query_head(x, Hq) for x in (k, v))
    with _full_precision(q.device):
        s_BHST = bounded_BHST = _bounded(q @ k.transpose(-1, -2) * scale, softcap)
        if alibi_slopes is not None:
            s_BHST = s_BHST + _alibi(alibi_slopes, S, T)
        p_BHST = torch.exp(s_BHST - lse_BHS[..., None])
        allowed = visible(S, T, causal, window_left, window_right, None, q.device)
        if allowed is not None:
            p_BHST = p_BHST.masked_fill(~allowed, 0.0)
        dp_BHST, dropped_BHST = do @ v.transpose(-1, -2), p_BHST
        if dropout_p > 0:
            kept_BHST = _dropout(seed, dropout_p, first_batch, (B, Hq, S, T))
            dp_BHST, dropped_BHST = dp_BHST * kept_BHST, p_BHST * kept_BHST
        delta_BHS = (do * o).sum(-1)
        if dlse_BHS is not None:
            delta_BHS = delta_BHS - dlse_BHS
        ds_BHST = p_BHST * (dp_BHST - delta_BHS[..., None]) * scale
        if softcap > 0:
            ds_BHST = ds_BHST * (1 - (bounded_BHST / softcap).square())
        dq = ds_BHST @ k
        dk, dv = (
            (x_BHST.transpose(-1, -2) @ y).unflatten(1, (Hkv, Hq // Hkv)).sum(2)
            for x_BHST, y in ((ds_BHST, q), (dropped_BHST, do))
        )
    return tuple(_stored_by_token(g.to(q_BHSD.dtype)) for g in (dq, dk, dv))  # type: ignore[return-value]


def varlen_fwd(q_THD, k_THD, v_THE, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **more):
    """o (Tq, Hq, E), lse (Hq, Tq); rows of no sequence are 0 and -inf."""
    o_THE = q_THD.new_zeros(*q_THD.shape[:2], v_THE.shape[-1])
    lse_HT = _wide(q_THD).new_full((q_THD.shape[1], q_THD.shape[0]), -torch.inf)
    for n, (in_q, in_k) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        args = _heads_first(q_THD[in_q], k_THD[in_k], v_THE[in_k])
        o, lse_HT[None, :, in_q] = fwd(*args, *options, **_of_sequence(n, **more))
        o_THE[in_q] = o[0].transpose(0, 1)
    return o_THE, lse_HT


def varlen_bwd(
    do, dlse, q_THD, k_THD, v_THE, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, **more
):
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_THD, v_THE)]
    for n, (in_q, in_k) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        do_n, q, k, v, o_n = _heads_first(do[in_q], q_THD[in_q], k_THD[in_k], v_THE[in_k], o[in_q])
        dlse_n, lse_n = None if dlse is None else dlse[None, :, in_q], lse[None, :, in_q]
        for whole, rows, part in zip(
            grads,
            (in_q, in_k, in_k),
            bwd(do_n, dlse_n, q, k, v, o_n, lse_n, *options, **_of_sequence(n, **more)),
            strict=True,
        ):
            whole[rows] = part[0].transpose(0, 1)
    return tuple(grads)


def general_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    """With ALiBi and dropout: `options` go on after the soft-cap. A batch where cu_seqlens are None, else packed."""
    more = dict(zip(("alibi_slopes", "dropout_p", "seed"), options[-3:], strict=True))
    if cu_seqlens_q is None:
        return fwd(q, k, v, *options[:-3], **more)
    return varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options[:-3], **more)


def general_bwd(do, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    more = dict(zip(("alibi_slopes", "dropout_p", "seed"), options[-3:], strict=True))
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    if cu_seqlens_q is None:
        return bwd(do, dlse, q, k, v, o, lse, *options[:-3], **more)
    return varlen_bwd(do, dlse, q, k, v, o, lse, *packing, *options[:-3], **more)


def visible(
    S: int,
    T: int,
    causal: bool,
    window_left: int,
    window_right: int,
    mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may attend to, broadcastable to (B, Hq, S, T), or None for all of them.

    mask: boolean, or added to the scores: -inf hides a key.
    """
    allowed = mask if mask is None or mask.dtype == torch.bool else mask > -torch.inf
    right = 0 if causal else window_right
    if window_left < 0 and (right < 0 or (right == 0 and S == 1)):  # the last query sees every key before it
        return allowed
    offset_ST = torch.arange(T, device=device) - torch.arange(S, device=device)[:, None] - (T - S)
    inside_ST = offset_ST >= (-window_left if window_left >= 0 else -S - T)
    if right >= 0:
        inside_ST = inside_ST & (offset_ST <= right)
    return inside_ST if allowed is None else inside_ST & allowed


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast would cast the operands of a matmul back to 16 bits."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _for_each_query_head(x_BHTD: Tensor, Hq: int) -> Tensor:
    """Query head h reads key head h // G. Copies, for batched matmuls, so that FLOP counters see them."""
    Hkv = x_BHTD.shape[1]
    return x_BHTD if Hq == Hkv else x_BHTD.repeat_interleave(Hq // Hkv, dim=1)


def _bounded(s_BHST: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(s_BHST / softcap) if softcap > 0 else s_BHST


def _alibi(slopes: Tensor, S: int, T: int) -> Tensor:
    """Press et al. 2021, arXiv:2108.12409: -slope |distance|, (1 or B, Hq, S, T). slopes: (Hq,) or (B, Hq)."""
    positions_S = torch.arange(S, device=slopes.device) + (T - S)
    distance_ST = (positions_S[:, None] - torch.arange(T, device=slopes.device)).abs()
    return -slopes.view(-1, slopes.shape[-1], 1, 1) * distance_ST


def _dropout(seed: Tensor | None, p: float, first_batch: int, shape: tuple[int, int, int, int]) -> Tensor:
    """1 / (1 - p) where the probability of a key is kept, else 0.

    The draw for query i, key j and head h of sequence b is the first word of Philox4x32-7 (Salmon et al. 2011) at the
    counter (i, j, b Hq + h, 0), so that a kernel can make it again whatever its tiles.
    """
    assert seed is not None
    B, Hq, S, T = shape
    heads = (torch.arange(B * Hq, device=seed.device) + first_batch * Hq).view(B, Hq, 1, 1)
    i, j = torch.arange(S, device=seed.device)[:, None], torch.arange(T, device=seed.device)
    counter = [x.expand(shape) for x in (i, j, heads, torch.zeros_like(heads))]
    return (philox(seed, counter, rounds=7)[0] >= int(p * 2**32)) / (1 - p)


def _stored_by_token(x_BHSD: Tensor) -> Tensor:
    return x_BHSD.transpose(1, 2).contiguous().transpose(1, 2)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """The rows of each sequence's queries and of its keys."""
    q, k = ([slice(*pair) for pair in itertools.pairwise(cu)] for cu in (cu_seqlens_q.tolist(), cu_seqlens_k.tolist()))
    return list(zip(q, k, strict=True))


def _heads_first(*xs_THD: Tensor) -> list[Any]:
    return [x.transpose(0, 1)[None] for x in xs_THD]


def _of_sequence(n: int, alibi_slopes: Tensor | None = None, **more) -> dict:
    """The options of sequence n: its own slopes where each has some."""
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        alibi_slopes = alibi_slopes[n]
    return {"alibi_slopes": alibi_slopes, "first_batch": n, **more}
