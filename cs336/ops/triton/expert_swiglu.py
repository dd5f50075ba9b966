"""Experts' gated units: a program takes a tile of one expert's rows and features, and finds its expert by the loads."""

import math

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import dot, shared_memory
from cs336.ops.triton.cast import INTERPRET, cast

# Rows that an expert has on average, at most: BLOCK_R, BLOCK_F, BLOCK_M, warps, stages.
TILES = ((16, (16, 64, 128, 4, 3)), (64, (64, 64, 64, 4, 4)), (math.inf, (128, 128, 64, 8, 3)))


@triton.jit(do_not_specialize=["N", "R"])
def _kernel(
    x_ptr,  # (N, M)
    token_ptr,  # (R,) int64
    load_ptr,  # (E,) int64
    gate_ptr,  # (E, F, M), contiguous
    up_ptr,
    y_ptr,  # (R, F), contiguous
    x_stride, N, R, E, F, M,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    load = tl.maximum(tl.load(load_ptr + e, mask=e < E, other=0), 0).to(tl.int32)
    tiles = tl.cdiv(load, BLOCK_R)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert < E:  # the others are more than there are tiles
        first = tl.sum(tl.where(e < expert, tiles, 0), 0)
        start = tl.sum(tl.where(e < expert, load, 0), 0)
        end = tl.minimum(start + tl.sum(tl.where(e == expert, load, 0), 0), R)
        row = start + (tile - first) * BLOCK_R + tl.arange(0, BLOCK_R)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        there = (row < end) & (token >= 0) & (token < N)
        x_ptrs = x_ptr + tl.where(there, token, 0)[:, None] * x_stride
        matrix = expert.to(tl.int64) * F * M + f.to(tl.int64)[:, None] * M
        gate = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        up = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)[None, :]
            x = tl.load(x_ptrs + m, mask=there[:, None] & (m < M), other=0.0)
            w = tl.load(gate_ptr + matrix + m, mask=(f < F)[:, None] & (m < M), other=0.0)
            gate += dot(x, tl.trans(w))
            w = tl.load(up_ptr + matrix + m, mask=(f < F)[:, None] & (m < M), other=0.0)
            up += dot(x, tl.trans(w))
        y = gate / (1.0 + tl.exp(-gate)) * up
        y = tl.where(there[:, None], y, float("nan"))
        y_ptrs = y_ptr + row.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (f < F)[None, :])


def _tile(rows: int, experts: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int, int, int]:
    if INTERPRET.value:
        return 16, 16, 16, 4, 1
    block_r, block_f, block_m, warps, stages = next(tile for most, tile in TILES if rows <= most * experts)
    stage = (block_r + 2 * block_f) * block_m * dtype.itemsize
    return block_r, block_f, block_m, warps, max(1, min(stages, (shared_memory(device) - 4096) // stage))


def expert_swiglu(x, token, load, gate, up):
    (E, F, M), R = gate.shape, token.shape[0]
    y = x.new_empty(R, F)
    if y.numel() == 0:
        return y
    block_r, block_f, block_m, warps, stages = _tile(R, E, x.dtype, x.device)
    grid = (R // block_r + min(E, R), triton.cdiv(F, block_f))
    with torch.cuda.device_of(x):
        _kernel[grid](
            x, token, load, gate, up, y, x.stride(0), x.shape[0], R, E, F, M,
            BLOCK_E=triton.next_power_of_2(E), BLOCK_R=block_r, BLOCK_F=block_f, BLOCK_M=block_m,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y
