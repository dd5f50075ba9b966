"""alpha x x^T + beta c in Triton: a program a tile on or below the diagonal, which it also writes above, turned."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import INTERPRET, dot
from cs336.ops.triton.cast import cast

BLOCK, BLOCK_K, WARPS, STAGES = (16, 16, 4, 1) if INTERPRET.value else (128, 64, 4, 3)


@triton.jit
def _gram_kernel(
    x_ptr, c_ptr, y_ptr, M, N, x_batch, x_row, c_batch, c_row, alpha, beta,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)  # row by row of the lower triangle: row i has i + 1
    b = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)  # the root is rounded
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)
    j = tile - i * (i + 1) // 2
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    x_ptr += b * x_batch
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_row  # those beyond are not stored
    t_ptrs = x_ptr + tl.minimum(columns, M - 1).to(tl.int64)[:, None] * x_row
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + k, mask=k < N, other=0.0)
        t = tl.load(t_ptrs + k, mask=k < N, other=0.0)
        acc += dot(x, tl.trans(t))
    acc *= alpha
    inside = (rows < M)[:, None] & (columns < M)[None, :]
    if c_ptr is not None:
        c_ptrs = c_ptr + b * c_batch + rows.to(tl.int64)[:, None] * c_row + columns[None, :]
        acc += beta * tl.load(c_ptrs, mask=inside, other=0.0).to(tl.float32)
    y = cast(acc, y_ptr.dtype.element_ty)
    y_ptr += b * M * M
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * M + columns[None, :], y, mask=inside)
    if i != j:
        turned = (columns < M)[:, None] & (rows < M)[None, :]
        tl.store(y_ptr + columns.to(tl.int64)[:, None] * M + rows[None, :], tl.trans(y), mask=turned)


def gram(x, c, alpha, beta):
    B, M, N = x.shape
    y = x.new_empty(B, M, M)
    if y.numel() == 0:
        return y
    tiles = triton.cdiv(M, BLOCK)
    c_strides = (0, 0) if c is None else c.stride()[:2]
    with torch.cuda.device_of(x):
        _gram_kernel[tiles * (tiles + 1) // 2, B](
            x, c, y, M, N, *x.stride()[:2], *c_strides, alpha, beta,
            BLOCK=BLOCK, BLOCK_K=BLOCK_K, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y
