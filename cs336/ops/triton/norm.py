"""RMSNorm and LayerNorm in Triton, for any GPU that Triton knows and, interpreted, for the CPU.

A program takes BLOCK_M rows at a time. Rows of up to MAX_BLOCK features are read once and stay in registers; longer
ones are walked in blocks, twice. How a row is cut depends on N alone, so its result does not depend on other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16384
NUM_PROGRAMS = 512  # of the backward, at most: each sums its rows' share of dw, and torch adds up the shares


@triton.jit
def _load(rows_ptr, stride, rows, columns, mask):
    return tl.load(rows_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(rows_ptr, stride, rows, columns, mask, values):
    address = rows_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, values.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_features(ptr, columns, N):
    return tl.load(ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _moments(values, mask, num, CENTRED: tl.constexpr):
    """Mean (0 if not CENTRED) and sum of squared deviations of each row's `num` unmasked values."""
    mean = tl.sum(values, 1) / num if CENTRED else tl.sum(tl.zeros_like(values), 1)
    deviations = tl.where(mask, values - mean[:, None], 0.0)
    return mean, tl.sum(deviations * deviations, 1)


@triton.jit
def _fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    w_ptr,  # (N,)
    b_ptr,  # (N,) or None
    y_ptr,  # (M, N) contiguous
    sum_ptr,  # (M, N) contiguous, or None
    mean_ptr,  # (M,), or None for an RMSNorm
    rstd_ptr,  # (M,)
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    CENTRED: tl.constexpr = mean_ptr is not None
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        values = _load(x_ptr, x_stride, rows, columns, mask)
        if residual_ptr is not None:
            residual = _load(residual_ptr, residual_stride, rows, columns, mask)
            values = (values.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
            _store(sum_ptr, N, rows, columns, mask, values)
        num = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        block_mean, block_squares = _moments(values.to(tl.float32), mask, num, CENTRED)
        delta, share = block_mean - mean, num / (start + num)  # Chan, Golub & LeVeque 1979
        mean += delta * share
        squares += block_squares + delta * delta * share * start
    rstd = tl.rsqrt(squares / N + eps)
    if CENTRED:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        if not ONE_BLOCK:
            if residual_ptr is not None:
                values = _load(sum_ptr, N, rows, columns, mask)
            else:
                values = _load(x_ptr, x_stride, rows, columns, mask)
        y = (values.to(tl.float32) - mean[:, None]) * rstd[:, None] * _load_features(w_ptr, columns, N)
        if b_ptr is not None:
            y += _load_features(b_ptr, columns, N)
        _store(y_ptr, N, rows, columns, mask, y)
