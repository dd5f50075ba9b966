"""Attention over a paged cache in plain torch, fp32 inside, a sequence at a time: its pages gathered, then
ref/attention.py, causal. A sink s of a head is one more score, with a value of zero:

    o = sum_j exp(s_j) v_j / (exp(s) + sum_j exp(s_j))
"""

import itertools

import torch
from torch import Tensor

from cs336.ops.ref import attention
from cs336.ops.ref.wide import wide


def paged_attention(
    q_BQHD: Tensor,
    k_cache_PSHD: Tensor,
    v_cache_PSHE: Tensor,
    page_table_BM: Tensor,
    seq_lens_B: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
    *orders: bool,  # of a kernel's sums
) -> tuple[Tensor, Tensor]:
    """o (B, Q, H, E), lse (B, H, Q)."""
    B, Q, H, _ = q_BQHD.shape
    o_BQHE = q_BQHD.new_zeros(B, Q, H, v_cache_PSHE.shape[-1])
    lse_BHQ = wide(q_BQHD).new_zeros(B, H, Q)
    for b, length in enumerate(seq_lens_B.tolist()):
        k, v = (gathered(cache, page_table_BM[b], length) for cache in (k_cache_PSHD, v_cache_PSHE))
        o_BQHE[b], lse_BHQ[b] = _sequence(q_BQHD[b], k, v, scale, window, softcap, sinks_H)
    return o_BQHE, lse_BHQ


def paged_prefill(
    q_THD: Tensor,
    k_cache_PSHD: Tensor,
    v_cache_PSHE: Tensor,
    page_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    softcap: float,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o (T, H, E), lse (H, T); rows of no sequence are 0 and -inf."""
    T, H, _ = q_THD.shape
    o_THE = q_THD.new_zeros(T, H, v_cache_PSHE.shape[-1])
    lse_HT = wide(q_THD).new_full((H, T), -torch.inf)
    rows = [slice(*pair) for pair in itertools.pairwise(cu_seqlens_q.tolist())]
    for b, (of_b, length) in enumerate(zip(rows, seq_lens_B.tolist(), strict=True)):
        k, v = (gathered(cache, page_table_BM[b], length) for cache in (k_cache_PSHD, v_cache_PSHE))
        o_THE[of_b], lse_HT[:, of_b] = _sequence(q_THD[of_b], k, v, scale, window, softcap, sinks_H)
    return o_THE, lse_HT


def gathered(cache_PSHD: Tensor, page_table_M: Tensor, length: int) -> Tensor:
    """The first `length` tokens of a sequence: (length, Hkv, D)."""
    num_pages = -(-length // cache_PSHD.shape[1])
    return cache_PSHD[page_table_M[:num_pages].long()].flatten(0, 1)[:length]


def _sequence(q_QHD, k_THD, v_THE, scale, window, softcap, sinks_H) -> tuple[Tensor, Tensor]:
    """o (Q, H, E) in fp32 or fp64, lse (H, Q)."""
    q, k, v = (wide(x).transpose(0, 1)[None] for x in (q_QHD, k_THD, v_THE))
    o_1HQE, lse_1HQ = attention.fwd(q, k, v, scale, True, window, 0, softcap)
    if sinks_H is not None:
        with_sink_1HQ = torch.logaddexp(lse_1HQ, sinks_H[:, None].to(lse_1HQ.dtype))
        share_1HQ = torch.exp(lse_1HQ - with_sink_1HQ).nan_to_num(0.0)  # NaN: no key, and a sink of -inf
        o_1HQE = o_1HQE * share_1HQ[..., None]
        lse_1HQ = with_sink_1HQ
    return o_1HQE[0].transpose(0, 1), lse_1HQ[0]
