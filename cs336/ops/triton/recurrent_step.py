"""A step of a recurrence: a program holds the state of one head, or some columns of it where nothing is normed.

Sums run over a state's rows, in an order that does not depend on how many columns a program has.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast
from cs336.ops.triton.launches import launches_early, wait_for_predecessor

COLUMNS = 32  # of a program that norms nothing: few rows are then spread over the device


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact where exp(x) is small."""
    y = tl.exp(-tl.abs(x))
    one = 1.0 + y
    return tl.maximum(x, 0.0) + tl.where(one == 1.0, y, tl.log(one) * (y / (one - 1.0)))


@triton.jit
def to_length_one(x):
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)


@triton.jit
def load_row(ptr, i, num):
    return tl.load(ptr + i, mask=i < num, other=0.0).to(tl.float32)


@triton.jit
def load_one(ptr):
    return tl.load(ptr).to(tl.float32)


@triton.jit
def place_of(lengths_ptr, places_ptr, b, N):
    """Tokens of row b so far, its row of the state's N, and whether it is there."""
    length = tl.maximum(tl.load(lengths_ptr + b).to(tl.int64), 0)
    place = tl.cast(b, tl.int64)
    if places_ptr is not None:
        place = tl.load(places_ptr + b).to(tl.int64)
    return length, place, (place >= 0) & (place < N)


# Not compiled anew for what changes from call to call: numbers of rows, and parts of tensors.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["lengths_ptr", "places_ptr"])
def _kernel(
    memory_ptr,  # (N, R, H, K, V) float32, contiguous
    q_ptr,  # (B, G, K)
    k_ptr,
    v_ptr,  # (B, H, V)
    lengths_ptr,  # (B,)
    places_ptr,  # (B,), or None, as all that follows but y
    g_ptr,  # (B, H)
    A_ptr,  # (H,)
    bias_ptr,  # (H,)
    beta_ptr,  # (B, H)
    D_ptr,  # (H,)
    norm_ptr,  # (V,)
    gate_ptr,  # (B, H, V)
    y_ptr,  # (B, H, V), contiguous
    q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h, beta_b, beta_h, gate_b, gate_h,
    N, R, H, group, K, V, scale, eps,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(EARLY)
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i, j = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    length, place, there = place_of(lengths_ptr, places_ptr, b, N)
    kept, begun = tl.where(there, K, 0), tl.where(there & (length > 0), K, 0)  # rows of a state that is there
    memory_ptr += (place * R * H + h) * K * V + i[:, None] * V + j[None, :]
    inside = (j < V)[None, :]
    state = tl.load(memory_ptr + length % R * H * K * V, mask=(i < begun)[:, None] & inside, other=0.0)
    q = load_row(q_ptr + b * q_b + h // group * q_h, i, K)
    k = load_row(k_ptr + b * k_b + h // group * k_h, i, K)
    v = load_row(v_ptr + b * v_b + h * v_h, j, V)
    written = v
    if g_ptr is not None:
        g = load_one(g_ptr + b * g_b + h * g_h)
        if A_ptr is not None:
            dt = softplus(g + load_one(bias_ptr + h))
            g = -tl.exp(load_one(A_ptr + h)) * dt
            if D_ptr is not None:
                written = dt * v
        state *= tl.exp(g)
    if beta_ptr is not None:
        q, k = to_length_one(q), to_length_one(k)
        beta = tl.sigmoid(load_one(beta_ptr + b * beta_b + h * beta_h))
        written = beta * (written - tl.sum(k[:, None] * state, 0))
    state += k[:, None] * written[None, :]
    tl.store(memory_ptr + (length + 1) % R * H * K * V, state, mask=(i < kept)[:, None] & inside)
    y = scale * tl.sum(q[:, None] * state, 0)
    if D_ptr is not None:
        y += load_one(D_ptr + h) * v
    if norm_ptr is not None:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / V + eps) * load_row(norm_ptr, j, V)
    if gate_ptr is not None:
        gate = load_row(gate_ptr + b * gate_b + h * gate_h, j, V)
        y = y * gate * tl.sigmoid(gate)
    tl.store(y_ptr + (b * H + h) * V + j, cast(y, y_ptr.dtype.element_ty), mask=j < V)


def _strides(x) -> tuple[int, int]:
    """Of the row and the head; zeros of what is not there."""
    return (0, 0) if x is None else x.stride()[:2]


def recurrent_step_(memory, q, k, v, lengths, places, g, A_log, dt_bias, beta, D, norm, gate, scale, eps):
    (N, R, H, K, V), B, y = memory.shape, len(q), v.new_empty(v.shape)
    lengths, places = (x if x is None or x.is_contiguous() else x.contiguous() for x in (lengths, places))
    block_k, columns = triton.next_power_of_2(max(K, 1)), triton.next_power_of_2(max(V, 1))
    block_v = columns if norm is not None else min(columns, COLUMNS)
    early = launches_early(q.device)
    if y.numel():
        with torch.cuda.device_of(q):
            _kernel[(B * H, triton.cdiv(V, block_v))](
                memory, q, k, v, lengths, places, g, A_log, dt_bias, beta, D, norm, gate, y,
                *(step for x in (q, k, v, g, beta, gate) for step in _strides(x)),
                N, R, H, H // q.shape[1], K, V, scale, eps, BLOCK_K=block_k, BLOCK_V=block_v, EARLY=early,
                num_warps=8 if block_k * block_v > 64 * 64 else 4, **({"launch_pdl": True} if early else {}),
            )  # fmt: skip
    return y
