"""RMSNorm of each head of q and k and their rotation, in Triton: one launch forward, one backward.

A program takes BLOCK_S positions of one head. The backward's programs take several tiles each and keep their share of
the weights' gradients, which torch adds up in one order.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast
from cs336.ops.triton.rope import pair_columns, plan, table_rows, table_strides

NUM_PROGRAMS = 512  # of the backward, at most


@triton.jit
def _load(x_rows, first, second, rest, mask, rest_mask, BLOCK_REST: tl.constexpr):
    """The pairs' two features and the features that do not turn, float32, 0 where masked."""
    x1 = tl.load(x_rows + first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_rows + second, mask=mask, other=0.0).to(tl.float32)
    x3 = x1
    if BLOCK_REST > 0:
        x3 = tl.load(x_rows + rest, mask=rest_mask, other=0.0).to(tl.float32)
    return x1, x2, x3


@triton.jit
def _store(y_rows, first, second, rest, mask, rest_mask, y1, y2, y3, BLOCK_REST: tl.constexpr):
    dtype: tl.constexpr = y_rows.dtype.element_ty
    tl.store(y_rows + first, cast(y1, dtype), mask=mask)
    tl.store(y_rows + second, cast(y2, dtype), mask=mask)
    if BLOCK_REST > 0:
        tl.store(y_rows + rest, cast(y3, dtype), mask=rest_mask)


@triton.jit
def _sum(a1, a2, a3, BLOCK_REST: tl.constexpr):
    total = tl.sum(a1, 1) + tl.sum(a2, 1)
    if BLOCK_REST > 0:
        total += tl.sum(a3, 1)
    return total


