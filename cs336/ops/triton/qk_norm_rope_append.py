"""Norms, rotation and writing to a paged cache in Triton. A program takes BLOCK_S tokens of one head of q, k or v."""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.launches import launches_early, wait_for_predecessor
from cs336.ops.triton.qk_norm_rope import _columns, _load, _store, _sum
from cs336.ops.triton.rope import plan, table_rows


@triton.jit
def _turned(
    x_rows, w_ptr, cos, sin, live, P, D, eps, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr
):
    first, second, rest, paired, resting = _columns(P, D, BLOCK_P, BLOCK_REST, INTERLEAVED)
    mask, rest_mask = live[:, None] & paired, live[:, None] & resting
    x1, x2, x3 = _load(x_rows, first, second, rest, mask, rest_mask, BLOCK_REST)
    if w_ptr is not None:
        w1, w2, w3 = _load(w_ptr, first, second, rest, paired, resting, BLOCK_REST)
        rstd = tl.rsqrt(_sum(x1 * x1, x2 * x2, x3 * x3, BLOCK_REST) / D + eps)[:, None]
        x1, x2, x3 = x1 * rstd * w1, x2 * rstd * w2, x3 * rstd * w3
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3


# Not compiled anew for what changes from call to call: numbers of tokens, and parts of tensors.
@triton.jit(
    do_not_specialize=["T", "B", "M", "pages", "table_b"],
    do_not_specialize_on_alignment=["pos_ptr", "seq_ptr", "table_ptr"],
)
def _kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr,
    pos_ptr, seq_ptr, table_ptr,
    q_t, q_h, k_t, k_h, v_t, v_h, k_page, k_token, k_head, v_page, v_token, v_head, table_b, cos_stride,
    T, Hq, Hk, L, P, D, E, pages, page, B, M, eps,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_E: tl.constexpr,
    INTERLEAVED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(EARLY)
    tiles = tl.cdiv(T, BLOCK_S)
    head, t = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    live, at = t < T, t.to(tl.int64)
    if head < Hq:
        cos, sin = table_rows(cos_ptr, sin_ptr, pos_ptr, 0, t, live, 0, cos_stride, 0, L, P, BLOCK_P)
        x_rows = q_ptr + (at * q_t + head * q_h)[:, None]
        y1, y2, y3 = _turned(x_rows, qw_ptr, cos, sin, live, P, D, eps, BLOCK_P, BLOCK_REST, INTERLEAVED)
        first, second, rest, paired, resting = _columns(P, D, BLOCK_P, BLOCK_REST, INTERLEAVED)
        y_rows = q_out_ptr + ((at * Hq + head) * D)[:, None]
        _store(y_rows, first, second, rest, live[:, None] & paired, live[:, None] & resting, y1, y2, y3, BLOCK_REST)
    else:
        position = tl.load(pos_ptr + t, mask=live, other=-1)
        sequence = tl.load(seq_ptr + t, mask=live, other=-1)
        kept = (position >= 0) & (position < M * page) & (sequence >= 0) & (sequence < B)
        entry = tl.load(table_ptr + sequence.to(tl.int64) * table_b + position // page, mask=kept, other=-1)
        kept = kept & (entry >= 0) & (entry < pages)
        if head < Hq + Hk:
            h = head - Hq
            cos, sin = table_rows(cos_ptr, sin_ptr, pos_ptr, 0, t, live, 0, cos_stride, 0, L, P, BLOCK_P)
            x_rows = k_ptr + (at * k_t + h * k_h)[:, None]
            y1, y2, y3 = _turned(x_rows, kw_ptr, cos, sin, live, P, D, eps, BLOCK_P, BLOCK_REST, INTERLEAVED)
            first, second, rest, paired, resting = _columns(P, D, BLOCK_P, BLOCK_REST, INTERLEAVED)
            y_rows = k_out_ptr + ((at * Hk + h) * D)[:, None]
            _store(y_rows, first, second, rest, live[:, None] & paired, live[:, None] & resting, y1, y2, y3, BLOCK_REST)
            place = entry.to(tl.int64) * k_page + (position % page).to(tl.int64) * k_token + h * k_head
            c_rows = k_cache_ptr + place[:, None]
            _store(c_rows, first, second, rest, kept[:, None] & paired, kept[:, None] & resting, y1, y2, y3, BLOCK_REST)
        else:
            h = head - Hq - Hk
            column = tl.arange(0, BLOCK_E)[None, :]
            mask = kept[:, None] & (column < E)
            value = tl.load(v_ptr + (at * v_t + h * v_h)[:, None] + column, mask=mask)
            place = entry.to(tl.int64) * v_page + (position % page).to(tl.int64) * v_token + h * v_head
            tl.store(v_cache_ptr + place[:, None] + column, value, mask=mask)


def qk_norm_rope_append_(
    k_cache, v_cache, q, k, v, cos, sin, page_table, sequences, positions, q_weight, k_weight, interleaved, eps
):
    (T, Hq, D), (pages, page, Hk, E), (B, M), P = q.shape, v_cache.shape, page_table.shape, cos.shape[-1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    sizes = plan(T, D, P)
    early = launches_early(q.device)
    programs = (Hq + 2 * Hk) * triton.cdiv(T, sizes["BLOCK_S"])
    if programs:
        with torch.cuda.device_of(q):
            _kernel[(programs,)](
                q, k, v, q_out, k_out, k_cache, v_cache, q_weight, k_weight, cos, sin, positions, sequences, page_table,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
                page_table.stride(0), cos.stride(0), T, Hq, Hk, cos.shape[0], P, D, E, pages, page, B, M, eps,
                BLOCK_E=triton.next_power_of_2(E), INTERLEAVED=interleaved, EARLY=early, **sizes,
                **({"launch_pdl": True} if early else {}),
            )  # fmt: skip
    return q_out, k_out
