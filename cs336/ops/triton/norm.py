"""RMSNorm and LayerNorm in Triton, for any GPU that Triton knows and, interpreted, for the CPU.

A program takes BLOCK_M rows at a time. Rows of up to MAX_BLOCK features are read once and stay in registers; longer
ones are walked in blocks, twice. How a row is cut depends on N alone, so its result does not depend on other rows. Nor
does it on where the row lies, of which Triton's compiler would make another order of sums: strides come in units that N
gives them, and rows of whole 16-byte vectors that do not start at one are copied first. A null mean_ptr makes it an
RMSNorm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cs336.ops.triton.cast import cast

MAX_BLOCK = 16384
NUM_PROGRAMS = 512  # of the backward, at most: each sums its rows' share of dw and db, and torch adds up the shares


@triton.jit
def _load_rows(ptr, stride, rows, columns, mask):
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, stride, rows, columns, mask, values):
    address = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(address, cast(values, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_features(ptr, columns, N):
    return tl.load(ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_sum(x_ptr, residual_ptr, sum_ptr, x_stride, residual_stride, N, rows, columns, mask):
    """x, or x + residual rounded to x's dtype and stored, in float32."""
    values = _load_rows(x_ptr, x_stride, rows, columns, mask).to(tl.float32)
    if residual_ptr is not None:
        values += _load_rows(residual_ptr, residual_stride, rows, columns, mask).to(tl.float32)
        values = cast(values, x_ptr.dtype.element_ty).to(tl.float32)
        _store_rows(sum_ptr, N, rows, columns, mask, values)
    return values


@triton.jit
def _moments(values, mask, num, CENTRED: tl.constexpr):
    """Mean (0 unless CENTRED) and sum of squared deviations of each row's `num` unmasked values."""
    mean = tl.zeros((values.shape[0],), tl.float32)
    if CENTRED:
        mean = tl.div_rn(tl.sum(values, 1), tl.zeros_like(mean) + num)  # `/` is off by an ulp: a constant row is not 0
        values = tl.where(mask, values - mean[:, None], 0.0)
    return mean, tl.sum(values * values, 1)


@triton.jit
def _normalise(values, mean, rstd, w_ptr, b_ptr, y_ptr, N, rows, columns, mask):
    y = (values - mean[:, None]) * rstd[:, None] * _load_features(w_ptr, columns, N)
    if b_ptr is not None:
        y += _load_features(b_ptr, columns, N)
    _store_rows(y_ptr, N, rows, columns, mask, y)


@triton.jit(do_not_specialize=["M", "x_stride", "residual_stride"])
def _fwd_kernel(
    x_ptr,  # (M, N)
    residual_ptr,  # (M, N) or None
    w_ptr,  # (N,)
    b_ptr,  # (N,) or None
    y_ptr,  # (M, N) contiguous
    sum_ptr,  # (M, N) contiguous, or None
    mean_ptr,  # (M,) or None
    rstd_ptr,  # (M,)
    M,
    N,
    x_stride,  # in UNITs
    residual_stride,
    eps,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    CENTRED: tl.constexpr = mean_ptr is not None
    x_stride *= UNIT
    residual_stride *= UNIT
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.arange(0, BLOCK_N)
    live = (rows < M)[:, None]
    if ONE_BLOCK:
        mask = live & (block < N)[None, :]
        values = _load_sum(x_ptr, residual_ptr, sum_ptr, x_stride, residual_stride, N, rows, block, mask)
        mean, squares = _moments(values, mask, N, CENTRED)
        rstd = tl.rsqrt(squares / N + eps)
        _normalise(values, mean, rstd, w_ptr, b_ptr, y_ptr, N, rows, block, mask)
    else:
        mean = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, N, BLOCK_N):
            columns = start + block
            mask = live & (columns < N)[None, :]
            values = _load_sum(x_ptr, residual_ptr, sum_ptr, x_stride, residual_stride, N, rows, columns, mask)
            num = tl.minimum(N - start, BLOCK_N).to(tl.float32)
            block_mean, block_squares = _moments(values, mask, num, CENTRED)
            delta, share = block_mean - mean, num / (start + num)  # Chan, Golub & LeVeque 1979
            mean += delta * share
            squares += block_squares + delta * delta * share * start
        rstd = tl.rsqrt(squares / N + eps)
        tl.debug_barrier()  # a thread may read back from sum what another one stored
        for start in range(0, N, BLOCK_N):
            columns = start + block
            mask = live & (columns < N)[None, :]
            if residual_ptr is not None:
                values = _load_rows(sum_ptr, N, rows, columns, mask).to(tl.float32)
            else:
                values = _load_rows(x_ptr, x_stride, rows, columns, mask).to(tl.float32)
            _normalise(values, mean, rstd, w_ptr, b_ptr, y_ptr, N, rows, columns, mask)
    if CENTRED:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _load_gradients(dy_ptr, x_ptr, w_ptr, dy_stride, x_stride, N, mean, rstd, rows, columns, mask):
    """dy, xhat and dy * w, in float32 and 0 where masked."""
    dy = _load_rows(dy_ptr, dy_stride, rows, columns, mask).to(tl.float32)
    x = _load_rows(x_ptr, x_stride, rows, columns, mask).to(tl.float32)
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    return dy, xhat, dy * _load_features(w_ptr, columns, N)


