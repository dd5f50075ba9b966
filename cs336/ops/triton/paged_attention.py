"""Attention over a paged cache in Triton: one program a tile of rows, a row being a query token of a query head.

The heads of a group are rows of one tile and share its keys. Blocks of keys start at multiples of BLOCK_N whatever the
queries, and what a row does not see adds exact zeros: so a row's bits depend on its position and its sequence alone,
not on its batch, nor on how a prompt is cut into chunks. A block that some rows of a tile do not see goes through other
code than one that all see: in prefill the compiler may not make one instruction, with one rounding, of a product and a
sum, which it did in the second alone.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton import paged_latent
from cs336.ops.triton.attention_tile import (
    INTERPRET,
    LOG2E,
    dot,
    gather,
    rows_in_page,
    scores,
    shared_memory,
    visible,
    width,
)
from cs336.ops.triton.cast import cast


@triton.jit
def _block(
    cache_ptr, table_ptr, start, T, P, page, page_stride, token_stride,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, IN_PAGE: tl.constexpr,
):  # fmt: skip
    """Rows of the keys from `start` on, zero from T on."""
    feature = tl.arange(0, BLOCK)
    if IN_PAGE:  # one entry of the table, so that loads are asked for a step earlier than behind those of many
        rows = rows_in_page(cache_ptr, table_ptr, start, T, P, page, page_stride, token_stride, feature, WIDTH, BLOCK_N)
    else:
        key = start + tl.arange(0, BLOCK_N)
        rows = gather(cache_ptr, table_ptr, key, T, P, page, page_stride, token_stride, feature, WIDTH)
    return rows


@triton.jit
def _walk(
    acc, m, l, q, k_ptr, v_ptr, table_ptr, lo, hi, T, position, P, page, k_page, k_token, v_page, v_token,
    inner, outer, left, D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, CAPPED: tl.constexpr, HAS_LEFT: tl.constexpr, IN_PAGE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = _block(k_ptr, table_ptr, start, T, P, page, k_page, k_token, D, BLOCK_N, BLOCK_D, IN_PAGE)
        s, _ = scores(dot(q, tl.trans(k)), position, key[None, :], 0.0, inner, outer, CAPPED, False)
        if not WHOLE:
            s = tl.where(visible(position, key[None, :], T, left, 0, HAS_LEFT, True), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: exp2(-inf - -inf) would be NaN
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        l = l * alpha + tl.sum(p, 1)
        v = _block(v_ptr, table_ptr, start, T, P, page, v_page, v_token, E, BLOCK_N, BLOCK_E, IN_PAGE)
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)
        m = m_new
    return acc, m, l


# Not compiled anew for what changes from call to call: a number that is 1 or a multiple of 16, a part of a tensor that
# begins between two multiples of 16 bytes.
@triton.jit(
    do_not_specialize=["table_b", "lse_b", "lse_h", "rows", "Q", "P", "M", "tiles", "left"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "cu_ptr"],
)
def _paged_kernel(
    q_ptr,  # (B, Q, H, D), or (T, H, D) with cu_ptr
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    cu_ptr,
    sinks_ptr,
    o_ptr,  # as q, contiguous
    lse_ptr,  # (B, H, Q) or (H, T)
    q_b, q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head, table_b, lse_b, lse_h,
    rows, Q, H, G, P, page, M, tiles, inner, outer, left,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, CAPPED: tl.constexpr, HAS_LEFT: tl.constexpr, IN_PAGE: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2)
    start = (tiles - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    if cu_ptr is None:
        first = b * Q
    else:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), rows)
        Q = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), first), rows) - first
    if start >= Q * G:
        return
    T = tl.minimum(tl.maximum(tl.load(lens_ptr + b), 0), M * page)
    row = start + tl.arange(0, BLOCK_M)
    query, head = row // G, h * G + row % G
    inside = row < Q * G
    if cu_ptr is None:
        token = b.to(tl.int64) * q_b + query.to(tl.int64) * q_token
    else:
        token = (first + query).to(tl.int64) * q_token
    feature = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + (token + head.to(tl.int64) * q_head)[:, None] + feature[None, :],
        mask=inside[:, None] & (feature < D)[None, :],
        other=0.0,
    )
    position = (T - Q + query)[:, None]
    earliest = T - Q + start // G
    latest = T - Q + tl.minimum((start + BLOCK_M - 1) // G, Q - 1)
    lo, whole_from = 0, 0
    if HAS_LEFT:
        lo = tl.maximum(earliest - left, 0) // BLOCK_N * BLOCK_N
        whole_from = tl.cdiv(tl.maximum(latest - left, 0), BLOCK_N) * BLOCK_N
    end = tl.maximum(latest + 1, lo)
    whole_from = tl.minimum(whole_from, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    whole_to = tl.maximum(tl.maximum(earliest + 1, 0) // BLOCK_N * BLOCK_N, whole_from)

    table_ptr += b.to(tl.int64) * table_b
    k_ptr += h.to(tl.int64) * k_head
    v_ptr += h.to(tl.int64) * v_head
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_LEFT:
        acc, m, l = _walk(
            acc, m, l, q, k_ptr, v_ptr, table_ptr, lo, tl.minimum(whole_from, end), T, position, P, page,
            k_page, k_token, v_page, v_token, inner, outer, left, D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, HAS_LEFT,
            IN_PAGE, False,
        )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, q, k_ptr, v_ptr, table_ptr, whole_from, whole_to, T, position, P, page,
        k_page, k_token, v_page, v_token, inner, outer, left, D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, HAS_LEFT,
        IN_PAGE, True,
    )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, q, k_ptr, v_ptr, table_ptr, whole_to, end, T, position, P, page,
        k_page, k_token, v_page, v_token, inner, outer, left, D, E, BLOCK_N, BLOCK_D, BLOCK_E, CAPPED, HAS_LEFT,
        IN_PAGE, False,
    )  # fmt: skip

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=inside, other=0.0) * 1.4426950408889634
        top = tl.maximum(m, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        acc *= tl.exp2(m - top)[:, None]
        l = l * tl.exp2(m - top) + tl.exp2(sink - top)
        m = top
    some = tl.where(l == 0.0, 1.0, l)  # 0 where a query sees nothing
    o = acc / some[:, None]
    of_value = tl.arange(0, BLOCK_E)
    place = ((first + query).to(tl.int64) * H + head) * E
    tl.store(
        o_ptr + place[:, None] + of_value[None, :],
        cast(o, o_ptr.dtype.element_ty),
        mask=inside[:, None] & (of_value < E)[None, :],
    )
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(some)) * 0.6931471805599453)
    if cu_ptr is None:
        place = b.to(tl.int64) * lse_b + head * lse_h + query
    else:
        place = head.to(tl.int64) * lse_h + first + query
    tl.store(lse_ptr + place, lse, mask=inside)


def _blocks(D: int, E: int, rows: int, page: int, prefill: bool, dtype: torch.dtype, device: torch.device) -> dict:
    """rows: query tokens times heads of a group, of the longest sequence. In prefill its tiles of 64 rows are made of
    the same instructions as those of 128, which leave a multiprocessor half of its keys in flight. Keys that a page
    holds are asked for three blocks ahead there: 256 sequences of 200 to 1000 tokens took 168 us for 193 on an H200,
    and 258 where each key was looked up."""
    wide = max(16, triton.next_power_of_2(max(D, E)))
    roomy = shared_memory(device) >= 160_000 and wide * dtype.itemsize <= 256
    few = rows <= 64 and dtype != torch.float32
    block = 16 if not prefill and rows <= 16 else 128 if roomy and not few else 64
    if INTERPRET.value:
        return {"BLOCK_M": block, "BLOCK_N": 16, "IN_PAGE": page % 16 == 0, "num_warps": 4, "num_stages": 1}
    keys = (64 if wide <= 128 else 32) // (2 if dtype == torch.float32 else 1)
    if wide > 256:  # latent attention's 576 features
        keys, block = 16, min(block, 32)
    warps = 4 if block * wide <= 8192 else 8
    deep = prefill and few and roomy and page % keys == 0 and shared_memory(device) >= 200_000
    stages = 5 if deep else 3 if roomy else 2
    plan = {"BLOCK_M": block, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    return plan | {"IN_PAGE": page % keys == 0, "enable_fp_fusion": not prefill}


def _run(q, k_cache, v_cache, page_table, seq_lens, cu, max_q, o, lse, lse_strides, scale, window, softcap, sinks):
    (P, page, Hkv, D), E, H = k_cache.shape, v_cache.shape[-1], q.shape[-2]
    B, G = seq_lens.shape[0], H // Hkv
    plan = _blocks(D, E, max_q * G, page, cu is not None, q.dtype, q.device)
    tiles = triton.cdiv(max_q * G, plan["BLOCK_M"])
    if tiles == 0 or B == 0:
        return
    q_strides = q.stride()[:3] if cu is None else (0, *q.stride()[:2])
    with torch.cuda.device_of(q):
        _paged_kernel[(tiles, Hkv, B)](
            q, k_cache, v_cache, page_table, seq_lens, cu, sinks, o, lse,
            *q_strides, *k_cache.stride()[:3], *v_cache.stride()[:3], page_table.stride(0), *lse_strides,
            q.shape[0], max_q, H, G, P, page, page_table.shape[1], tiles,
            scale / softcap if softcap > 0 else 1.0, (softcap if softcap > 0 else scale) * LOG2E, window,
            D=D, E=E, BLOCK_D=width(D, E, dtype=q.dtype), BLOCK_E=width(E, D, dtype=q.dtype),
            CAPPED=softcap > 0, HAS_LEFT=window >= 0, **plan,
        )  # fmt: skip


def paged_attention(q, k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks, *_):
    if paged_latent.fits(k_cache, v_cache, window, softcap, sinks):
        return paged_latent.decode(q, k_cache, v_cache, page_table, seq_lens, scale)
    B, Q, H, _ = q.shape
    o = q.new_empty(B, Q, H, v_cache.shape[-1])
    lse = q.new_empty(B, H, Q, dtype=torch.float32)
    strides = lse.stride()[:2]
    _run(q, k_cache, v_cache, page_table, seq_lens, None, Q, o, lse, strides, scale, window, softcap, sinks)
    return o, lse


def paged_prefill(q, k_cache, v_cache, page_table, seq_lens, cu, max_seqlen_q, scale, window, softcap, sinks):
    if paged_latent.fits(k_cache, v_cache, window, softcap, sinks):
        return paged_latent.prefill(q, k_cache, v_cache, page_table, seq_lens, cu, max_seqlen_q, scale)
    T, H, _ = q.shape
    o = q.new_zeros(T, H, v_cache.shape[-1])
    lse = q.new_full((H, T), -torch.inf, dtype=torch.float32)
    strides = 0, T
    args = q, k_cache, v_cache, page_table, seq_lens, cu, max_seqlen_q, o, lse, strides
    _run(*args, scale, window, softcap, sinks)
    return o, lse
