"""Paged attention whose values are the beginning of their keys, for one key head: latent attention, absorbed.

Each row of the cache is loaded once, for its score and as its value. The heads, and the queries of a sequence, are rows
of a tile. While decoding the keys are cut into pieces by the sequence's length alone, and pieces are added up in order:
a sequence's bits do not depend on its batch. The grid is that of the longest sequence the table can hold, so that one
captured graph serves all lengths.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.attention_tile import INTERPRET, LOG2E, dot, gather, rows_in_page, shared_memory, width
from cs336.ops.triton.cast import cast

MOST = 64  # pieces of a sequence
WIDEST = 512  # features of a value


@triton.jit
def _size(T, least, MOST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a piece."""
    return tl.maximum(tl.cdiv(tl.cdiv(T, MOST), BLOCK_N) * BLOCK_N, least)


# Not compiled anew for what changes from call to call: see paged_attention.py.
@triton.jit(
    do_not_specialize=["table_b", "lse_piece", "lse_b", "lse_h", "rows", "Q", "P", "M", "tiles", "least"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "cu_ptr"],
)
def _latent_kernel(
    q_ptr,  # (B, Q, H, L + R), or (T, H, L + R) with cu_ptr
    cache_ptr,  # (P, page, L + R)
    table_ptr,
    lens_ptr,
    cu_ptr,
    o_ptr,  # (pieces, rows, H, L), contiguous
    lse_ptr,  # (pieces, B, H, Q) or (H, T)
    q_b, q_token, q_head, c_page, c_token, table_b, lse_piece, lse_b, lse_h,
    rows, Q, H, P, page, M, tiles, least, outer,
    L: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, MOST: tl.constexpr, SPLIT: tl.constexpr, IN_PAGE: tl.constexpr,
):  # fmt: skip
    piece, b = tl.program_id(1), tl.program_id(2)
    start = (tiles - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    if cu_ptr is None:
        first = b * Q
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), rows)
        Q = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), first), rows) - first
    T = tl.minimum(tl.maximum(tl.load(lens_ptr + b), 0), M * page)
    lo, hi = 0, T - Q + tl.minimum((start + BLOCK_M - 1) // H, Q - 1) + 1
    if SPLIT:
        size = _size(T, least, MOST, BLOCK_N)
        lo = piece * size
        hi = tl.minimum(hi, lo + size)
    if (start >= Q * H) | (SPLIT & (lo >= T)):
        return
    row = start + tl.arange(0, BLOCK_M)
    query, head = row // H, row % H
    inside = row < Q * H
    if cu_ptr is None:
        token = b.to(tl.int64) * q_b + query.to(tl.int64) * q_token
    else:
        token = (first + query).to(tl.int64) * q_token
    of_latent, of_rest = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    q_ptr += (token + head.to(tl.int64) * q_head)[:, None]
    q_latent = tl.load(q_ptr + of_latent[None, :], mask=inside[:, None] & (of_latent < L)[None, :], other=0.0)
    q_rest = tl.load(q_ptr + L + of_rest[None, :], mask=inside[:, None] & (of_rest < R)[None, :], other=0.0)
    position = (T - Q + query)[:, None]
    table_ptr += b.to(tl.int64) * table_b
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(lo, hi, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        if IN_PAGE:
            latent = rows_in_page(cache_ptr, table_ptr, n, T, P, page, c_page, c_token, of_latent, L, BLOCK_N)
            rest = rows_in_page(cache_ptr + L, table_ptr, n, T, P, page, c_page, c_token, of_rest, R, BLOCK_N)
        else:
            latent = gather(cache_ptr, table_ptr, key, T, P, page, c_page, c_token, of_latent, L)
            rest = gather(cache_ptr + L, table_ptr, key, T, P, page, c_page, c_token, of_rest, R)
        s = (dot(q_latent, tl.trans(latent)) + dot(q_rest, tl.trans(rest))) * outer
        s = tl.where((key[None, :] <= position) & (key < T)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: exp2(-inf - -inf) would be NaN
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + dot(cast(p, latent.dtype), latent)
        m = m_new
    some = tl.where(l == 0.0, 1.0, l)  # 0 where a query sees nothing
    place = ((piece.to(tl.int64) * rows + first + query) * H + head) * L
    tl.store(
        o_ptr + place[:, None] + of_latent[None, :],
        cast(acc / some[:, None], o_ptr.dtype.element_ty),
        mask=inside[:, None] & (of_latent < L)[None, :],
    )
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(some)) * 0.6931471805599453)
    if cu_ptr is None:
        place = piece.to(tl.int64) * lse_piece + b.to(tl.int64) * lse_b + head * lse_h + query
    else:
        place = head.to(tl.int64) * lse_h + first + query
    tl.store(lse_ptr + place, lse, mask=inside)


@triton.jit(do_not_specialize=["rows", "Q", "M", "pieces", "least"], do_not_specialize_on_alignment=["lens_ptr"])
def _combine_kernel(
    parts_ptr,  # (pieces, B * Q, H, L) float32
    part_lse_ptr,  # (pieces, B, H, Q) float32
    lens_ptr,
    o_ptr,  # (B, Q, H, L)
    lse_ptr,  # (B, H, Q)
    rows, Q, H, page, M, pieces, least,
    L: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One head of one query: its pieces side by side."""
    row = tl.program_id(0)
    query, head, b = (row // H) % Q, row % H, row // H // Q
    T = tl.minimum(tl.maximum(tl.load(lens_ptr + b), 0), M * page)
    piece, feature = tl.arange(0, MOST), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (piece < pieces) & (piece * _size(T, least, MOST, BLOCK_N) < T)
    place = (b * H + head) * Q + query
    lse = tl.load(part_lse_ptr + piece.to(tl.int64) * rows * H + place, mask=there, other=float("-inf"))
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - top)
    total = tl.sum(weight, 0)
    some = tl.where(total == 0.0, 1.0, total)
    mask = there[:, None] & (feature < L)[None, :]
    where = (piece.to(tl.int64) * rows * H + row)[:, None] * L + feature[None, :]
    parts = tl.load(parts_ptr + where, mask=mask, other=0.0)
    o = tl.sum(parts * weight[:, None], 0) / some
    tl.store(o_ptr + row.to(tl.int64) * L + feature, cast(o, o_ptr.dtype.element_ty), mask=feature < L)
    tl.store(lse_ptr + place, tl.where(total == 0.0, float("-inf"), top + tl.log(some)))


def fits(k_cache, v_cache, window: int, softcap: float, sinks) -> bool:
    """Whether v_cache is the beginning of k_cache, and the rest is of this kernel."""
    same = v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride()[:2] == k_cache.stride()[:2]
    narrower = k_cache.shape[2] == 1 and v_cache.shape[3] < k_cache.shape[3] and v_cache.shape[3] <= WIDEST
    return same and narrower and window < 0 and softcap == 0 and sinks is None


def plan(decode_rows: int | None, L: int, R: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """decode_rows: query tokens times heads; None for prefill, whose tiles never depend on its rows."""
    wide = {"BLOCK_L": width(L, R, dtype=dtype), "BLOCK_R": width(R, L, dtype=dtype)}
    most = 64 if dtype.itemsize == 2 else 16
    rows = most if decode_rows is None else min(most, max(16, triton.next_power_of_2(decode_rows)))
    if INTERPRET.value:
        return wide | {"BLOCK_M": rows, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    row, room = sum(wide.values()) * dtype.itemsize, shared_memory(device)
    cuts = [(64, 2), (32, 2), (16, 2)] if dtype.itemsize == 2 else [(16, 1)]
    fits = [(m, *c) for m in (rows, rows // 2) for c in cuts if (m + c[0]) * row + 256 * m <= room]
    rows, keys, stages = fits[0] if fits else (16, *cuts[-1])
    warps = 4 if rows <= 16 else 8
    return wide | {"BLOCK_M": max(16, rows), "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def decode(q, k_cache, v_cache, page_table, seq_lens, scale):
    """paged_attention's o and lse."""
    (B, Q, H, D), (P, page), L, M = q.shape, k_cache.shape[:2], v_cache.shape[3], page_table.shape[1]
    o, lse = q.new_empty(B, Q, H, L), q.new_empty(B, H, Q, dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    cut = plan(Q * H, L, D - L, q.dtype, q.device)
    least = min(1024, max(256, 8 * triton.next_power_of_2(Q * H)))  # a piece's result costs as much as 2 H keys
    pieces, tiles = min(MOST, max(1, triton.cdiv(M * page, least))), triton.cdiv(Q * H, cut["BLOCK_M"])
    parts, part_lse = q.new_empty(pieces, B * Q, H, L, dtype=torch.float32), lse.new_empty(pieces, B, H, Q)
    with torch.cuda.device_of(q):
        _latent_kernel[(tiles, pieces, B)](
            q, k_cache, page_table, seq_lens, None, parts, part_lse,
            *q.stride()[:3], *k_cache.stride()[:2], page_table.stride(0), *part_lse.stride()[:3],
            B * Q, Q, H, P, page, M, tiles, least, scale * LOG2E, L=L, R=D - L, MOST=MOST, SPLIT=True,
            IN_PAGE=page % cut["BLOCK_N"] == 0, **cut,
        )  # fmt: skip
        block = min(128, cut["BLOCK_L"])
        _combine_kernel[(B * Q * H, triton.cdiv(L, block))](
            parts, part_lse, seq_lens, o, lse, B * Q, Q, H, page, M, pieces, least,
            L=L, BLOCK=block, BLOCK_N=cut["BLOCK_N"], MOST=MOST,
        )  # fmt: skip
    return o, lse


def prefill(q, k_cache, v_cache, page_table, seq_lens, cu, max_seqlen_q, scale):
    """paged_prefill's o and lse."""
    (T, H, D), (P, page), L, B = q.shape, k_cache.shape[:2], v_cache.shape[3], seq_lens.shape[0]
    o, lse = q.new_zeros(T, H, L), q.new_full((H, T), -torch.inf, dtype=torch.float32)
    cut = plan(None, L, D - L, q.dtype, q.device)
    tiles = triton.cdiv(max_seqlen_q * H, cut["BLOCK_M"])
    if tiles and B:
        with torch.cuda.device_of(q):
            _latent_kernel[(tiles, 1, B)](
                q, k_cache, page_table, seq_lens, cu, o, lse,
                0, *q.stride()[:2], *k_cache.stride()[:2], page_table.stride(0), 0, 0, T,
                T, max_seqlen_q, H, P, page, page_table.shape[1], tiles, 0, scale * LOG2E,
                L=L, R=D - L, MOST=MOST, SPLIT=False,
                IN_PAGE=page % cut["BLOCK_N"] == 0, **cut,
            )  # fmt: skip
    return o, lse
