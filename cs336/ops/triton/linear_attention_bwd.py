"""The backward of linear attention in chunks: gradients of the states walk back, then all chunks side by side.

With S the state before a chunk and dS the gradient of that after it, which a walk back leaves,

    dP_ij = exp(c_i - c_j) do_i v_j        dq = scale (dP k + exp(c) do S^T)        dv = P^T do + exp(c_C - c) k dS
                                           dk = scale dP^T q + exp(c_C - c) v dS^T
    dg_t = sum_{i >= t in the chunk} (q_i dq_i - k_i dk_i) + <S', dS>               S' the state after the chunk
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import dot, rows_of
from cs336.ops.triton.cast import cast
from cs336.ops.triton.linear_attention import (
    decays,
    inner_decay,
    load_columns,
    load_state,
    plan,
    store_columns,
    strides,
    walk,
)


@triton.jit
def _grads_kernel(
    do_ptr,  # (B, H, T, V)
    q_ptr,  # (B, G, T, K)
    k_ptr,
    v_ptr,  # (B, H, T, V)
    g_ptr,  # (B, H, T) float32, or None
    segments_ptr,  # (B, T), or None
    states_ptr,  # (B, H, N, K, V)
    dstates_ptr,
    dq_ptr,  # like q
    dk_ptr,
    dv_ptr,  # like v
    dg_ptr,  # (B, H, T) float32, contiguous
    do_b, do_h, do_stride, q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride,
    dq_b, dq_h, dq_stride, dv_b, dv_h, dv_stride, g_b, g_h, g_stride, segments_b,
    G, group, T, K, V, scale,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A chunk of one head of the keys, for all heads of values that read it."""
    FINE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    n = tl.program_id(0)
    start, num_chunks = n * CHUNK, tl.cdiv(T, CHUNK)
    b, first = tl.program_id(1) // G, tl.program_id(1) % G
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    q_ptr = rows_of(q_ptr, b, first, 0, q_b, q_h, q_stride)
    k_ptr = rows_of(k_ptr, b, first, 0, k_b, k_h, k_stride)
    q = load_columns(q_ptr, q_stride, start, T, 0, K, CHUNK, BLOCK_K)
    k = load_columns(k_ptr, k_stride, start, T, 0, K, CHUNK, BLOCK_K)
    scores = dot(q, tl.trans(k)) * scale
    dq_all = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk_all = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    index = start + tl.arange(0, CHUNK)
    for h in range(first * group, (first + 1) * group):
        head = tl.cast(b, tl.int64) * G * group + h
        head_g = g_ptr
        if g_ptr is not None:
            head_g = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
        c, into, out, through, run, last, fresh = decays(head_g, g_stride, segments_ptr, start, T, CHUNK, FINE)
        inner = inner_decay(c, run, CHUNK)
        p = cast(scores * inner, q.dtype)
        head_do = rows_of(do_ptr, b, h, 0, do_b, do_h, do_stride)
        head_v = rows_of(v_ptr, b, h, 0, v_b, v_h, v_stride)
        head_dv = rows_of(dv_ptr, b, h, 0, dv_b, dv_h, dv_stride)
        dp = tl.zeros((CHUNK, CHUNK), tl.float32)
        dq = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        dk = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        along = 0.0
        for v0 in range(0, V, BLOCK_V):
            do = load_columns(head_do, do_stride, start, T, v0, V, CHUNK, BLOCK_V)
            v = load_columns(head_v, v_stride, start, T, v0, V, CHUNK, BLOCK_V)
            state = load_state(states_ptr + (head * num_chunks + n) * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
            d = load_state(dstates_ptr + (head * num_chunks + n) * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
            dp += dot(do, tl.trans(v))
            dq += dot(do, tl.trans(state))
            dk += dot(v, tl.trans(d))
            along += tl.sum(tl.sum(state.to(tl.float32) * d.to(tl.float32), 1), 0)
            dv = dot(tl.trans(p), do) + dot(k, d) * out[:, None]
            store_columns(head_dv, dv_stride, dv, start, T, v0, V, CHUNK, BLOCK_V)
        dp = cast(dp * inner * scale, q.dtype)
        dk = dk * out[:, None]
        along = along * through + tl.sum(tl.sum(k.to(tl.float32) * dk, 1), 0)
        dq = dq * (into * scale)[:, None] + dot(dp, k)
        dk += dot(tl.trans(dp), q)
        share = tl.sum(q.to(tl.float32) * dq, 1) - tl.sum(k.to(tl.float32) * dk, 1)
        i = tl.arange(0, CHUNK)
        later = (i[None, :] >= i[:, None]) & (run[None, :] == run[:, None])
        dg = tl.sum(tl.where(later, share[None, :], 0.0), 1) + tl.where(run == last, along, 0.0)
        dg = tl.where(fresh, 0.0, dg)  # there is nothing to decay
        tl.store(dg_ptr + head * T + index, dg, mask=index < T)
        dq_all += dq
        dk_all += dk
    dq_ptr = rows_of(dq_ptr, b, first, 0, dq_b, dq_h, dq_stride)
    dk_ptr = rows_of(dk_ptr, b, first, 0, dq_b, dq_h, dq_stride)
    store_columns(dq_ptr, dq_stride, dq_all, start, T, 0, K, CHUNK, BLOCK_K)
    store_columns(dk_ptr, dq_stride, dk_all, start, T, 0, K, CHUNK, BLOCK_K)


def bwd(do, dlast, q, k, v, g, state, segments, scale):
    (B, H, T, V), (_, G, _, K) = v.shape, q.shape
    segments = segments if segments is None or segments.stride(-1) == 1 else segments.contiguous()
    segments_b = 0 if segments is None else segments.stride(0)
    cuts, group = plan(K, V, v.dtype, v.device), H // G
    before, _ = walk(k, v, g, state, segments, cuts["walk"])
    dstates, dfirst = walk(q, do, g, dlast, segments, cuts["walk"], scale, back=True)
    dq, dk = (q.new_empty(B, T, G, K).transpose(1, 2) for _ in range(2))
    dv = v.new_empty(B, T, H, V).transpose(1, 2)
    dg = v.new_empty(B, H, T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _grads_kernel[(before.shape[2], B * G)](
            do, q, k, v, g, segments, before, dstates, dq, dk, dv, dg,
            *strides(do), *strides(q), *strides(k), *strides(v), *strides(dq), *strides(dv), *strides(g), segments_b,
            G, group, T, K, V, scale, **cuts["grads"],
        )  # fmt: skip
    return dq, dk, dv, dg, dfirst
