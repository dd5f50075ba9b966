"""Activations of an MLP in Triton: a program takes a block of one row; tensors without gaps are one row."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

BLOCK = 2048


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """act(x) and its derivative."""
    if KIND == 0:  # silu
        s = _sigmoid(x)
        y, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif KIND == 1:  # gelu
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:  # gelu_tanh
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y, slope = x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:  # relu2
        r = tl.where(x <= 0, 0.0, x)  # NaN stays
        y, slope = r * r, 2.0 * r
    return y, slope


@triton.jit
def _load(ptr, row, stride, columns, live):
    return tl.load(ptr + row.to(tl.int64) * stride + columns, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, stride, columns, live, values):
    tl.store(ptr + row.to(tl.int64) * stride + columns, cast(values, ptr.dtype.element_ty), mask=live)


@triton.jit
def _fwd_kernel(
    x_ptr,  # (M, N), as all
    up_ptr,  # or None
    y_ptr,
    N,
    x_stride,
    up_stride,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = columns < N
    y, _ = _activated(_load(x_ptr, row, x_stride, columns, live), KIND)
    if up_ptr is not None:
        y *= _load(up_ptr, row, up_stride, columns, live)
    _store(y_ptr, row, N, columns, live, y)


@triton.jit
def _bwd_kernel(
    x_ptr, up_ptr, dy_ptr, dx_ptr, dup_ptr, N, x_stride, up_stride, dy_stride, out_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = columns < N
    y, slope = _activated(_load(x_ptr, row, x_stride, columns, live), KIND)
    dy = _load(dy_ptr, row, dy_stride, columns, live)
    if up_ptr is not None:
        _store(dup_ptr, row, out_stride, columns, live, dy * y)
        dy *= _load(up_ptr, row, up_stride, columns, live)
    _store(dx_ptr, row, out_stride, columns, live, dy * slope)


def _layout(*tensors):
    """Rows, columns and strides: one row if no tensor has gaps. A grid has at most 65535 blocks of columns."""
    given = [t for t in tensors if t is not None]
    M, N = given[0].shape
    if all(t.is_contiguous() for t in given) and M * N <= 65535 * BLOCK:
        M, N = 1, M * N
    return M, N, [0 if t is None else t.stride(0) for t in tensors]


def fwd(x, up, kind):
    y = x.new_empty(x.shape)
    M, N, strides = _layout(x, up)
    if x.numel():
        with torch.cuda.device_of(x):
            _fwd_kernel[(M, triton.cdiv(N, BLOCK))](x, up, y, N, *strides, kind, BLOCK)
    return y


def bwd(x, up, dy, kind):
    dx = x.new_empty(x.shape)
    dup = x.new_empty(0 if up is None else x.shape)
    M, N, strides = _layout(x, up, dy)
    if x.numel():
        with torch.cuda.device_of(x):
            _bwd_kernel[(M, triton.cdiv(N, BLOCK))](x, up, dy, dx, dup, N, *strides, N, kind, BLOCK)
    return dx, dup


def gated_bwd(both, dy, kind):
    out = both.new_empty(both.shape)
    (x, up), (dx, dup) = both.chunk(2, -1), out.chunk(2, -1)
    M, N = dy.shape
    if out.numel():
        with torch.cuda.device_of(dy):
            strides = x.stride(0), up.stride(0), dy.stride(0), out.stride(0)
            _bwd_kernel[(M, triton.cdiv(N, BLOCK))](x, up, dy, dx, dup, N, *strides, kind, BLOCK)
    return out
