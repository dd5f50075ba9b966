"""The backward of the gated delta rule: what chunks can do by themselves, then gradients of the states walk back, then
all chunks side by side.

With S the state before a chunk, dS the gradient of that after it, x = u - W S and P_ij = scale exp(c_i - c_j) q_i k_j:

    dx = P^T do + exp(c_C - c) k dS        dS <- exp(c_C) dS + scale (exp(c) q)^T do - W^T dx        dW = -dx S^T
    [y, z] = (I + A)^-T [dx, dW]           dA = -(y u^T + z W^T) below the diagonal
    dv = beta y        dbeta_i = v_i y_i + exp(c_i) k_i z_i + sum_j dA_ij A_ij / beta_i

and dq, dk, dg as linear attention's, of x in place of v, with what z and dA add to dk and to the decays.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import dot, rows_of
from cs336.ops.triton.cast import cast
from cs336.ops.triton.gated_delta_rule import below_diagonal, corrected, load_beta, plan
from cs336.ops.triton.linear_attention import (
    decays,
    inner_decay,
    load_columns,
    load_state,
    scaled,
    store_columns,
    store_state,
    strides,
)


@triton.jit
def _local_kernel(
    do_ptr,  # (B, H, T, V)
    q_ptr,  # (B, G, T, K)
    k_ptr,
    g_ptr,  # (B, H, T) float32, or None
    segments_ptr,  # (B, T), or None
    read_ptr,  # (B, H, T, K), contiguous: what the queries read of the state before their chunk, scale exp(c) q
    dx_ptr,  # (B, H, T, V), contiguous: P^T do
    do_b, do_h, do_stride, q_b, q_h, q_stride, k_b, k_h, k_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V, scale,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * CHUNK, tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    do_ptr = rows_of(do_ptr, b, h, 0, do_b, do_h, do_stride)
    q_ptr = rows_of(q_ptr, b, h // group, 0, q_b, q_h, q_stride)
    k_ptr = rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride)
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    FINE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    c, into, _, _, run, _, _ = decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK, FINE)
    q = load_columns(q_ptr, q_stride, start, T, 0, K, CHUNK, BLOCK_K)
    k = load_columns(k_ptr, k_stride, start, T, 0, K, CHUNK, BLOCK_K)
    store_columns(read_ptr + head * T * K, K, scaled(q, scale * into), start, T, 0, K, CHUNK, BLOCK_K)
    p = cast(dot(q, tl.trans(k)) * inner_decay(c, run, CHUNK) * scale, q.dtype)
    for v0 in range(0, V, BLOCK_V):
        do = load_columns(do_ptr, do_stride, start, T, v0, V, CHUNK, BLOCK_V)
        store_columns(dx_ptr + head * T * V, V, dot(tl.trans(p), do), start, T, v0, V, CHUNK, BLOCK_V)


@triton.jit
def _walk_back_kernel(
    do_ptr,  # (B, H, T, V)
    read_ptr,  # (B, H, T, K), contiguous, as all but do
    left_ptr,  # (B, H, T, K)
    w_ptr,  # (B, H, T, K)
    through_ptr,  # (B, H, N) float32
    dlast_ptr,  # (B, H, K, V) float32, or None
    dstates_ptr,  # (B, H, N, K, V): of the state after each chunk
    dx_ptr,  # (B, H, T, V): P^T do becomes dx
    dfirst_ptr,  # (B, H, K, V) float32
    do_b, do_h, do_stride,
    H, T, K, V,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v0, head = tl.program_id(0) * BLOCK_V, tl.program_id(1).to(tl.int64)
    do_ptr = rows_of(do_ptr, tl.program_id(1) // H, tl.program_id(1) % H, 0, do_b, do_h, do_stride)
    num_chunks = tl.cdiv(T, CHUNK)
    d = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if dlast_ptr is not None:
        d = load_state(dlast_ptr + head * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
    for i in range(0, num_chunks):
        n = num_chunks - 1 - i
        store_state(dstates_ptr + (head * num_chunks + n) * K * V, d, 0, v0, K, V, BLOCK_K, BLOCK_V)
        start = n * CHUNK
        through = tl.load(through_ptr + head * num_chunks + n)
        read = load_columns(read_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        left = load_columns(left_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        w = load_columns(w_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        do = load_columns(do_ptr, do_stride, start, T, v0, V, CHUNK, BLOCK_V)
        local = load_columns(dx_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        dx = cast(local.to(tl.float32) + dot(left, cast(d, left.dtype)), w.dtype)
        store_columns(dx_ptr + head * T * V, V, dx, start, T, v0, V, CHUNK, BLOCK_V)
        d = d * through + dot(tl.trans(read), do) - dot(tl.trans(w), dx)
    store_state(dfirst_ptr + head * K * V, d, 0, v0, K, V, BLOCK_K, BLOCK_V)


@triton.jit
def _grads_kernel(
    do_ptr,  # (B, H, T, V)
    q_ptr,  # (B, G, T, K)
    k_ptr,
    v_ptr,  # (B, H, T, V)
    beta_ptr,  # (B, H, T) float32
    g_ptr,
    segments_ptr,
    inverse_ptr,  # (B, H, N, CHUNK, CHUNK)
    w_ptr,  # (B, H, T, K), contiguous, as all that follows
    u_ptr,  # (B, H, T, V)
    x_ptr,
    dx_ptr,
    states_ptr,  # (B, H, N, K, V)
    dstates_ptr,
    dq_ptr,  # (B, H, T, K)
    dk_ptr,
    dv_ptr,  # (B, H, T, V)
    dbeta_ptr,  # (B, H, T) float32
    dg_ptr,
    do_b, do_h, do_stride, q_b, q_h, q_stride, k_b, k_h, k_stride, v_b, v_h, v_stride,
    beta_b, beta_h, beta_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V, scale,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A chunk of one head."""
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    start, chunk = n * CHUNK, head * tl.cdiv(T, CHUNK) + n
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    do_ptr = rows_of(do_ptr, b, h, 0, do_b, do_h, do_stride)
    v_ptr = rows_of(v_ptr, b, h, 0, v_b, v_h, v_stride)
    FINE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    c, into, out, through, run, last, fresh = decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK, FINE)
    inner = inner_decay(c, run, CHUNK)
    beta = load_beta(rows_of(beta_ptr, b, h, 0, beta_b, beta_h, beta_stride), beta_stride, start, T, CHUNK)
    inverse = load_state(inverse_ptr + chunk * CHUNK * CHUNK, 0, 0, CHUNK, CHUNK, CHUNK, CHUNK)
    dp = tl.zeros((CHUNK, CHUNK), tl.float32)
    da = tl.zeros((CHUNK, CHUNK), tl.float32)
    dq = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dw = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dbeta = tl.zeros((CHUNK,), tl.float32)
    along = 0.0
    for v0 in range(0, V, BLOCK_V):
        do = load_columns(do_ptr, do_stride, start, T, v0, V, CHUNK, BLOCK_V)
        v = load_columns(v_ptr, v_stride, start, T, v0, V, CHUNK, BLOCK_V)
        u = load_columns(u_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        x = load_columns(x_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        dx = load_columns(dx_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        state = load_state(states_ptr + chunk * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
        d = load_state(dstates_ptr + chunk * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
        dp += dot(do, tl.trans(x))
        dq += dot(do, tl.trans(state))
        dk += dot(x, tl.trans(d))
        dw -= dot(dx, tl.trans(state))
        along += tl.sum(tl.sum(state.to(tl.float32) * d.to(tl.float32), 1), 0)
        y = dot(tl.trans(inverse), dx)
        store_columns(dv_ptr + head * T * V, V, y * beta[:, None], start, T, v0, V, CHUNK, BLOCK_V)
        dbeta += tl.sum(y * v.to(tl.float32), 1)
        da -= dot(cast(y, u.dtype), tl.trans(u))
    q = load_columns(rows_of(q_ptr, b, h // group, 0, q_b, q_h, q_stride), q_stride, start, T, 0, K, CHUNK, BLOCK_K)
    k = load_columns(rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride), k_stride, start, T, 0, K, CHUNK, BLOCK_K)
    w = load_columns(w_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
    # Through q and k, as linear attention's of x.
    dp = cast(dp * inner * scale, q.dtype)
    dk = dk * out[:, None]
    along = along * through + tl.sum(tl.sum(k.to(tl.float32) * dk, 1), 0)
    dq = dq * (into * scale)[:, None] + dot(dp, k)
    dk += dot(tl.trans(dp), q)
    share = tl.sum(q.to(tl.float32) * dq, 1) - tl.sum(k.to(tl.float32) * dk, 1)
    # Through W = (I + A)^-1 (beta exp(c) k).
    z = dot(tl.trans(inverse), cast(dw, w.dtype))
    of_k = into * tl.sum(z * k.to(tl.float32), 1)
    dbeta += of_k
    share += beta * of_k
    dk += z * (beta * into)[:, None]
    # Through A, which is beta exp(c_i - c_j) k_i k_j.
    da = below_diagonal((da - dot(cast(z, w.dtype), tl.trans(w))) * inner, CHUNK)
    weighed = da * dot(k, tl.trans(k))
    dbeta += tl.sum(weighed, 1)
    weighed = weighed * beta[:, None]
    share += tl.sum(weighed, 1) - tl.sum(weighed, 0)
    dkk = cast(da * beta[:, None], k.dtype)
    dk += dot(dkk, k) + dot(tl.trans(dkk), k)
    i = tl.arange(0, CHUNK)
    index = start + i
    later = (i[None, :] >= i[:, None]) & (run[None, :] == run[:, None])
    dg = tl.sum(tl.where(later, share[None, :], 0.0), 1) + tl.where(run == last, along, 0.0)
    dg = tl.where(fresh, 0.0, dg)  # there is nothing to decay
    tl.store(dg_ptr + head * T + index, dg, mask=index < T)
    tl.store(dbeta_ptr + head * T + index, dbeta, mask=index < T)
    store_columns(dq_ptr + head * T * K, K, dq, start, T, 0, K, CHUNK, BLOCK_K)
    store_columns(dk_ptr + head * T * K, K, dk, start, T, 0, K, CHUNK, BLOCK_K)


def bwd(do, dlast, q, k, v, beta, g, state, segments, scale):
    (B, H, T, V), (_, G, _, K) = v.shape, q.shape
    segments = segments if segments is None or segments.stride(-1) == 1 else segments.contiguous()
    segments_b = 0 if segments is None else segments.stride(0)
    inverse, w, left, u, x, before, through, _ = corrected(k, v, beta, g, state, segments)
    read, dstates, dx = torch.empty_like(w), torch.empty_like(before), torch.empty_like(x)
    dfirst = v.new_empty(B, H, K, V, dtype=torch.float32)
    dq, dk = (v.new_empty(B, H, T, K, dtype=v.dtype if G == H else torch.float32) for _ in range(2))
    dv = v.new_empty(B, H, T, V)
    dbeta, dg = (v.new_empty(B, H, T, dtype=torch.float32) for _ in range(2))
    dlast = None if dlast is None else dlast.contiguous()
    cuts, group, N = plan(K, V, v.dtype, v.device), H // G, before.shape[2]
    with torch.cuda.device_of(q):
        _local_kernel[(N, B * H)](
            do, q, k, g, segments, read, dx,
            *strides(do), *strides(q), *strides(k), *strides(g), segments_b, H, group, T, K, V, scale, **cuts["local"],
        )  # fmt: skip
        _walk_back_kernel[(triton.cdiv(V, cuts["walk back"]["BLOCK_V"]), B * H)](
            do, read, left, w, through, dlast, dstates, dx, dfirst, *strides(do), H, T, K, V, **cuts["walk back"]
        )
        _grads_kernel[(N, B * H)](
            do, q, k, v, beta, g, segments, inverse, w, u, x, dx, before, dstates, dq, dk, dv, dbeta, dg,
            *strides(do), *strides(q), *strides(k), *strides(v), *strides(beta), *strides(g), segments_b,
            H, group, T, K, V, scale, **cuts["grads"],
        )  # fmt: skip
    if G != H:
        dq, dk = (d.unflatten(1, (G, group)).sum(2).to(q.dtype) for d in (dq, dk))
    return dq, dk, dv, dbeta, dg, dfirst
