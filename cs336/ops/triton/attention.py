"""Attention's forward in Triton, for any GPU that Triton knows and, interpreted, for the CPU.   arXiv:2307.08691

A program takes BLOCK_M queries of one head and walks the keys that they may see, BLOCK_N at a time, with a running
maximum m, sum l and output: tiles that causality or a window hides are never touched, and only those at an edge are
masked. With causality the longest rows start first. A row's sums depend on its own sequence alone.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import (
    blocks,
    dot,
    geometry,
    kept,
    load,
    lse_strides,
    modifiers,
    ranges,
    rows_of,
    scores,
    sequence,
    strides,
    tile,
    visible,
)
from cs336.ops.triton.cast import cast

# BLOCK_M, BLOCK_N, warps, stages, rows of q in shared memory, rows of k and v a stage
TABLE = {
    "16-bit": {
        64: [(128, 64, 4, 3, 128, 128)],
        128: [(128, 64, 8, 3, 128, 128), (128, 64, 8, 2, 128, 128), (64, 32, 4, 2, 64, 64)],
        256: [(128, 64, 8, 2, 128, 128), (64, 32, 4, 2, 64, 64), (64, 32, 4, 1, 64, 64)],
    },
    "float32": {
        64: [(64, 32, 4, 2, 64, 64)],
        128: [(64, 32, 4, 2, 64, 64), (32, 32, 4, 1, 32, 64)],
        256: [(32, 32, 4, 1, 32, 64), (16, 16, 4, 1, 16, 32)],
    },
}


@triton.jit
def _walk(
    acc, m, l, q, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
    lo, hi, T, query, position, head, slope, inner, outer, left, right, threshold,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, ALIBI: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys lo to hi; every query sees all of them if WHOLE."""
    for start in range(lo, hi, BLOCK_N):
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        k = load(k_ptr, k_stride, start, T, D, BLOCK_N, BLOCK_D, WHOLE)
        s, _ = scores(dot(q, tl.trans(k)), position, key, slope, inner, outer, CAPPED, ALIBI)
        if not WHOLE:
            s = tl.where(visible(position, key, T, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: exp2(-inf - -inf) would be NaN
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        l = l * alpha + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(kept(seed_ptr, query, key, head, threshold), p, 0.0)
        v = load(v_ptr, v_stride, start, T, E, BLOCK_N, BLOCK_E, WHOLE)
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)
        m = m_new
    return acc, m, l


@triton.jit
def _fwd_kernel(
    q_ptr,  # (B, Hq, S, D), or a pack (Tq, Hq, D); and so on
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,  # (B, Hq, S), or (Hq, Tq)
    cu_q_ptr,  # (B + 1,) or None
    cu_k_ptr,
    q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride, o_b, o_h, o_stride, lse_b, lse_h,
    Hq, group, S, T, rows, keys,
    alibi_ptr, alibi_stride, seed_ptr, threshold, kept_scale, inner, outer, left, right,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(S, BLOCK_M)
    head = tl.program_id(0) // num_tiles  # of all sequences
    b, h = head // Hq, head % Hq
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    first_q, S = sequence(cu_q_ptr, b, S, rows)
    first_k, T = sequence(cu_k_ptr, b, T, keys)
    if start >= S:
        return
    q_ptr = rows_of(q_ptr, b, h, first_q, q_b, q_h, q_stride)
    k_ptr = rows_of(k_ptr, b, h // group, first_k, k_b, k_h, k_stride)
    v_ptr = rows_of(v_ptr, b, h // group, first_k, v_b, v_h, v_stride)
    o_ptr = rows_of(o_ptr, b, h, first_q, o_b, o_h, o_stride)
    lse_ptr = rows_of(lse_ptr, b, h, first_q, lse_b, lse_h, 1)
    ALIBI: tl.constexpr = alibi_ptr is not None
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_ptr + b * alibi_stride + h) * 1.4426950408889634

    index = start + tl.arange(0, BLOCK_M)
    query, position = index[:, None], (index + T - S)[:, None]
    q = load(q_ptr, q_stride, start, S, D, BLOCK_M, BLOCK_D, False)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum(start + BLOCK_M, S) - 1
    lo, a, z, end = ranges(start + T - S, last + T - S, left, right, T, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, m, l = _walk(
            acc, m, l, q, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
            lo, tl.minimum(a, end), T, query, position, head, slope, inner, outer, left, right, threshold,
            D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
        )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, q, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
        a, z, T, query, position, head, slope, inner, outer, left, right, threshold,
        D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, True,
    )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, q, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
        z, end, T, query, position, head, slope, inner, outer, left, right, threshold,
        D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
    )  # fmt: skip

    some = tl.where(l == 0.0, 1.0, l)  # 0 where a query sees nothing
    o = acc * (kept_scale / some)[:, None]
    inside = (index < S)[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]
    tl.store(tile(o_ptr, o_stride, start, BLOCK_M, BLOCK_E), cast(o, o_ptr.dtype.element_ty), mask=inside)
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(some)) * 0.6931471805599453)
    tl.store(lse_ptr + index, lse, mask=index < S)


def general_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    g = geometry(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if cu_seqlens_q is None:
        o = q.new_empty(g["B"], g["S"], g["Hq"], g["E"]).transpose(1, 2)
        lse = q.new_empty(g["B"], g["Hq"], g["S"], dtype=torch.float32)
    else:
        o = q.new_empty(g["rows"], g["Hq"], g["E"])
        lse = q.new_empty(g["Hq"], g["rows"], dtype=torch.float32)
    plan = blocks(TABLE, g["D"], g["E"], q.dtype, q.device)
    at_run, compiled_in = modifiers(*options)
    dropout_p = options[6] if len(options) > 6 else 0.0
    programs = triton.cdiv(g["S"], plan["BLOCK_M"]) * g["B"] * g["Hq"]
    if programs:
        with torch.cuda.device_of(q):
            _fwd_kernel[(programs,)](
                q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k,
                *strides(q), *strides(k), *strides(v), *strides(o), *lse_strides(lse),
                g["Hq"], g["Hq"] // g["Hkv"], g["S"], g["T"], g["rows"], g["keys"],
                kept_scale=1 / (1 - dropout_p), D=g["D"], E=g["E"], **at_run, **compiled_in, **plan,
            )  # fmt: skip
    return o, lse


def fwd(q, k, v, *options):
    return general_fwd(q, k, v, None, None, 0, 0, *options)


varlen_fwd = general_fwd
