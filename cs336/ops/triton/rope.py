"""Rotary embedding in Triton: q and k in one launch. A program turns BLOCK_S positions of one head."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

ELEMENTS = 4096  # a program


@triton.jit
def table_rows(cos_ptr, sin_ptr, pos_ptr, b, s, live, table_b, table_stride, pos_b, L, P, BLOCK_P: tl.constexpr):
    """cos and sin (BLOCK_S, BLOCK_P) of the positions s of sequence b; NaN for positions outside the tables."""
    pair = tl.arange(0, BLOCK_P)
    if pos_ptr is not None:
        row = tl.load(pos_ptr + b * pos_b + s, mask=live, other=0).to(tl.int64)
        inside = live & (row >= 0) & (row < L)
        offset = row * table_stride
    else:
        inside = live
        offset = b.to(tl.int64) * table_b + s.to(tl.int64) * table_stride
    address = offset[:, None] + pair[None, :]
    mask = inside[:, None] & (pair < P)[None, :]
    return (
        tl.load(cos_ptr + address, mask=mask, other=float("nan")),
        tl.load(sin_ptr + address, mask=mask, other=float("nan")),
    )


@triton.jit
def pair_columns(P, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The columns of each pair's two features."""
    pair = tl.arange(0, BLOCK_P)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + P
    return first[None, :], second[None, :]


# Not compiled anew for what changes from call to call: the number of tokens, and with it the strides of batches.
@triton.jit(
    do_not_specialize=["S", "q_b", "k_b", "qo_b", "ko_b", "table_b", "pos_b"],
    do_not_specialize_on_alignment=["pos_ptr"],
)
def _rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr,  # (B, H, S, D); k may be None
    cos_ptr, sin_ptr, pos_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, table_b, table_stride, pos_b,
    Hq, Hk, S, L, P, D, sign,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(S, BLOCK_S)
    head = tl.program_id(0) // num_tiles
    b, h = head // (Hq + Hk), head % (Hq + Hk)
    s = tl.program_id(0) % num_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    live = s < S
    cos, sin = table_rows(cos_ptr, sin_ptr, pos_ptr, b, s, live, table_b, table_stride, pos_b, L, P, BLOCK_P)
    b, at = b.to(tl.int64), s.to(tl.int64)
    if h < Hq:
        _turn(
            q_ptr + b * q_b + h.to(tl.int64) * q_h, q_out_ptr + b * qo_b + h.to(tl.int64) * qo_h, at, q_s, qo_s,
            cos, sin * sign, live, P, D, BLOCK_P, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip
    elif k_ptr is not None:
        h -= Hq
        _turn(
            k_ptr + b * k_b + h.to(tl.int64) * k_h, k_out_ptr + b * ko_b + h.to(tl.int64) * ko_h, at, k_s, ko_s,
            cos, sin * sign, live, P, D, BLOCK_P, BLOCK_REST, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _turn(
    x_ptr, y_ptr, at, x_s, y_s, cos, sin, live, P, D,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    first, second = pair_columns(P, BLOCK_P, INTERLEAVED)
    mask = live[:, None] & (tl.arange(0, BLOCK_P) < P)[None, :]
    x_rows, y_rows = x_ptr + (at * x_s)[:, None], y_ptr + (at * y_s)[:, None]
    x1 = tl.load(x_rows + first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_rows + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_rows + first, cast(x1 * cos - x2 * sin, y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_rows + second, cast(x2 * cos + x1 * sin, y_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        rest = 2 * P + tl.arange(0, BLOCK_REST)[None, :]
        mask = live[:, None] & (rest < D)
        tl.store(y_rows + rest, tl.load(x_rows + rest, mask=mask), mask=mask)


def plan(S: int, D: int, P: int, elements: int = ELEMENTS) -> dict:
    block_s = min(max(1, elements // triton.next_power_of_2(D)), triton.next_power_of_2(max(1, S)))
    rest = D - 2 * P
    return {
        "BLOCK_S": block_s,
        "BLOCK_P": triton.next_power_of_2(max(1, P)),
        "BLOCK_REST": triton.next_power_of_2(rest) if rest else 0,
        "num_warps": 4,
    }


def table_strides(cos, positions) -> tuple[int, int, int]:
    """Of the tables' batches and rows, and of the positions' batches; 0 where all share one."""
    batched = cos.dim() == 3 and cos.shape[0] > 1
    pos_b = positions.stride(0) if positions is not None and positions.shape[0] > 1 else 0
    return cos.stride(0) if batched else 0, cos.stride(-2), pos_b


def fwd(xs, cos, sin, positions, interleaved, inverse):
    q, k = xs[0], xs[1] if len(xs) > 1 else None
    (B, Hq, S, D), Hk, P = q.shape, 0 if k is None else k.shape[1], cos.shape[-1]
    outs = [torch.empty_like(x) for x in xs]
    last = outs[-1]
    if positions is not None and positions.stride(-1) == 0:
        positions = positions.contiguous()
    sizes = plan(S, D, P)
    programs = B * (Hq + Hk) * triton.cdiv(S, sizes["BLOCK_S"])
    if programs:
        with torch.cuda.device_of(q):
            _rope_kernel[(programs,)](
                q, k, outs[0], None if k is None else last, cos, sin, positions,
                *q.stride()[:3], *xs[-1].stride()[:3], *outs[0].stride()[:3], *last.stride()[:3],
                *table_strides(cos, positions), Hq, Hk, S, cos.shape[-2], P, D, -1.0 if inverse else 1.0,
                INTERLEAVED=interleaved, **sizes,
            )  # fmt: skip
    return outs
