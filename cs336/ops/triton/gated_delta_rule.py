"""The gated delta rule in chunks, for any GPU that Triton knows and, interpreted, for the CPU: see ops/chunked.py.

    (I + A) [u, W] = [beta v, beta exp(c) k]        x = u - W S        S <- exp(c_C) S + (exp(c_C - c) k)^T x

One kernel solves each chunk by itself: its inverse (I + A)^-1, u and W. One walks the chunks of a head in order, writes
what they correct, x, and leaves the state before each: all that it can be spared is made by the first. Outputs are
linear attention's, of x in place of v.
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
    outputs_plan,
    roomy,
    scaled,
    store_columns,
    store_state,
    strides,
    tiles,
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
def unit_inverse(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of an `a` below the diagonal, in blocks twice as large at each step: of [[X, 0], [C, Y]] the inverse
    is [[X', 0], [-Y' C X', Y']]. Powers of `a`, which may be huge, are never formed."""
    i = tl.arange(0, CHUNK)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    inverse -= tl.where((i // 2)[:, None] == (i // 2)[None, :], a, 0.0)
    for step in tl.static_range(1, 6):
        if 2**step < CHUNK:
            block = i >> step
            beside = ((block // 2)[:, None] == (block // 2)[None, :]) & (block[:, None] != block[None, :])
            below = tl.dot(tl.where(beside, a, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, below, input_precision=PRECISION)
    return inverse


@triton.jit
def _solve_kernel(
    k_ptr,  # (B, G, T, K)
    v_ptr,  # (B, H, T, V)
    beta_ptr,  # (B, H, T) float32
    g_ptr,  # (B, H, T) float32, or None
    segments_ptr,  # (B, T), or None
    inverse_ptr,  # (B, H, N, CHUNK, CHUNK), contiguous, as all that follows; or None
    u_ptr,  # (B, H, T, V)
    w_ptr,  # (B, H, T, K)
    left_ptr,  # (B, H, T, K): what the keys leave to the state after their chunk, exp(c_C - c) k
    through_ptr,  # (B, H, N) float32: what a chunk leaves of the state before it
    k_b, k_h, k_stride, v_b, v_h, v_stride, beta_b, beta_h, beta_stride, g_b, g_h, g_stride, segments_b,
    H, group, T, K, V,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    start, chunk = n * CHUNK, head * tl.cdiv(T, CHUNK) + n
    k_ptr = rows_of(k_ptr, b, h // group, 0, k_b, k_h, k_stride)
    v_ptr = rows_of(v_ptr, b, h, 0, v_b, v_h, v_stride)
    if g_ptr is not None:
        g_ptr = rows_of(g_ptr, b, h, 0, g_b, g_h, g_stride)
    if segments_ptr is not None:
        segments_ptr += tl.cast(b, tl.int64) * segments_b
    FINE: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    c, into, out, through, run, _, _ = decays(g_ptr, g_stride, segments_ptr, start, T, CHUNK, FINE)
    beta = load_beta(rows_of(beta_ptr, b, h, 0, beta_b, beta_h, beta_stride), beta_stride, start, T, CHUNK)
    k = load_columns(k_ptr, k_stride, start, T, 0, K, CHUNK, BLOCK_K)
    tl.store(through_ptr + chunk, through)
    store_columns(left_ptr + head * T * K, K, scaled(k, out), start, T, 0, K, CHUNK, BLOCK_K)
    a = below_diagonal(beta[:, None] * dot(k, tl.trans(k)) * inner_decay(c, run, CHUNK), CHUNK)
    inverse = unit_inverse(a, CHUNK, PRECISION)
    if inverse_ptr is not None:
        store_state(inverse_ptr + chunk * CHUNK * CHUNK, inverse, 0, 0, CHUNK, CHUNK, CHUNK, CHUNK)
    inverse = cast(inverse, k.dtype)
    w = dot(inverse, scaled(k, beta * into))
    store_columns(w_ptr + head * T * K, K, w, start, T, 0, K, CHUNK, BLOCK_K)
    for v0 in range(0, V, BLOCK_V):
        v = load_columns(v_ptr, v_stride, start, T, v0, V, CHUNK, BLOCK_V)
        store_columns(u_ptr + head * T * V, V, dot(inverse, scaled(v, beta)), start, T, v0, V, CHUNK, BLOCK_V)


@triton.jit
def _walk_kernel(
    left_ptr,  # (B, H, T, K), contiguous, as everything here
    u_ptr,  # (B, H, T, V)
    w_ptr,  # (B, H, T, K)
    through_ptr,  # (B, H, N) float32
    first_ptr,  # (B, H, K, V) float32, or None
    states_ptr,  # (B, H, N / EVERY, K, V): before the first of EVERY chunks
    x_ptr,  # (B, H, T, V)
    last_ptr,  # (B, H, K, V) float32
    T, K, V,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    v0, head = tl.program_id(0) * BLOCK_V, tl.program_id(1).to(tl.int64)
    num_chunks = tl.cdiv(T, CHUNK)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if first_ptr is not None:
        state = load_state(first_ptr + head * K * V, 0, v0, K, V, BLOCK_K, BLOCK_V)
    for n in range(0, num_chunks):
        if n % EVERY == 0:
            kept = head * tl.cdiv(num_chunks, EVERY) + n // EVERY
            store_state(states_ptr + kept * K * V, state, 0, v0, K, V, BLOCK_K, BLOCK_V)
        start = n * CHUNK
        through = tl.load(through_ptr + head * num_chunks + n)
        left = load_columns(left_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        w = load_columns(w_ptr + head * T * K, K, start, T, 0, K, CHUNK, BLOCK_K)
        u = load_columns(u_ptr + head * T * V, V, start, T, v0, V, CHUNK, BLOCK_V)
        x = cast(u.to(tl.float32) - dot(w, cast(state, w.dtype)), u.dtype)
        store_columns(x_ptr + head * T * V, V, x, start, T, v0, V, CHUNK, BLOCK_V)
        state = state * through + dot(tl.trans(left), x)
    store_state(last_ptr + head * K * V, state, 0, v0, K, V, BLOCK_K, BLOCK_V)


def plan(K: int, V: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict]:
    """How each kernel cuts its work. The keys' features are whole in a program: what a chunk takes off a state needs
    all of them."""
    narrow = dtype.itemsize == 2
    chunk = 64 if narrow else 32
    whole, values = width(K, chunk, dtype=dtype), width(V, chunk, dtype=dtype)
    # With 32 columns of values a walk has twice as many programs. On Hopper (see `width`) they are right where chunks
    # are copied ahead.
    thin = not narrow or not roomy(device) or (64 < whole <= 128 and K % 16 == V % 16 == 0)
    shared = {"CHUNK": chunk, "BLOCK_K": whole, "num_warps": 4}
    solve, walk = shared | {"BLOCK_V": min(values, 64)}, shared | {"BLOCK_V": min(values, 32 if thin else 64)}
    stage = chunk * (3 * whole + 2 * walk["BLOCK_V"]) * dtype.itemsize  # that a step of the way back loads
    walk["num_stages"] = 1 if INTERPRET.value else max(1, min(3, (shared_memory(device) - 8192) // stage))
    few = 16 if not narrow else 32 if thin else 64
    grads = shared | {"BLOCK_V": min(values, few), "num_warps": 8, "num_stages": 1}
    return {"solve": solve, "walk": walk, "local": solve, "walk back": walk, "grads": grads}


def corrected(k, v, beta, g, state, segments, every=1, inverses=True):
    """The inverse of each chunk (B, H, N, C, C), or None, W and what keys leave (B, H, T, K), u and x (B, H, T, V), the
    state before each chunk, or the first of `every` (B, H, N / every, K, V), all in k's dtype; what a chunk leaves of a
    state (B, H, N) and the last state (B, H, K, V), in float32."""
    (B, H, T, V), K = v.shape, k.shape[-1]
    cuts = plan(K, V, v.dtype, v.device)
    C = cuts["solve"]["CHUNK"]
    N = triton.cdiv(T, C)
    inverse = v.new_empty(B, H, N, C, C) if inverses else None
    w, left = v.new_empty(B, H, T, K), v.new_empty(B, H, T, K)
    u, x = v.new_empty(B, H, T, V), v.new_empty(B, H, T, V)
    before, last = v.new_empty(B, H, triton.cdiv(N, every), K, V), v.new_empty(B, H, K, V, dtype=torch.float32)
    through = v.new_empty(B, H, N, dtype=torch.float32)
    state = None if state is None else state.contiguous()
    with torch.cuda.device_of(k):
        _solve_kernel[(N, B * H)](
            k, v, beta, g, segments, inverse, u, w, left, through,
            *strides(k), *strides(v), *strides(beta), *strides(g), 0 if segments is None else segments.stride(0),
            H, H // k.shape[1], T, K, V, PRECISION="ieee" if v.dtype == torch.float32 else "tf32", **cuts["solve"],
        )  # fmt: skip
        _walk_kernel[(triton.cdiv(V, cuts["walk"]["BLOCK_V"]), B * H)](
            left, u, w, through, state, before, x, last, T, K, V, EVERY=every, **cuts["walk"]
        )
    return inverse, w, left, u, x, before, through, last


def fwd(q, k, v, beta, g, state, segments, scale):
    segments = segments if segments is None or segments.stride(-1) == 1 else segments.contiguous()
    K, V = k.shape[-1], v.shape[-1]
    chunk = plan(K, V, v.dtype, v.device)["solve"]["CHUNK"]
    cut = outputs_plan(V, tiles(K, V, chunk, v.dtype), v.dtype, v.device)
    every = cut["CHUNK"] // chunk
    _, _, _, _, x, before, _, last = corrected(k, v, beta, g, state, segments, every, inverses=False)
    return outputs(q, k, x, g, segments, before, scale, cut), last
