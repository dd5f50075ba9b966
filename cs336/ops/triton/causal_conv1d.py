"""Depthwise causal convolution: a program takes a tile of tokens and channels, and reads each tap's shifted tile."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import INTERPRET, cast
from cs336.ops.triton.launches import launches_early, wait_for_predecessor
from cs336.ops.triton.recurrent_step import load_row, place_of


@triton.jit
def sees(segments_ptr, t, k, S):
    """Whether token t of the sequence and the one k before it are both there, in one segment."""
    there = (t >= k) & (t < S)
    if segments_ptr is not None and k:
        there &= tl.load(segments_ptr + t, mask=there, other=0) == tl.load(segments_ptr + t - k, mask=there, other=0)
    return there


@triton.jit
def load(x_ptr, t, stride, c, C, mask):
    """(tokens, channels) in float32, zero where the mask (tokens,) is."""
    address = x_ptr + t.to(tl.int64)[:, None] * stride + c[None, :]
    return tl.load(address, mask=mask[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _fwd_kernel(
    x_ptr,  # (B, S, C)
    weight_ptr,  # (C, K)
    bias_ptr,  # (C,), or None
    segments_ptr,  # (B, S), or None
    y_ptr,  # (B, S, C), contiguous
    x_b, x_stride, segments_b, S, C,
    K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if segments_ptr is not None:
        segments_ptr += b * segments_b
    y = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        tap = tl.load(weight_ptr + c * K + (K - 1 - k), mask=c < C, other=0.0).to(tl.float32)
        y += load(x_ptr + b * x_b, t - k, x_stride, c, C, sees(segments_ptr, t, k, S)) * tap[None, :]
    address = y_ptr + b * S * C + t.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(address, cast(y, y_ptr.dtype.element_ty), mask=(t < S)[:, None] & (c < C)[None, :])


@triton.jit
def _bwd_kernel(
    dy_ptr,  # (B, S, C)
    x_ptr,  # (B, S, C)
    weight_ptr,  # (C, K)
    segments_ptr,  # (B, S), or None
    dx_ptr,  # (B, S, C), contiguous
    sums_ptr,  # (tiles of tokens, K + 1, C) float32: of the taps' gradients and, last, of the bias'
    dy_b, dy_stride, x_b, x_stride, segments_b, S, C,
    K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dy_ptr += b * dy_b
    x_ptr += b * x_b
    if segments_ptr is not None:
        segments_ptr += b * segments_b
    sums_ptr += tl.program_id(0).to(tl.int64) * (K + 1) * C + c
    dx = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for k in tl.static_range(K):
        tap = tl.load(weight_ptr + c * K + (K - 1 - k), mask=c < C, other=0.0).to(tl.float32)
        dx += load(dy_ptr, t + k, dy_stride, c, C, sees(segments_ptr, t + k, k, S)) * tap[None, :]
        seen = sees(segments_ptr, t, k, S)
        dtap = tl.sum(load(dy_ptr, t, dy_stride, c, C, seen) * load(x_ptr, t - k, x_stride, c, C, seen), 0)
        tl.store(sums_ptr + (K - 1 - k) * C, dtap, mask=c < C)
    tl.store(sums_ptr + K * C, tl.sum(load(dy_ptr, t, dy_stride, c, C, t < S), 0), mask=c < C)
    address = dx_ptr + b * S * C + t.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(address, cast(dx, dx_ptr.dtype.element_ty), mask=(t < S)[:, None] & (c < C)[None, :])


# Not compiled anew for what changes from call to call: numbers of rows, and parts of tensors.
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["lengths_ptr", "places_ptr"])
def _step_kernel(
    ring_ptr,  # (N, R, C), contiguous
    x_ptr,  # (B, C)
    weight_ptr,  # (C, K)
    bias_ptr,  # (C,), or None
    lengths_ptr,  # (B,)
    places_ptr,  # (B,), or None
    y_ptr,  # (B, C), contiguous
    x_b, N, R, C,
    K: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(EARLY)
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    length, place, there = place_of(lengths_ptr, places_ptr, b, N)
    ring_ptr += place * R * C + c
    x = tl.load(x_ptr + b * x_b + c, mask=c < C, other=0.0)
    y = x.to(tl.float32) * load_row(weight_ptr + K - 1, c * K, C * K)
    for k in tl.static_range(1, K):
        seen = tl.where(there & (length >= k), C, 0)
        entry = tl.load(ring_ptr + (length + R - k) % R * C, mask=c < seen, other=0.0).to(tl.float32)
        y += entry * load_row(weight_ptr + K - 1 - k, c * K, C * K)
    if bias_ptr is not None:
        y += load_row(bias_ptr, c, C)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(
        ring_ptr + length % R * C, cast(x.to(tl.float32), ring_ptr.dtype.element_ty), mask=c < tl.where(there, C, 0)
    )
    tl.store(y_ptr + b * C + c, cast(y, y_ptr.dtype.element_ty), mask=c < C)


def _cut(x) -> tuple[tuple[int, int], dict[str, int]]:
    (B, S, C), channels = x.shape, triton.next_power_of_2(x.shape[2])
    cut = {"BLOCK_S": 64, "BLOCK_C": min(16 if INTERPRET.value else 64, channels)}
    return (B * triton.cdiv(S, cut["BLOCK_S"]), triton.cdiv(C, cut["BLOCK_C"])), cut


def fwd(x, weight, bias, segments):
    y = x.new_empty(x.shape)
    grid, cut = _cut(x)
    if grid[0] * grid[1]:
        with torch.cuda.device_of(x):
            _fwd_kernel[grid](
                x, weight, bias, segments, y, *x.stride()[:2], 0 if segments is None else segments.stride(0),
                *x.shape[1:], weight.shape[1], **cut,
            )  # fmt: skip
    return y


def bwd(dy, x, weight, segments):
    dx, K = x.new_empty(x.shape), weight.shape[1]
    grid, cut = _cut(x)
    sums = x.new_empty(grid[0], K + 1, x.shape[2], dtype=torch.float32)
    if grid[0] * grid[1]:
        with torch.cuda.device_of(x):
            _bwd_kernel[grid](
                dy, x, weight, segments, dx, sums, *dy.stride()[:2], *x.stride()[:2],
                0 if segments is None else segments.stride(0), *x.shape[1:], K, **cut,
            )  # fmt: skip
    return dx, sums[:, :K].sum(0).T.contiguous(), sums[:, K].sum(0)


def step_(ring, x, weight, bias, lengths, places, silu):
    (B, C), y, early = x.shape, x.new_empty(x.shape), launches_early(x.device)
    lengths, places = (t if t is None or t.is_contiguous() else t.contiguous() for t in (lengths, places))
    block = min(256, triton.next_power_of_2(max(C, 1)))
    if y.numel():
        with torch.cuda.device_of(x):
            _step_kernel[(B, triton.cdiv(C, block))](
                ring, x, weight, bias, lengths, places, y, x.stride(0), *ring.shape[:2], C,
                K=weight.shape[1], SILU=silu, BLOCK_C=block, EARLY=early, num_warps=4,
                **({"launch_pdl": True} if early else {}),
            )  # fmt: skip
    return y
