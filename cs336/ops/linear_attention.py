"""Linear attention with decay: attention without the softmax, so that a state of K V numbers stands for all tokens.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Without g that of arXiv:2006.16236, less its feature map and normaliser; with a constant g a head RetNet
(arXiv:2307.08621); with g made of the token the scalar gate of gated linear attention (arXiv:2312.06635) and Mamba-2's
state space (arXiv:2405.21060), where q is C, k is B and v is dt x. `gated_delta_rule` corrects what the state holds
under a key instead of adding to it (DeltaNet, arXiv:2406.06484; with decay arXiv:2412.06464).

In chunks of C = 64 tokens a head takes 2 C (K + V) + 4 K V FLOPs a token forward, and must move q, k, v, o, once.
B = batch, H = heads, G = heads of q and k, T = tokens, K = features of a key, V = of a value.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import chunked, recurrence, registry
from cs336.ops.checks import no_float64
from cs336.ops.dispatch import default_scale, has_kernel, recomputed
from cs336.ops.ref import linear_attention as ref
from cs336.ops.ref.wide import wide

WIDE_KEYS = 107 * 1024  # bytes of shared memory that the backward takes for keys of 256 features in float32


def _triton_refuses(q, k, v, *_) -> str | None:
    if reason := no_float64(q):
        return reason
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the Triton kernels take keys and values of up to 256 features, not {q.shape[-1]} and {v.shape[-1]}"
    if q.is_cuda and q.dtype == torch.float32 and q.shape[-1] > 128 and registry.shared_memory(q.device) < WIDE_KEYS:
        return f"keys of {q.shape[-1]} features in float32 take {WIDE_KEYS} bytes of shared memory a block"
    return None


def _fake_bwd(do, dstate, q, k, v, g, state, segments, scale):
    stat = torch.promote_types(q.dtype, torch.float32)
    (B, H, T, V), K = v.shape, q.shape[-1]
    return (
        *(x.new_empty(B, T, *x.shape[1::2]).transpose(1, 2) for x in (q, k, v)),
        v.new_empty(B, H, T, dtype=stat),
        v.new_empty(B, H, K, V, dtype=stat),
    )


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? state, Tensor? segments, float scale"
recurrence.define(
    f"linear_attention_fwd({ARGUMENTS}) -> (Tensor o, Tensor last)",
    f"linear_attention_bwd(Tensor do, Tensor? dstate, {ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dfirst)",
    reference=ref,
    fake_bwd=_fake_bwd,
    check=recurrence.check,
    triton_refuses=_triton_refuses,
)


class _LinearAttention(recurrence.Recurrence): ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """Causal linear attention whose state decays by exp(g) a token.

    Args:
        q, k: (B, G, T, K) floating point.
        v: (B, H, T, V) like q; head h reads heads h // (H / G) of q and k.
        g: (B, H, T), log of the decay, 0 or less; none if None.
        scale: of the outputs; 1 / sqrt(K) if None.
        initial_state: (B, H, K, V), what the tokens before have come to; zeros if None.
        segments: (B, T) integers, equal ones side by side: tokens with different ones are strangers. The first sees
            the initial state.
        return_state: return the state after the last token too, (B, H, K, V) in float32 or wider.

    Returns o (B, H, T, V) like v, or (o, state). Raises ValueError for shapes, dtypes or devices that do not fit.

    On a GPU Triton's kernels; elsewhere plain torch in chunks, which the backward computes again, and one token by
    itself; the recurrence where "ref" is forced.
    """
    g, state = recurrence.bounded(g), None if initial_state is None else wide(initial_state)
    scale = default_scale(q) if scale is None else scale
    args = q, k, v, g, state, segments, scale
    recurrence.check(*args)
    if registry.forced() == "ref":
        o, last = ref.fwd(*args)
    elif v.shape[2] == 1:
        q0, k0, v0, g0, before = recurrence.first_token(q, k, v, g, state)
        o, last = ref.step(q0, k0, v0, g0, before, scale)
        o = o[:, :, None].to(v.dtype)
    elif v.numel() and has_kernel("linear_attention_fwd", *args):
        o, last = recurrence.apply(_LinearAttention, "linear_attention", *args[:-1], scale=scale)
    else:
        o, last = recomputed(chunked.linear_attention, *args)
    return (o, last) if return_state else o
