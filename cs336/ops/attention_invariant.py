"""Causal attention of packed sequences: a query's bits depend on its sequence up to itself, and on nothing else.

That is how ops.paged_prefill adds up, which decodes and prefills too: here the keys and values are a cache whose pages
have one token each. The backward is that of ops.attention_varlen, from the log-sum-exps of this forward.
T = tokens of all sequences, N = sequences, H, Hkv = query and key-value heads, D = features of a head.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.attention_autograd import attend, autocast, check_sinks, with_sinks
from cs336.ops.attention_raw import check
from cs336.ops.dispatch import default_scale, rows, run, transformed
from cs336.ops.paged_attention import paged_prefill


def attention_invariant(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What ops.attention_varlen(..., causal=True) computes, with the bits of ops.paged_prefill.

    Args:
        q: (T, H, D) floating point; k, v: (T, Hkv, D) like q.
        cu_seqlens: (N + 1,) int32 on q's device, from 0 to T: sequence n has the rows from cu_seqlens[n] to
            cu_seqlens[n + 1].
        max_seqlen: at least the longest sequence.
        window: how many keys before its own a query sees; all if None.
        softcap, scale, sinks: as in ops.paged_prefill.

    Returns o (T, H, D) like q, differentiable once. Transforms of torch.func and forward mode take
    ops.attention_varlen's reference, whose bits are others. Raises ValueError as ops.paged_prefill does.
    """
    q, k, v = (rows(x) for x in autocast(q, k, v))
    scale = default_scale(q) if scale is None else scale
    packing = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    check(q, k, v, packing, scale, True, -1, 0, softcap or 0.0)
    if transformed():
        if sinks is not None:
            check_sinks(sinks, q.shape[1], q.device)
        left = -1 if window is None else window
        o, lse = attend("attention_varlen", q, k, v, *packing, scale, True, left, 0, softcap or 0.0)
        return o if sinks is None else with_sinks(o.transpose(0, 1), lse, sinks)[0].transpose(0, 1)
    return _AttentionInvariant.apply(q, k, v, sinks, cu_seqlens, max_seqlen, window, softcap, scale)


class _AttentionInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks, cu_seqlens, max_seqlen, *options) -> Tensor:
        window, softcap, scale = options
        first_N1 = cu_seqlens[:-1, None]
        table_NM = first_N1 + torch.arange(max_seqlen, dtype=torch.int32, device=q.device)
        how = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks, "return_lse": True}
        o, lse = paged_prefill(
            q, k[:, None], v[:, None], table_NM, cu_seqlens.diff(), cu_seqlens, max_seqlen_q=max_seqlen, **how
        )
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, sinks)
        ctx.options = max_seqlen, *options
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple:  # type: ignore[override]
        q, k, v, o, lse, cu_seqlens, sinks = ctx.saved_tensors
        max_seqlen, window, softcap, scale = ctx.options
        left, right = (-1, -1) if window is None else (window, 0)
        packing = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
        options = scale, True, left, right, softcap or 0.0, registry.is_deterministic()
        grads = run("attention_varlen_bwd", rows(do), None, q, k, v, o, lse, *packing, *options)
        dsinks = None  # whose probability is e^(sink - lse), and whose value is zero
        if sinks is not None:
            dsinks = -(torch.exp(sinks[:, None] - lse) * (do.to(lse.dtype) * o).sum(-1).T).sum(-1).to(sinks.dtype)
        return *grads, dsinks, None, None, None, None, None
