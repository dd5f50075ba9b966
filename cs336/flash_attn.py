"""flash-attn's functions on our attention: its argument names, layouts, defaults and meaning.

    from cs336 import flash_attn_func                  # instead of: from flash_attn import flash_attn_func

Shapes are (batch, tokens, heads, features), or packed (tokens, heads, features). More than flash-attn, these take
float32, any head dim, values of another width, and tensors on a CPU. With return_attn_probs they return
(out, lse, None): the third, flash-attn's copy of the probabilities for its own tests, is not made.
"""

from typing import Any

from torch import Tensor

from cs336.ops.attention_autograd import attend, autocast, new_seed


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
        block_table: of a paged cache; not supported.

    Returns out (Tq, Hq, E), or (out, lse (Hq, Tq) float32, None). Raises ValueError for arguments that do not fit,
    NotImplementedError for a block_table.
    """
    if block_table is not None:
        raise NotImplementedError("cs336.flash_attn_varlen_func does not support block_table, of a paged cache")
    q, k, v = autocast(q, k, v)
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


def _options(q: Tensor, scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float) -> tuple:
    left, right = window_size
    if min(left, right) < -1:
        raise ValueError(f"window_size must be two lengths of at least 0, or -1 for all, got {tuple(window_size)}")
    return q.shape[-1] ** -0.5 if scale is None else scale, causal, left, right, softcap


def _extras(q: Tensor, alibi_slopes: Tensor | None, dropout_p: float) -> tuple:
    return alibi_slopes, dropout_p, new_seed(q.device) if dropout_p > 0 else None


def _unpacked(name: str, x: Tensor, dims: int, num: int) -> tuple[Tensor, ...]:
    if x.dim() != dims or x.shape[-3] != num:
        raise ValueError(f"{name} must have {dims} dims, the third from last {num}, got shape {tuple(x.shape)}")
    return x.unbind(-3)