@triton.jit
def _store_dx(xhat, wdy, along_xhat, along_1, rstd, dsum_ptr, dsum_stride, dx_ptr, N, rows, columns, mask):
    dx = (wdy - along_1[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]
    if dsum_ptr is not None:
        dx += _load_rows(dsum_ptr, dsum_stride, rows, columns, mask).to(tl.float32)
    _store_rows(dx_ptr, N, rows, columns, mask, dx)


@triton.jit(do_not_specialize=["M"])
def _bwd_kernel(
    dy_ptr,  # (M, N)
    dsum_ptr,  # (M, N) or None
    x_ptr,  # (M, N)
    w_ptr,  # (N,)
    mean_ptr,  # (M,) or None
    rstd_ptr,  # (M,)
    dx_ptr,  # (M, N) contiguous
    dw_ptr,  # (programs, N) float32, zeros
    db_ptr,  # (programs, N) float32, zeros, or None
    M,
    N,
    dy_stride,
    dsum_stride,
    x_stride,
    rows_per_program,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    CENTRED: tl.constexpr = mean_ptr is not None
    program = tl.program_id(0)
    first, last = program * rows_per_program, tl.minimum(M, (program + 1) * rows_per_program)
    block = tl.arange(0, BLOCK_N)
    share = program.to(tl.int64) * N + block
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(first, last, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        live = (rows < last)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        if CENTRED:
            mean = tl.load(mean_ptr + rows, mask=rows < last, other=0.0)
        along_xhat = tl.zeros((BLOCK_M,), tl.float32)
        along_1 = tl.zeros((BLOCK_M,), tl.float32)
        if ONE_BLOCK:
            mask = live & (block < N)[None, :]
            dy, xhat, wdy = _load_gradients(dy_ptr, x_ptr, w_ptr, dy_stride, x_stride, N, mean, rstd, rows, block, mask)
            along_xhat = tl.sum(wdy * xhat, 1) / N
            if CENTRED:
                along_1 = tl.sum(wdy, 1) / N
                db += tl.sum(dy, 0)
            dw += tl.sum(dy * xhat, 0)
            _store_dx(xhat, wdy, along_xhat, along_1, rstd, dsum_ptr, dsum_stride, dx_ptr, N, rows, block, mask)
        else:
            for start in range(0, N, BLOCK_N):
                columns = start + block
                mask = live & (columns < N)[None, :]
                dy, xhat, wdy = _load_gradients(
                    dy_ptr, x_ptr, w_ptr, dy_stride, x_stride, N, mean, rstd, rows, columns, mask
                )
                along_xhat += tl.sum(wdy * xhat, 1) / N
                if CENTRED:
                    along_1 += tl.sum(wdy, 1) / N
            for start in range(0, N, BLOCK_N):
                columns = start + block
                mask = live & (columns < N)[None, :]
                dy, xhat, wdy = _load_gradients(
                    dy_ptr, x_ptr, w_ptr, dy_stride, x_stride, N, mean, rstd, rows, columns, mask
                )
                _store_dx(xhat, wdy, along_xhat, along_1, rstd, dsum_ptr, dsum_stride, dx_ptr, N, rows, columns, mask)
                dw_old = tl.load(dw_ptr + share + start, mask=columns < N)
                tl.store(dw_ptr + share + start, dw_old + tl.sum(dy * xhat, 0), mask=columns < N)
                if CENTRED:
                    db_old = tl.load(db_ptr + share + start, mask=columns < N)
                    tl.store(db_ptr + share + start, db_old + tl.sum(dy, 0), mask=columns < N)
            tl.debug_barrier()  # as above, for dw and db
    if ONE_BLOCK:
        tl.store(dw_ptr + share, dw, mask=block < N)
        if CENTRED:
            tl.store(db_ptr + share, db, mask=block < N)


def _plan(N: int, max_block: int) -> dict:
    """How rows of N features are cut: into blocks of at most max_block, short ones several to a block."""
    block_n = min(triton.next_power_of_2(N), max_block)
    block_m = max(1, 2048 // block_n)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "ONE_BLOCK": block_n >= N,
        "num_warps": min(16, max(4, block_m * block_n // 512)),
    }


def _unit(x: Tensor) -> int:
    """Elements in 16 bytes, if rows are whole vectors of them, else 1."""
    elements = 16 // x.element_size()
    return elements if x.shape[1] % elements == 0 else 1


def _at_vectors(x: Tensor) -> Tensor:
    """x, or a copy if its rows are whole 16-byte vectors and some do not start at one."""
    unit = _unit(x)
    return x if x.stride(0) % unit == 0 and x.data_ptr() % (unit * x.element_size()) == 0 else x.contiguous().clone()


def fwd(x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor | None, eps: float, centred: bool):
    M, N = x.shape
    x, residual, unit = _at_vectors(x), None if residual is None else _at_vectors(residual), _unit(x)
    y, rstd = x.new_empty(M, N), x.new_empty(M, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    total = None if residual is None else torch.empty_like(y)
    plan = _plan(N, MAX_BLOCK)
    residual_stride = 0 if residual is None else residual.stride(0) // unit
    if M > 0:
        with torch.cuda.device_of(x):
            _fwd_kernel[(triton.cdiv(M, plan["BLOCK_M"]),)](
                x, residual, w, b, y, total, mean, rstd, M, N, x.stride(0) // unit, residual_stride, eps, unit, **plan
            )
    return tuple(t for t in (y, mean, rstd, total) if t is not None)


def bwd(dy: Tensor, dsum: Tensor | None, x: Tensor, w: Tensor, mean: Tensor | None, rstd: Tensor):
    M, N = x.shape
    dx = x.new_empty(M, N)
    plan = _plan(N, MAX_BLOCK // 2)
    rows_per_program = plan["BLOCK_M"] * triton.cdiv(M, plan["BLOCK_M"] * NUM_PROGRAMS)
    programs = triton.cdiv(M, max(1, rows_per_program))
    shares = x.new_zeros(1 if mean is None else 2, programs, N, dtype=torch.float32)
    dsum_stride = 0 if dsum is None else dsum.stride(0)
    if M > 0:
        with torch.cuda.device_of(x):
            _bwd_kernel[(programs,)](
                *(dy, dsum, x, w, mean, rstd, dx, shares[0], None if mean is None else shares[1]),
                *(M, N, dy.stride(0), dsum_stride, x.stride(0), rows_per_program),
                **plan,
            )
    return dx, *(share.sum(0).to(w.dtype) for share in shares)
