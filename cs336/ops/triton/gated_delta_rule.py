"""The gated delta rule in chunks, for any GPU that Triton knows and, interpreted, for the CPU: see ops/chunked.py.

    (I + A) [u, W] = [beta v, beta exp(c) k]        x = u - W S        S <- exp(c_C) S + (exp(c_C - c) k)^T x

One kernel solves each chunk by itself: its inverse (I + A)^-1, u and W. One walks the chunks of a head in order, writes
what they correct, x, and leaves the state before each. Outputs are linear attention's, of x in place of v.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import dot, rows_of, shared_memory, width
from cs336.ops.triton.cast import INTERPRET, cast
from cs336.ops.triton.linear_attention import (
    decays,
    inner_decay,
    load_columns,
    load_state,
    outputs,
    roomy,
    scaled,
    store_columns,
    store_state,
    strides,
)


@triton.jit
def load_beta(beta_ptr, stride, start, T, CHUNK: tl.constexpr):
    index = start + tl.arange(0, CHUNK)
    return tl.load(beta_ptr + index.to(tl.int64) * stride, mask=index < T, other=0.0)


@triton.jit
def below_diagonal(x, CHUNK: tl.constexpr):
    i = tl.arange(0, CHUNK)
    return tl.where(i[:, None] > i[None, :], x, 0.0)


@triton.jit
def unit_inverse(a, CHUNK: tl.constexpr):
    """(I + a)^-1 of an `a` below the diagonal: row r is e_r - sum_{j < r} a_rj row_j."""
    i = tl.arange(0, CHUNK)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, CHUNK):
        a_r = tl.sum(tl.where(i[:, None] == r, a, 0.0), 0)
        rest = tl.sum(a_r[:, None] * inverse, 0)
        inverse = tl.where(i[:, None] == r, inverse - rest[None, :], inverse)
    return inverse


@triton.jit
def _solve_kernel(
    k_ptr,  # (B, G, T, K)
    v_ptr,  # (B, H, T, V)
    beta_ptr,  # (B, H, T) float32
    g_ptr,  # (B, H, T) float32, or None
    segments_ptr,  # (B, T), or None
    inverse_ptr,  # (B, H, N, CHUNK, CHUNK)
    u_ptr,  # (B, H, T, V), contiguous
    w_ptr,  # (B, H, T, K), contiguous
    k_b, k_h, k_stride, v_b, v_h, v_stride, beta_b, beta_h, beta_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    start = n * CHUNK
    k_ptr = rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride)
    v_ptr = rows_of(v_ptr, b, h, 0, v_b, v_h, v_stride)
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    c, into, _, _, run, _ = decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK)
    beta = load_beta(rows_of(beta_ptr, b, h, 0, beta_b, beta_h, beta_stride), beta_stride, start, T, CHUNK)
    k = load_columns(k_ptr, k_stride, start, T, 0, K, CHUNK, BLOCK_K)
    a = below_diagonal(beta[:, None] * dot(k, tl.trans(k)) * inner_decay(c, run, CHUNK), CHUNK)
    inverse = unit_inverse(a, CHUNK)
    store_state(inverse_ptr + (head * tl.cdiv(T, CHUNK) + n) * CHUNK * CHUNK, inverse, 0, 0, CHUNK, CHUNK, CHUNK, CHUNK)
    inverse = cast(inverse, k.dtype)
    w = dot(inverse, scaled(k, beta * into))
    store_columns(w_ptr + head * T * K, K, w, start, T, 0, K, CHUNK, BLOCK_K)
    for v0 in range(0, V, BLOCK_V):
        v = load_columns(v_ptr, v_stride, start, T, v0, V, CHUNK, BLOCK_V)
        store_columns(u_ptr + head * T * V, V, dot(inverse, scaled(v, beta)), start, T, v0, V, CHUNK, BLOCK_V)


@triton.jit
def _walk_kernel(
    k_ptr,  # (B, G, T, K)
    u_ptr,  # (B, H, T, V), contiguous
    w_ptr,  # (B, H, T, K), contiguous
    g_ptr,
    first_ptr,  # (B, H, K, V) float32, or None
    segments_ptr,
    states_ptr,  # (B, H, N, K, V): before each chunk
    x_ptr,  # (B, H, T, V), contiguous
    last_ptr,  # (B, H, K, V) float32
    k_b, k_h, k_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    v0, head = tl.program_id(0) * BLOCK_V, tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    k_ptr = rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride)
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    num_chunks = tl.cdiv(T, CHUNK)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if first_ptr is not None:
        state = load_state(first_ptr + head * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
    for n in range(0, num_chunks):
        store_state(states_ptr + (head * num_chunks + n) * K * V, state, 0, v0, K, V, BLOCK_K, BLOCK_V)
        start = n * CHUNK
        _, _, out, through, _, _ = decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK)
        k = load_columns(k_ptr, k_stride, start, T, 0, K, CHUNK, BLOCK_K)
        w = load_columns(w_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        u = load_columns(u_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        x = u.to(tl.float32) - dot(w, cast(state, w.dtype))
        store_columns(x_ptr + head * T * V, V, x, start, T, v0, V, CHUNK, BLOCK_V)
        state = state * through + dot(tl.trans(scaled(k, out)), cast(x, u.dtype))
    store_state(last_ptr + head * K * V, state, 0, v0, K, V, BLOCK_K, BLOCK_V)


CHUNK = 64


def plan(K: int, V: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The keys' features are whole in a program: what a chunk takes off a state needs all of them."""
    whole = width(K, CHUNK, dtype=dtype)
    # Values of 32 columns spare registers. On Hopper (see `width`) that is right where chunks are copied ahead.
    ahead = whole <= 128 and K % 16 == V % 16 == 0
    narrow = whole > 64 and (ahead or dtype == torch.float32 or not roomy(device))
    block_v = min(width(V, CHUNK, dtype=dtype), 32 if narrow else 64)
    stage = CHUNK * (3 * whole + block_v) * dtype.itemsize  # that a step of the way back loads
    room = 1 if INTERPRET.value else shared_memory(device) - 49152  # which its products take besides
    cut = {"CHUNK": CHUNK, "BLOCK_K": whole, "BLOCK_V": block_v, "num_warps": 8}
    return cut | {"num_stages": max(1, min(3, room // stage))}


def corrected(k, v, beta, g, state, segments):
    """The inverse of each chunk (B, H, N, C, C), W (B, H, T, K), u and x (B, H, T, V), the state before each chunk
    (B, H, N, K, V), all in k's dtype; and after the last (B, H, K, V) float32."""
    (B, H, T, V), K = v.shape, k.shape[-1]
    N, of_tiles, group = triton.cdiv(T, CHUNK), plan(K, V, v.dtype, v.device), H // k.shape[1]
    segments_b = 0 if segments is None else segments.stride(0)
    inverse, w = v.new_empty(B, H, N, CHUNK, CHUNK), v.new_empty(B, H, T, K)
    u, x = v.new_empty(B, H, T, V), v.new_empty(B, H, T, V)
    before, last = v.new_empty(B, H, N, K, V), v.new_empty(B, H, K, V, dtype=torch.float32)
    state = None if state is None else state.contiguous()
    with torch.cuda.device_of(k):
        _solve_kernel[(N, B * H)](
            k, v, beta, g, segments, inverse, u, w,
            *strides(k), *strides(v), *strides(beta), *strides(g), segments_b, H, group, T, K, V, **of_tiles,
        )  # fmt: skip
        _walk_kernel[(triton.cdiv(V, of_tiles["BLOCK_V"]), B * H)](
            k, u, w, g, state, segments, before, x, last,
            *strides(k), *strides(g), segments_b, H, group, T, K, V, **of_tiles,
        )  # fmt: skip
    return inverse, w, u, x, before, last


def fwd(q, k, v, beta, g, state, segments, scale):
    segments = segments if segments is None or segments.stride(-1) == 1 else segments.contiguous()
    _, _, _, x, before, last = corrected(k, v, beta, g, state, segments)
    return outputs(q, k, x, g, segments, before, scale, CHUNK), last
