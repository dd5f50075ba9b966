"""flash-attn's functions on our attention: its argument names, layouts, defaults and meaning.

    from cs336 import flash_attn_func                  # instead of: from flash_attn import flash_attn_func

Shapes are (batch, tokens, heads, features), or packed (tokens, heads, features). More than flash-attn, these take
float32, any head dim, values of another width, and tensors on a CPU. With return_attn_probs they return
(out, lse, None): the third, flash-attn's copy of the probabilities for its own tests, is not made.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops.attention_autograd import attend, autocast, is_integer, new_seed
from cs336.ops.attention_raw import check_extras, check_numbers, check_slopes
from cs336.ops.checks import like
from cs336.ops.paged_attention import (
    MAX_DECODE_QUERIES,
    check_caches,
    check_pages,
    check_table,
    paged_attention,
    paged_prefill,
    readable,
)
from cs336.ops.paged_cache import append_kv_


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """softmax(q k^T * softmax_scale) v.

    Args:
        q: (B, S, Hq, D); k: (B, T, Hkv, D); v: (B, T, Hkv, E). Hq is a multiple of Hkv.
        dropout_p: of the probabilities; 0.0 in evaluation.
        softmax_scale: 1 / sqrt(D) if None.
        causal: the last query stands at the last key.
        window_size: keys before and after its own that a query sees, -1 for all.
        softcap: bound of the scores, 0.0 for none.
        alibi_slopes: (Hq,) or (B, Hq) float32; slope * |distance| is taken off the scores.
        deterministic: the backward adds in a fixed order.
        return_attn_probs: return (out, lse (B, Hq, S) float32, None).

    Returns out (B, S, Hq, E). Raises ValueError for arguments that do not fit.
    """
    _check(q, k, v, "(batch, tokens, heads, features)", 4)
    q, k, v = (x.transpose(1, 2) for x in autocast(q, k, v))
    options = _options(q, softmax_scale, causal, window_size, softcap)
    if alibi_slopes is None and dropout_p == 0.0:
        out, lse = attend("attention", q, k, v, *options, deterministic=deterministic)
    else:
        extras = _extras(q, alibi_slopes, dropout_p)
        args = q, k, v, None, None, 0, 0, *options, *extras
        out, lse = attend("attention_general", *args, deterministic=deterministic)
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv: Tensor, *args, **kwargs) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D); the other arguments are its own, from dropout_p on."""
    q, k, v = _unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args, **kwargs) -> Any:
    """`flash_attn_func` of q (B, S, Hq, D) and kv (B, T, 2, Hkv, D); the other arguments are its own."""
    k, v = _unpacked("kv", kv, 5, 2)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """`flash_attn_func` of packed sequences, each to itself.

    Args:
        q: (Tq, Hq, D); k: (Tk, Hkv, D); v: (Tk, Hkv, E): the tokens of all sequences.
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32, where sequences start, and where the last ends.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: (N, M) int32 pages of each sequence, in order, of k and v (P, page, Hkv, D or E): of a sequence
            the first cu_seqlens_k[i + 1] - cu_seqlens_k[i] tokens count.

    Returns out (Tq, Hq, E), or (out, lse (Hq, Tq) float32, None). Raises ValueError for arguments that do not fit.
    """
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise ValueError(f"{name} must be a tensor (N + 1,) int32, where sequences start, got {cu!r}")
    if block_table is None:
        _check(q, k, v, "(tokens, heads, features)", 3)
    q, k, v = autocast(q, k, v)
    if block_table is not None:
        lens = cu_seqlens_k.diff()
        left, right = _window(window_size)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if (causal or right == 0) and alibi_slopes is None and dropout_p == 0.0 and not differentiable:
            args = q, k, v, block_table, lens, cu_seqlens_q
            paged = _paged_options(softmax_scale, left, softcap)
            out, lse = paged_prefill(*args, max_seqlen_q=int(max_seqlen_q), **paged, return_lse=True)
            return (out, lse, None) if return_attn_probs else out
        k, v, cu_seqlens_k = _gathered(k, v, block_table, lens)
    packing = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    options = _options(q, softmax_scale, causal, window_size, softcap)
    if alibi_slopes is None and dropout_p == 0.0:
        out, lse = attend("attention_varlen", q, k, v, *packing, *options, deterministic=deterministic)
    else:
        extras = _extras(q, alibi_slopes, dropout_p)
        out, lse = attend("attention_general", q, k, v, *packing, *options, *extras, deterministic=deterministic)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args, **kwargs) -> Any:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D); the other arguments are its own, from dropout_p on."""
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args,
    **kwargs,
) -> Any:
    """`flash_attn_varlen_func` of q (Tq, Hq, D) and kv (Tk, 2, Hkv, D); the other arguments are its own."""
    k, v = _unpacked("kv", kv, 4, 2)
    packing = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, k, v, *packing, *args, **kwargs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache of keys and values, to which k and v are appended first, in place. No gradient.

    Args:
        q: (B, S, H, D), the last tokens of each sequence.
        k_cache, v_cache: (C, T, Hkv, D), a row a sequence; or (P, page, Hkv, D), the pages that block_table lists.
        k, v: (B, N, Hkv, D) new tokens, written behind cache_seqlens.
        rotary_cos, rotary_sin: (positions, R / 2), at least as many as a sequence's cache has: rotates the first R
            features of k, and of q, to their positions: cache_seqlens and on (all of q to cache_seqlens where it
            is neither causal nor in a window).
        cache_seqlens: tokens in the cache before the call, (B,) int32 or one number; all T if None.
        cache_batch_idx: (B,) int32, the row of the cache of each sequence; the first B if None.
        block_table: (B, M) int32 pages of each sequence, in order.
        cache_leftpad: (B,) int32, the place in its cache where a sequence begins: what stands before is not seen. 0 if
            None.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        rotary_interleaved: rotates features 2i and 2i + 1 together, not i and i + R / 2.
        num_splits: ours depends on a sequence's length alone, whatever is asked for.
        return_softmax_lse: return (out, lse (B, H, S) float32).

    Kernels of paged_attention.py read the cache where it lies. With cache_leftpad, alibi_slopes, or a window of several
    queries that is not causal, what is seen of it is copied together first.

    Returns out (B, S, H, D). cache_seqlens stays as it is. Raises ValueError for arguments that do not fit.
    """
    left, right = _window(window_size)
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(f"q and k_cache must have 4 dims, got shapes {tuple(q.shape)} and {tuple(k_cache.shape)}")
    B, S = q.shape[:2]
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx names rows of a cache without pages: leave it out beside a block_table")
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] < B:
        raise ValueError(f"a cache of {k_cache.shape[0]} rows has no row for each of q's {B} sequences")
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dim() != 4 or x.shape[0] != B):
            raise ValueError(f"{name} must be new tokens of q's {B} sequences, (B, N, Hkv, D), got {tuple(x.shape)}")
    check_numbers(softmax_scale, softcap or None)  # before anything is written
    check_extras(q.transpose(1, 2), None, alibi_slopes, 0.0, None)
    is_local, causal = (left, right) != (-1, -1), causal or right == 0
    table = _pages(B, cache_batch_idx, q.device) if block_table is None else block_table
    lens = _lengths(cache_seqlens, B, table.shape[-1] * k_cache.shape[1], q.device)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and rotary_sin is not None:
        if k is None:
            raise ValueError("rotary_cos and rotary_sin rotate k to its place in the cache: k and v are needed too")
        capacity = table.shape[-1] * k_cache.shape[1]
        if rotary_cos.dim() != 2 or rotary_sin.shape != rotary_cos.shape or rotary_cos.shape[0] < capacity:
            raise ValueError(
                f"rotary_cos and rotary_sin must have one shape (at least {capacity}, R / 2), a row for each token "
                f"that the cache holds, got {tuple(rotary_cos.shape)} and {tuple(rotary_sin.shape)}"
            )
        if 2 * rotary_cos.shape[1] > q.shape[-1]:
            raise ValueError(
                f"rotary_cos of {rotary_cos.shape[1]} columns rotates twice as many features, and q has {q.shape[-1]}"
            )
        steps = torch.arange(S if causal or is_local else 1, device=q.device)
        q = _rotated(q, rotary_cos, rotary_sin, lens[:, None] + steps, rotary_interleaved)
        steps = torch.arange(k.shape[1], device=q.device)
        k = _rotated(k, rotary_cos, rotary_sin, lens[:, None] + steps, rotary_interleaved)
    if cache_leftpad is not None:
        cache_leftpad = _leftpad(cache_leftpad, lens if k is None else lens + k.shape[1])
    if k is not None and v is not None:
        new = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
        sequences = torch.arange(B, dtype=torch.int32, device=q.device).repeat_interleave(len(new))
        positions = (lens[:, None] + new).flatten()
        append_kv_(k_cache, v_cache, k.flatten(0, 1), v.flatten(0, 1), table, sequences, positions)
        lens = lens + len(new)
    elif (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if cache_leftpad is not None or alibi_slopes is not None or (is_local and S > 1 and not causal):
        k, v, cu_seqlens_k = _gathered(k_cache, v_cache, table, lens, cache_leftpad)
        cu_seqlens_q = torch.arange(B + 1, dtype=torch.int32, device=q.device) * S
        packing = cu_seqlens_q, cu_seqlens_k, S, table.shape[1] * k_cache.shape[1]
        out, lse, _ = flash_attn_varlen_func(
            q.flatten(0, 1),
            k,
            v,
            *packing,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_attn_probs=True,
        )
        out, lse = out.unflatten(0, (B, S)), lse.unflatten(1, (B, S)).transpose(0, 1)
        return (out, lse) if return_softmax_lse else out
    options = _paged_options(softmax_scale, left, softcap)
    if not causal and S > 1:  # every query sees all keys: as the only one of a sequence of its own
        table, lens = table.repeat_interleave(S, 0), lens.repeat_interleave(S)
        alone = q.reshape(B * S, 1, *q.shape[2:])
        out, lse = paged_attention(alone, k_cache, v_cache, table, lens, **options, return_lse=True)
        out, lse = out.view(B, S, *out.shape[2:]), lse.view(B, S, -1).transpose(1, 2)
    elif S <= MAX_DECODE_QUERIES:
        out, lse = paged_attention(q, k_cache, v_cache, table, lens, **options, return_lse=True)
    else:
        cu = torch.arange(B + 1, dtype=torch.int32, device=q.device) * S
        args = q.reshape(B * S, *q.shape[2:]), k_cache, v_cache, table, lens, cu
        out, lse = paged_prefill(*args, max_seqlen_q=S, **options, return_lse=True)
        out, lse = out.view(B, S, *out.shape[1:]), lse.view(-1, B, S).transpose(0, 1)
    return (out, lse) if return_softmax_lse else out


def _paged_options(scale: float | None, left: int, softcap: float) -> dict[str, Any]:
    return {"scale": scale, "window": left if left >= 0 else None, "softcap": softcap or None}


def _gathered(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, lens: Tensor, begins: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of all sequences behind each other, from where each begins to its length, and where they start.

    On a GPU, where their number would have to be waited for, there are rows behind the last for all that the table has.
    """
    check_caches(k_cache, v_cache)
    check_table(table, k_cache)
    (B, M), (P, page) = table.shape, k_cache.shape[:2]
    if lens.shape != (B,):
        raise ValueError(f"there must be as many lengths as rows of pages, {B}, got {tuple(lens.shape)}")
    begins = torch.zeros_like(lens) if begins is None else begins
    if readable(table, lens):
        check_pages(k_cache, table, lens)
    cu_seqlens = torch.nn.functional.pad((lens - begins).cumsum(0, dtype=torch.int32), (1, 0))
    count = int(cu_seqlens[-1]) if _counts(table) else B * M * page
    row = torch.arange(count, device=table.device, dtype=torch.int32)
    if not row.numel():
        return k_cache[:0, 0], v_cache[:0, 0], cu_seqlens
    b = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=B - 1)
    place = (row - cu_seqlens[b] + begins[b]).clamp(0, M * page - 1).long()
    at = table[b, place // page].long().clamp(0, P - 1), place % page
    if _counts(table):
        return k_cache[at], v_cache[at], cu_seqlens
    held = (row < cu_seqlens[-1])[:, None, None]  # a gradient of what lies behind need not have been written
    return torch.where(held, k_cache[at], 0), torch.where(held, v_cache[at], 0), cu_seqlens


def _leftpad(begins: Tensor, lens: Tensor) -> Tensor:
    """Where sequences of these lengths begin, checked: (B,) int32."""
    if not isinstance(begins, Tensor):
        raise ValueError(f"cache_leftpad must be a tensor {tuple(lens.shape)} int32, got {begins!r}")
    if begins.shape != lens.shape or begins.is_floating_point() or begins.device != lens.device:
        raise ValueError(f"cache_leftpad must be {tuple(lens.shape)} torch.int32 on {lens.device}, got {like(begins)}")
    if readable(begins, lens) and ((begins < 0) | (begins > lens)).any():
        raise ValueError(f"cache_leftpad must be from 0 to the length {lens.tolist()}, got {begins.tolist()}")
    return begins.to(torch.int32)


def _counts(table: Tensor) -> bool:
    """Whether how many rows there are is asked for: on a GPU the host would wait."""
    return table.device.type == "cpu"


def _pages(B: int, cache_batch_idx: Tensor | None, device: torch.device) -> Tensor:
    """A cache without pages is one page a sequence."""
    if cache_batch_idx is None:
        return torch.arange(B, dtype=torch.int32, device=device)[:, None]
    return cache_batch_idx.to(torch.int32)[:, None]


def _lengths(cache_seqlens: int | Tensor | None, B: int, most: int, device: torch.device) -> Tensor:
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens.to(torch.int32)
    return torch.full((B,), most if cache_seqlens is None else cache_seqlens, dtype=torch.int32, device=device)


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    rows_BS = positions_BS.long().clamp(0, len(cos) - 1)  # what is outside is refused, or skipped, later
    cos, sin = (t[rows_BS][:, :, None].float() for t in (cos, sin))
    turned, rest = x_BSHD[..., : 2 * half], x_BSHD[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    a, b = (t.float() for t in pairs)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned.to(x_BSHD.dtype), rest), -1)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: str, dims: int) -> None:
    """In the caller's own shapes: the op below has heads before tokens."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.is_nested or x.dim() != dims or x.shape[-1] == 0:
            got = "a nested tensor: flash_attn_varlen_func packs" if x.is_nested else f"shape {tuple(x.shape)}"
            raise ValueError(f"{name} must be {layout}, got {got}")
    num_batch_dims = dims - 3
    together = k.shape[:-1] == v.shape[:-1] and k.shape[:num_batch_dims] == q.shape[:num_batch_dims]
    if not together or k.shape[-1] != q.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v, {layout}, must fit each other, got {shapes}")


def _options(q: Tensor, scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float) -> tuple:
    left, right = _window(window_size)
    return q.shape[-1] ** -0.5 if scale is None else scale, causal, left, right, softcap


def _window(window_size: tuple[int, int]) -> tuple[int, int]:
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(is_integer(side) and side >= -1 for side in window_size):
        raise ValueError(f"window_size must be two lengths of at least 0, or -1 for all, got {window_size!r}")
    return window_size


def _extras(q: Tensor, alibi_slopes: Tensor | None, dropout_p: float) -> tuple:
    check_slopes(alibi_slopes)
    return alibi_slopes, dropout_p, new_seed(q.device) if dropout_p > 0 else None


def _unpacked(name: str, x: Tensor, dims: int, num: int) -> tuple[Tensor, ...]:
    if x.dim() != dims or x.shape[-3] != num:
        raise ValueError(f"{name} must have {dims} dims, the third from last {num}, got shape {tuple(x.shape)}")
    return x.unbind(-3)
