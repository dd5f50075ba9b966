"""y = x w^T + b in Triton. Every sum runs over K in steps of BLOCK_K, in one order and without a split. In float32 it
is a sum of sums of CHUNK terms: 4096 in one sum are off by up to 3.5e-6 of the result's row, in chunks by 5e-7, as
torch's are.

Tiles grow with the number of rows, which the bits do not: a tile is made of the same 64-row products of 16 of K (16-row
ones before Hopper), and its size says only how many of them a program has.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import INTERPRET, dot
from cs336.ops.triton.cast import cast

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: where rows are few the widest of which there are enough to keep all
# multiprocessors reading w. us on an H200, K 3072, N 1024: 64 rows 8.2 with 16 columns, 9.5 with 32, 12.8 with 64; 256
# rows 10.9, 9.7, 13.1; cuBLAS 7.4 and 7.9.
NARROW = ((64, 64, 64, 4, 5), (64, 32, 128, 4, 4), (64, 16, 128, 4, 4))
ENOUGH = 128
FEW_ROWS = 256
WIDE = (128, 128, 64, 8, 3)
FLOAT32 = (64, 32, 64, 4, 2)
CHUNK = 256  # of float32: a multiple of BLOCK_K


@triton.jit
def _product(
    x_ptrs, w_ptrs, x_rows, w_rows, first_k, last_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + k, mask=x_rows & (k < last_k), other=0.0)
        w = tl.load(w_ptrs + k, mask=w_rows & (k < last_k), other=0.0)
        acc += dot(x, tl.trans(w))
    return acc


@triton.jit(do_not_specialize=["M"])  # it changes from call to call: not compiled anew for 1, or a multiple of 16
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, M, N, K, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP  # GROUP tiles of rows side by side share w in L2
    in_group = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % in_group
    tile_n = pid % (GROUP * tiles_n) // in_group
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    if CHUNK is None:
        acc = _product(x_ptrs, w_ptrs, (m < M)[:, None], (n < N)[:, None], 0, K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_k in range(0, K, CHUNK):
            last_k = tl.minimum(first_k + CHUNK, K)
            acc += _product(
                x_ptrs, w_ptrs, (m < M)[:, None], (n < N)[:, None], first_k, last_k, BLOCK_M, BLOCK_N, BLOCK_K
            )
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _tile(M: int, N: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    if INTERPRET.value:
        return 16, 16, 64, 4, 1
    if dtype == torch.float32:
        return FLOAT32
    if M > FEW_ROWS:
        return WIDE
    return next((tile for tile in NARROW if triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]) >= ENOUGH), NARROW[-1])


def linear_invariant(x, weight, bias):
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    block_m, block_n, block_k, warps, stages = _tile(M, N, x.dtype)
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x, weight, bias, y, M, N, K, x.stride(0), weight.stride(0),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, CHUNK=CHUNK if x.dtype == torch.float32 else None,
            GROUP=8, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


def linear_few_rows(x, weight, bias, constant):
    return linear_invariant(x, weight, bias)