@triton.jit
def _columns(P, D, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = pair_columns(P, BLOCK_P, INTERLEAVED)
    rest = first
    if BLOCK_REST > 0:
        rest = 2 * P + tl.arange(0, BLOCK_REST)[None, :]
    return first, second, rest, (tl.arange(0, BLOCK_P) < P)[None, :], rest < D


# Not compiled anew for what changes from call to call, as in rope.py.
@triton.jit(
    do_not_specialize=["S", "q_b", "k_b", "qo_b", "ko_b", "table_b", "pos_b"],
    do_not_specialize_on_alignment=["pos_ptr"],
)
def _fwd_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, qw_ptr, kw_ptr, q_rstd_ptr, k_rstd_ptr, cos_ptr, sin_ptr, pos_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, table_b, table_stride, pos_b,
    Hq, Hk, S, L, P, D, eps,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(S, BLOCK_S)
    head = tl.program_id(0) // num_tiles
    b, h = head // (Hq + Hk), head % (Hq + Hk)
    s = tl.program_id(0) % num_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    cos, sin = table_rows(cos_ptr, sin_ptr, pos_ptr, b, s, s < S, table_b, table_stride, pos_b, L, P, BLOCK_P)
    if h < Hq:
        _fwd_head(
            q_ptr, q_out_ptr, qw_ptr, q_rstd_ptr, q_b, q_h, q_s, qo_b, qo_h, qo_s, b, h, Hq, s, S, cos, sin, P, D, eps,
            BLOCK_P, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    else:
        _fwd_head(
            k_ptr, k_out_ptr, kw_ptr, k_rstd_ptr, k_b, k_h, k_s, ko_b, ko_h, ko_s, b, h - Hq, Hk, s, S, cos, sin, P, D,
            eps, BLOCK_P, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _fwd_head(
    x_ptr, y_ptr, w_ptr, rstd_ptr, x_b, x_h, x_s, y_b, y_h, y_s, b, h, H, s, S, cos, sin, P, D, eps,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    live, at, b, h = s < S, s.to(tl.int64)[:, None], b.to(tl.int64), h.to(tl.int64)
    first, second, rest, paired, resting = _columns(P, D, BLOCK_P, BLOCK_REST, INTERLEAVED)
    mask, rest_mask = live[:, None] & paired, live[:, None] & resting
    x1, x2, x3 = _load(x_ptr + b * x_b + h * x_h + at * x_s, first, second, rest, mask, rest_mask, BLOCK_REST)
    w1, w2, w3 = _load(w_ptr, first, second, rest, paired, resting, BLOCK_REST)
    rstd = tl.rsqrt(_sum(x1 * x1, x2 * x2, x3 * x3, BLOCK_REST) / D + eps)
    x1, x2, x3 = x1 * rstd[:, None] * w1, x2 * rstd[:, None] * w2, x3 * rstd[:, None] * w3
    y_rows = y_ptr + b * y_b + h * y_h + at * y_s
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    _store(y_rows, first, second, rest, mask, rest_mask, y1, y2, x3, BLOCK_REST)
    tl.store(rstd_ptr + (b * H + h) * S + s, rstd, mask=live)


@triton.jit
def _bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr,  # dw: (programs, D) float32
    cos_ptr, sin_ptr, pos_ptr,
    dy_b, dy_h, dy_s, x_b, x_h, x_s, dx_b, dx_h, dx_s, table_b, table_stride, pos_b,
    B, H, S, L, P, D, tiles_per_program,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    first, second, rest, paired, resting = _columns(P, D, BLOCK_P, BLOCK_REST, INTERLEAVED)
    w1, w2, w3 = _load(w_ptr, first, second, rest, paired, resting, BLOCK_REST)
    dw1, dw2 = tl.zeros((1, BLOCK_P), tl.float32), tl.zeros((1, BLOCK_P), tl.float32)
    dw3 = tl.zeros((1, BLOCK_REST if BLOCK_REST > 0 else BLOCK_P), tl.float32)
    num_tiles = tl.cdiv(S, BLOCK_S)
    begin = tl.program_id(0) * tiles_per_program
    for index in range(begin, tl.minimum(begin + tiles_per_program, B * H * num_tiles)):
        head = index // num_tiles
        b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
        s = index % num_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
        live, at = s < S, s.to(tl.int64)[:, None]
        mask, rest_mask = live[:, None] & paired, live[:, None] & resting
        cos, sin = table_rows(cos_ptr, sin_ptr, pos_ptr, b, s, live, table_b, table_stride, pos_b, L, P, BLOCK_P)
        cos, sin = tl.where(mask, cos, 0.0), tl.where(mask, sin, 0.0)
        y1, y2, g3 = _load(dy_ptr + b * dy_b + h * dy_h + at * dy_s, first, second, rest, mask, rest_mask, BLOCK_REST)
        x1, x2, x3 = _load(x_ptr + b * x_b + h * x_h + at * x_s, first, second, rest, mask, rest_mask, BLOCK_REST)
        rstd = tl.load(rstd_ptr + (b * H + h) * S + s, mask=live, other=0.0)[:, None]
        g1, g2 = y1 * cos + y2 * sin, y2 * cos - y1 * sin  # turned back
        x1, x2, x3 = x1 * rstd, x2 * rstd, x3 * rstd
        dw1 += tl.sum(g1 * x1, 0)[None, :]
        dw2 += tl.sum(g2 * x2, 0)[None, :]
        dw3 += tl.sum(g3 * x3, 0)[None, :]
        g1, g2, g3 = g1 * w1, g2 * w2, g3 * w3
        along = (_sum(g1 * x1, g2 * x2, g3 * x3, BLOCK_REST) / D)[:, None]
        g1, g2, g3 = (g1 - x1 * along) * rstd, (g2 - x2 * along) * rstd, (g3 - x3 * along) * rstd
        dx_rows = dx_ptr + b * dx_b + h * dx_h + at * dx_s
        _store(dx_rows, first, second, rest, mask, rest_mask, g1, g2, g3, BLOCK_REST)
    _store(dw_ptr + tl.program_id(0) * D, first, second, rest, paired, resting, dw1, dw2, dw3, BLOCK_REST)


def fwd(q, k, q_weight, k_weight, cos, sin, positions, interleaved, eps):
    (B, Hq, S, D), Hk, P = q.shape, k.shape[1], cos.shape[-1]
    outs = [torch.empty_like(x) for x in (q, k)]
    rstds = [x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k)]
    sizes = plan(S, D, P)
    programs = B * (Hq + Hk) * triton.cdiv(S, sizes["BLOCK_S"])
    if programs:
        with torch.cuda.device_of(q):
            _fwd_kernel[(programs,)](
                q, k, *outs, q_weight, k_weight, *rstds, cos, sin, positions,
                *q.stride()[:3], *k.stride()[:3], *outs[0].stride()[:3], *outs[1].stride()[:3],
                *table_strides(cos, positions), Hq, Hk, S, cos.shape[-2], P, D, eps, INTERLEAVED=interleaved, **sizes,
            )  # fmt: skip
    return *outs, *rstds


def bwd(dq, dk, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, positions, interleaved):
    dxs, dws = [], []
    for dy, x, w, rstd in ((dq, q, q_weight, q_rstd), (dk, k, k_weight, k_rstd)):
        (B, H, S, D), P = x.shape, cos.shape[-1]
        sizes = plan(S, D, P, elements=2048)
        tiles = B * H * triton.cdiv(S, sizes["BLOCK_S"])
        tiles_per_program = triton.cdiv(tiles, NUM_PROGRAMS)
        programs = triton.cdiv(tiles, max(1, tiles_per_program))
        dx, shares = torch.empty_like(x), x.new_zeros(programs, D, dtype=torch.float32)
        if programs:
            with torch.cuda.device_of(x):
                _bwd_kernel[(programs,)](
                    dy, x, w, rstd, dx, shares, cos, sin, positions,
                    *dy.stride()[:3], *x.stride()[:3], *dx.stride()[:3], *table_strides(cos, positions),
                    B, H, S, cos.shape[-2], P, D, tiles_per_program, INTERLEAVED=interleaved, **sizes,
                )  # fmt: skip
        dxs.append(dx)
        dws.append(shares.sum(0).to(w.dtype))
    return *dxs, *dws
