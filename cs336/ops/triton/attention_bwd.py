"""Attention's backward in Triton: two kernels that share nothing, so that every sum has one order.   arXiv:2307.08691

    delta = rowsum(do * o) - dlse                                 one pass over o
    dk, dv: a program keeps BLOCK_N keys and walks the queries of every head in the group that may see them
    dq:     a program keeps BLOCK_M queries and walks the keys that they may see

Each makes the scores again from q, k and lse: seven matmuls where a kernel with atomics has five.
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

# BLOCK_M, BLOCK_N, warps, stages, rows in shared memory, rows of two tensors a stage. With 64 queries a step dk and dv
# (128, 128) would leave too few registers: 816 bytes of spills on sm_90 where 32 queries have 296.
DKDV_TABLE = {
    "16-bit": {
        64: [(32, 128, 8, 2, 256, 64)],
        128: [(32, 128, 8, 2, 256, 64), (32, 64, 4, 2, 128, 64)],
        256: [(32, 64, 8, 2, 128, 64), (16, 32, 4, 2, 64, 32)],
    },
    "float32": {
        64: [(32, 32, 4, 2, 64, 64), (16, 32, 4, 1, 64, 32)],
        128: [(32, 32, 4, 1, 64, 64), (16, 16, 4, 1, 32, 32)],
        256: [(16, 16, 4, 1, 32, 32)],
    },
}
DQ_TABLE = {
    "16-bit": {
        64: [(128, 64, 8, 3, 256, 128), (128, 64, 8, 2, 256, 128)],
        128: [(128, 64, 8, 2, 256, 128), (64, 32, 4, 2, 128, 64)],
        256: [(64, 32, 8, 2, 128, 64), (32, 16, 4, 2, 64, 32)],
    },
    "float32": DKDV_TABLE["float32"],
}


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, cu_ptr,
    o_b, o_h, o_stride, do_b, do_h, do_stride, lse_b, lse_h, Hq, S, rows,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(S, BLOCK_M)
    head = tl.program_id(0) // num_tiles
    b, h = head // Hq, head % Hq
    start = tl.program_id(0) % num_tiles * BLOCK_M
    first, S = sequence(cu_ptr, b, S, rows)
    o_ptr = rows_of(o_ptr, b, h, first, o_b, o_h, o_stride)
    do_ptr = rows_of(do_ptr, b, h, first, do_b, do_h, do_stride)
    o = load(o_ptr, o_stride, start, S, E, BLOCK_M, BLOCK_E, False).to(tl.float32)
    do = load(do_ptr, do_stride, start, S, E, BLOCK_M, BLOCK_E, False).to(tl.float32)
    delta = tl.sum(o * do, 1)
    index = start + tl.arange(0, BLOCK_M)
    if dlse_ptr is not None:
        delta -= tl.load(rows_of(dlse_ptr, b, h, first, lse_b, lse_h, 1) + index, mask=index < S, other=0.0)
    tl.store(rows_of(delta_ptr, b, h, first, lse_b, lse_h, 1) + index, delta, mask=index < S)


@triton.jit
def _load_stats(lse_ptr, delta_ptr, index, S):
    """lse in powers of 2, and delta. Rows that do not exist or see nothing have lse = inf, and so p = 0."""
    lse = tl.load(lse_ptr + index, mask=index < S, other=float("inf")) * 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse), tl.load(delta_ptr + index, mask=index < S, other=0.0)


@triton.jit
def _dkdv_walk(
    dk, dv, k, v, q_ptr, do_ptr, q_stride, do_stride, lse_ptr, delta_ptr, seed_ptr,
    lo, hi, S, T, key, head, slope, inner, outer, left, right, threshold, kept_scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, ALIBI: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Queries lo to hi of one head; all of them see every key if WHOLE. Tiles are (keys, queries)."""
    for start in range(lo, hi, BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        query, position = index[None, :], (index + T - S)[None, :]
        q = load(q_ptr, q_stride, start, S, D, BLOCK_M, BLOCK_D, WHOLE)
        do = load(do_ptr, do_stride, start, S, E, BLOCK_M, BLOCK_E, WHOLE)
        lse, delta = _load_stats(lse_ptr, delta_ptr, index, S)
        s, t = scores(dot(k, tl.trans(q)), position, key, slope, inner, outer, CAPPED, ALIBI)
        p = tl.exp2(s - lse[None, :])
        if not WHOLE:
            p = tl.where(visible(position, key, T, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        dp = dot(v, tl.trans(do))
        dropped = p
        if seed_ptr is not None:
            keep = kept(seed_ptr, query, key, head, threshold)
            dropped = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * kept_scale, 0.0)
        dv += dot(cast(dropped, do.dtype), do)
        ds = p * (dp - delta[None, :])
        if CAPPED:
            ds *= 1.0 - t * t
        dk += dot(cast(ds, q.dtype), q)
    return dk, dv


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride, do_b, do_h, do_stride,
    dk_b, dk_h, dk_stride, dv_b, dv_h, dv_stride, lse_b, lse_h,
    Hkv, group, S, T, rows, keys,
    alibi_ptr, alibi_stride, seed_ptr, threshold, kept_scale, scale, inner, outer, left, right,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(T, BLOCK_N)
    b, h_kv = tl.program_id(0) // num_tiles // Hkv, tl.program_id(0) // num_tiles % Hkv
    start = tl.program_id(0) % num_tiles * BLOCK_N
    first_q, S = sequence(cu_q_ptr, b, S, rows)
    first_k, T = sequence(cu_k_ptr, b, T, keys)
    if start >= T:
        return
    k = load(rows_of(k_ptr, b, h_kv, first_k, k_b, k_h, k_stride), k_stride, start, T, D, BLOCK_N, BLOCK_D, False)
    v = load(rows_of(v_ptr, b, h_kv, first_k, v_b, v_h, v_stride), v_stride, start, T, E, BLOCK_N, BLOCK_E, False)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    index = start + tl.arange(0, BLOCK_N)
    key = index[:, None]
    # A query at position i - (S - T) is to a key what a key is to a query, with left and right exchanged.
    last = tl.minimum(start + BLOCK_N, T) - 1
    lo, a, z, end = ranges(start - T + S, last - T + S, right, left, S, BLOCK_M, HAS_RIGHT, HAS_LEFT)
    ALIBI: tl.constexpr = alibi_ptr is not None
    for g in range(0, group):
        h = h_kv * group + g
        head = b * Hkv * group + h
        q_rows = rows_of(q_ptr, b, h, first_q, q_b, q_h, q_stride)
        do_rows = rows_of(do_ptr, b, h, first_q, do_b, do_h, do_stride)
        lse_row = rows_of(lse_ptr, b, h, first_q, lse_b, lse_h, 1)
        delta_row = rows_of(delta_ptr, b, h, first_q, lse_b, lse_h, 1)
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi_ptr + b * alibi_stride + h) * 1.4426950408889634
        if HAS_RIGHT:
            dk, dv = _dkdv_walk(
                dk, dv, k, v, q_rows, do_rows, q_stride, do_stride, lse_row, delta_row, seed_ptr,
                lo, tl.minimum(a, end), S, T, key, head, slope, inner, outer, left, right, threshold, kept_scale,
                D, E, BLOCK_M, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
            )  # fmt: skip
        dk, dv = _dkdv_walk(
            dk, dv, k, v, q_rows, do_rows, q_stride, do_stride, lse_row, delta_row, seed_ptr,
            a, z, S, T, key, head, slope, inner, outer, left, right, threshold, kept_scale,
            D, E, BLOCK_M, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, True,
        )  # fmt: skip
        dk, dv = _dkdv_walk(
            dk, dv, k, v, q_rows, do_rows, q_stride, do_stride, lse_row, delta_row, seed_ptr,
            z, end, S, T, key, head, slope, inner, outer, left, right, threshold, kept_scale,
            D, E, BLOCK_M, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
        )  # fmt: skip
    live = (index < T)[:, None]
    dk_tile = tile(rows_of(dk_ptr, b, h_kv, first_k, dk_b, dk_h, dk_stride), dk_stride, start, BLOCK_N, BLOCK_D)
    dv_tile = tile(rows_of(dv_ptr, b, h_kv, first_k, dv_b, dv_h, dv_stride), dv_stride, start, BLOCK_N, BLOCK_E)
    tl.store(dk_tile, cast(dk * scale, dk_ptr.dtype.element_ty), mask=live & (tl.arange(0, BLOCK_D) < D)[None, :])
    tl.store(dv_tile, cast(dv * kept_scale, dv_ptr.dtype.element_ty), mask=live & (tl.arange(0, BLOCK_E) < E)[None, :])


@triton.jit
def _dq_walk(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
    lo, hi, T, query, position, head, slope, inner, outer, left, right, threshold, kept_scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, ALIBI: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys lo to hi; every query sees all of them if WHOLE."""
    for start in range(lo, hi, BLOCK_N):
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        k = load(k_ptr, k_stride, start, T, D, BLOCK_N, BLOCK_D, WHOLE)
        v = load(v_ptr, v_stride, start, T, E, BLOCK_N, BLOCK_E, WHOLE)
        s, t = scores(dot(q, tl.trans(k)), position, key, slope, inner, outer, CAPPED, ALIBI)
        p = tl.exp2(s - lse[:, None])
        if not WHOLE:
            p = tl.where(visible(position, key, T, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        dp = dot(do, tl.trans(v))
        if seed_ptr is not None:
            dp = tl.where(kept(seed_ptr, query, key, head, threshold), dp * kept_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds *= 1.0 - t * t
        dq += dot(cast(ds, k.dtype), k)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride, do_b, do_h, do_stride,
    dq_b, dq_h, dq_stride, lse_b, lse_h,
    Hq, group, S, T, rows, keys,
    alibi_ptr, alibi_stride, seed_ptr, threshold, kept_scale, scale, inner, outer, left, right,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CAPPED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(S, BLOCK_M)
    head = tl.program_id(0) // num_tiles
    b, h = head // Hq, head % Hq
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    first_q, S = sequence(cu_q_ptr, b, S, rows)
    first_k, T = sequence(cu_k_ptr, b, T, keys)
    if start >= S:
        return
    k_ptr = rows_of(k_ptr, b, h // group, first_k, k_b, k_h, k_stride)
    v_ptr = rows_of(v_ptr, b, h // group, first_k, v_b, v_h, v_stride)
    q = load(rows_of(q_ptr, b, h, first_q, q_b, q_h, q_stride), q_stride, start, S, D, BLOCK_M, BLOCK_D, False)
    do = load(rows_of(do_ptr, b, h, first_q, do_b, do_h, do_stride), do_stride, start, S, E, BLOCK_M, BLOCK_E, False)
    index = start + tl.arange(0, BLOCK_M)
    query, position = index[:, None], (index + T - S)[:, None]
    lse_row = rows_of(lse_ptr, b, h, first_q, lse_b, lse_h, 1)
    lse, delta = _load_stats(lse_row, rows_of(delta_ptr, b, h, first_q, lse_b, lse_h, 1), index, S)
    ALIBI: tl.constexpr = alibi_ptr is not None
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi_ptr + b * alibi_stride + h) * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(start + BLOCK_M, S) - 1
    lo, a, z, end = ranges(start + T - S, last + T - S, left, right, T, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        dq = _dq_walk(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
            lo, tl.minimum(a, end), T, query, position, head, slope, inner, outer, left, right, threshold, kept_scale,
            D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
        )  # fmt: skip
    dq = _dq_walk(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
        a, z, T, query, position, head, slope, inner, outer, left, right, threshold, kept_scale,
        D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, True,
    )  # fmt: skip
    dq = _dq_walk(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_stride, v_stride, seed_ptr,
        z, end, T, query, position, head, slope, inner, outer, left, right, threshold, kept_scale,
        D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, ALIBI, HAS_LEFT, HAS_RIGHT, False,
    )  # fmt: skip
    dq_tile = tile(rows_of(dq_ptr, b, h, first_q, dq_b, dq_h, dq_stride), dq_stride, start, BLOCK_M, BLOCK_D)
    inside = (index < S)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(dq_tile, cast(dq * scale, dq_ptr.dtype.element_ty), mask=inside)


def general_bwd(do, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
    scale, causal, left, right, softcap, _deterministic, *extras = options
    g = geometry(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dq, dk, dv = (_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    at_run, compiled_in = modifiers(scale, causal, left, right, softcap, *extras)
    at_run |= {"scale": scale, "kept_scale": 1 / (1 - extras[1]) if extras else 1.0}
    inputs = q, k, v, do, lse, delta
    sizes = g["Hq"] // g["Hkv"], g["S"], g["T"], g["rows"], g["keys"]
    where = *strides(q), *strides(k), *strides(v), *strides(do)
    widths = {"D": g["D"], "E": g["E"]}
    queries, keys = g["S"] * g["B"] * g["Hq"], g["T"] * g["B"] * g["Hkv"]
    with torch.cuda.device_of(q):
        if queries:
            block_e = max(16, triton.next_power_of_2(g["E"]))
            _delta_kernel[(triton.cdiv(g["S"], 32) * g["B"] * g["Hq"],)](
                o, do, dlse, delta, cu_seqlens_q, *strides(o), *strides(do), *lse_strides(lse), g["Hq"], g["S"],
                g["rows"], E=g["E"], BLOCK_M=32, BLOCK_E=block_e,
            )  # fmt: skip
        if keys:
            plan = blocks(DKDV_TABLE, g["D"], g["E"], q.dtype, q.device)
            _dkdv_kernel[(triton.cdiv(g["T"], plan["BLOCK_N"]) * g["B"] * g["Hkv"],)](
                *inputs, dk, dv, cu_seqlens_q, cu_seqlens_k, *where, *strides(dk), *strides(dv), *lse_strides(lse),
                g["Hkv"], *sizes, **widths, **at_run, **compiled_in, **plan,
            )  # fmt: skip
        if queries:
            plan = blocks(DQ_TABLE, g["D"], g["E"], q.dtype, q.device)
            _dq_kernel[(triton.cdiv(g["S"], plan["BLOCK_M"]) * g["B"] * g["Hq"],)](
                *inputs, dq, cu_seqlens_q, cu_seqlens_k, *where, *strides(dq), *lse_strides(lse),
                g["Hq"], *sizes, **widths, **at_run, **compiled_in, **plan,
            )  # fmt: skip
    return dq, dk, dv


def _like(x):
    """Uninitialised, like x, stored by token."""
    return (
        x.new_empty(x.shape) if x.dim() == 3 else x.transpose(1, 2).new_empty(x.transpose(1, 2).shape).transpose(1, 2)
    )


def bwd(do, dlse, q, k, v, o, lse, *options):
    return general_bwd(do, dlse, q, k, v, o, lse, None, None, 0, 0, *options)


varlen_bwd = general_bwd
