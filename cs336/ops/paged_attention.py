"""Attention over a paged cache, for decoding and for prefill in chunks.   Kwon et al. 2023, arXiv:2309.06180

A pool of P pages holds `page` tokens each; row b of the page table lists the pages of sequence b, in order. Queries are
the last tokens of their sequence, appended to the cache before the call, and see no later key. Decode is bound by
memory: it reads sum(min(length, window + Q)) Hkv (D + E) elements. A sequence's bits do not depend on the batch unless
it is told that they may.

B = sequences, Q = query tokens a sequence, T = of all sequences, H, Hkv = query and key-value heads, D = features of a
head, E = of its values, P = pages, M = entries of a row of the table.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.attention_raw import check_numbers
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import default_scale, rows
from cs336.ops.ref import paged_attention as ref

MAX_DECODE_QUERIES = 8
NATIVE_HEAD_DIMS = (64, 128)  # of the kernels in csrc/kernels/paged_attention
NATIVE_SHARED_MEMORY = 115 * 1024


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    invariant: bool = True,
    settled: bool = False,
    spare: int = 0,
    return_lse: bool = False,
) -> Any:
    """Attention of the last Q tokens of each sequence to its cache, causal. No gradient.

    Args:
        q: (B, Q, H, D) floating point, Q from 1 to 8.
        k_cache: (P, page, Hkv, D) like q; H is a multiple of Hkv, and query head h reads key-value head h // (H / Hkv).
        v_cache: (P, page, Hkv, E) like k_cache. Of latent attention, whose one key head holds its values, the view
            k_cache[..., :E]: then Triton reads them once, up to E = 512 without window, softcap and sinks.
        page_table: (B, M) int32: entry j of row b is the page of tokens j * page to (j + 1) * page of sequence b.
            Entries past a sequence's length may hold anything, and so may its last page past it.
        seq_lens: (B,) int32, tokens of each sequence in the cache, its queries included; 0 for an empty slot.
        scale: of the scores; 1 / sqrt(D) if None.
        window: how many keys before its own a query sees; all if None.
        softcap: bound of the scores' magnitude; none if None.
        sinks: (H,) float32, one more score a head, whose value is zero.
        invariant: a sequence's bits are the same in any batch. False: the native kernel cuts sequences wherever that
            divides the work best, and gives the same bits for the same batch only.
        settled: a promise that page_table, seq_lens and all tokens but the last Q of each sequence are written by none
            of the kernels just before this one on the stream, and may be read while those still run: not by the last
            kernel, whatever made it, nor by those that it may overlap itself.
        spare: multiprocessors that the native kernel leaves to kernels of other streams: it then has each of the others
            for itself.
        return_lse: return the scores' log-sum-exp too: (B, H, Q) float32, sinks included.

    Returns out (B, Q, H, E) like q, or (out, lse). A query without keys gives zeros: all of an empty slot, and the
    first ones where a sequence is shorter than Q.
    Raises ValueError for arguments that do not fit. What page_table and seq_lens hold is checked on a CPU; on a
    GPU, where looking would make the host wait, kernels stay inside the tensors, and the results are undefined.
    """
    if q.dim() == 4 and not 1 <= q.shape[1] <= MAX_DECODE_QUERIES:
        raise ValueError(
            f"q must have 1 to {MAX_DECODE_QUERIES} tokens a sequence, got shape {tuple(q.shape)}: "
            "ops.paged_prefill takes more"
        )
    if spare < 0:
        raise ValueError(f"spare must be a number of multiprocessors, 0 for none, got {spare}")
    args = rows(q), rows(k_cache), rows(v_cache), page_table, seq_lens
    options = _options(q, scale, window, softcap, sinks)
    _check_decode(*args, *options)
    out, lse = registry.call("paged_attention", *args, *options, invariant, settled, spare)
    return (out, lse) if return_lse else out


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seqlen_q: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of any number of last tokens of each sequence to its cache, causal: a chunk of a prompt. No gradient.

    Args:
        q: (T, H, D) floating point, the queries of all sequences behind each other.
        cu_seqlens_q: (B + 1,) int32: the queries of sequence b are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        max_seqlen_q: at least the most queries of a sequence.
        k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks: as in `paged_attention`.
        return_lse: return the scores' log-sum-exp too: (H, T) float32, sinks included.

    Returns out (T, H, E) like q, or (out, lse). Raises ValueError as `paged_attention` does.
    """
    args = rows(q), rows(k_cache), rows(v_cache), page_table, seq_lens, cu_seqlens_q, max_seqlen_q
    options = _options(q, scale, window, softcap, sinks)
    _check_prefill(*args, *options)
    out, lse = registry.call("paged_prefill", *args, *options)
    return (out, lse) if return_lse else out


def _options(q: Tensor, scale, window, softcap, sinks) -> tuple:
    if window is not None and (not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be a number of keys of at least 0, or None for all, got {window!r}")
    check_numbers(scale, softcap)
    scale = default_scale(q) if scale is None else scale
    return scale, -1 if window is None else window, softcap or 0.0, sinks


# ---- what every variant refuses ----


def _check_decode(q, k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks, *_) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be (B, Q, H, D), got shape {tuple(q.shape)}")
    _check(q, k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks, q.shape[0])


def _check_prefill(
    q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, max_seqlen_q, scale, window, softcap, sinks
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be (T, H, D), got shape {tuple(q.shape)}")
    _check_ints("cu_seqlens_q", cu_seqlens_q, "(B + 1,)", 1, q.device)
    if cu_seqlens_q.shape[0] < 1:
        raise ValueError("cu_seqlens_q must have at least one entry")
    if max_seqlen_q < 0:
        raise ValueError(f"max_seqlen_q must not be negative, got {max_seqlen_q}")
    _check(q, k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks, cu_seqlens_q.shape[0] - 1)
    if not readable(cu_seqlens_q):
        return
    lengths = cu_seqlens_q.diff()
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != q.shape[0] or (lengths < 0).any():
        raise ValueError(f"cu_seqlens_q must rise from 0 to q's {q.shape[0]} rows, got {cu_seqlens_q.tolist()}")
    if lengths.numel() and lengths.max() > max_seqlen_q:
        raise ValueError(f"max_seqlen_q must be at least the most queries, {lengths.max()}, got {max_seqlen_q}")


def _check(q, k_cache, v_cache, page_table, seq_lens, scale, window, softcap, sinks, num_sequences: int) -> None:
    check_caches(k_cache, v_cache)
    (_, _, Hkv, D), H = k_cache.shape, q.shape[-2]
    for name, x in (("q", q), ("k_cache", k_cache)):
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(f"{name} must be floating point like q, {q.dtype} on {q.device}, got {like(x)}")
        check_last_dims(**{name: x})
    if q.shape[-1] != D:
        raise ValueError(f"q must have the {D} features of k_cache, got shape {tuple(q.shape)}")
    if H % Hkv != 0:
        raise ValueError(f"q's heads must be a multiple of k_cache's, got {H} and {Hkv}")
    check_table(page_table, k_cache)
    _check_ints("seq_lens", seq_lens, "(B,)", 1, q.device)
    if page_table.shape[0] != num_sequences or seq_lens.shape[0] != num_sequences:
        raise ValueError(
            f"page_table and seq_lens must have a row for each of {num_sequences} sequences, got "
            f"{tuple(page_table.shape)} and {tuple(seq_lens.shape)}"
        )
    if window < -1:
        raise ValueError(f"window must be at least 0, or -1 for none, got {window}")
    check_numbers(scale, softcap or None)
    if sinks is not None and (sinks.shape != (H,) or sinks.dtype != torch.float32 or sinks.device != q.device):
        raise ValueError(f"sinks must be {(H,)} torch.float32 on {q.device}, got {like(sinks)}")
    if sinks is not None and not sinks.is_contiguous():
        raise ValueError(f"sinks must be contiguous, got stride {sinks.stride()}")
    if readable(seq_lens, page_table):
        check_pages(k_cache, page_table, seq_lens)


def check_pages(k_cache: Tensor, page_table: Tensor, seq_lens: Tensor) -> None:
    (P, page), M = k_cache.shape[:2], page_table.shape[1]
    if ((seq_lens < 0) | (seq_lens > M * page)).any():
        raise ValueError(f"seq_lens must be from 0 to {M} pages of {page} tokens, got {seq_lens.tolist()}")
    used_BM = torch.arange(M, device=page_table.device) * page < seq_lens[:, None]
    if (used_BM & ((page_table < 0) | (page_table >= P))).any():
        raise ValueError(f"page_table must hold pages from 0 to {P - 1} up to each sequence's length")


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4 or min(x.shape[1:]) == 0:
            raise ValueError(f"{name} must be (P, page, Hkv, D) with page, Hkv, D >= 1, got shape {tuple(x.shape)}")
        check_last_dims(**{name: x})
    if v_cache.shape[:3] != k_cache.shape[:3] or v_cache.dtype != k_cache.dtype or v_cache.device != k_cache.device:
        raise ValueError(f"v_cache must fit k_cache, {like(k_cache)}, got {like(v_cache)}")


def check_table(page_table: Tensor, k_cache: Tensor) -> None:
    _check_ints("page_table", page_table, "(B, M)", 2, k_cache.device)
    check_last_dims(page_table=page_table)


def _check_ints(name: str, x: Tensor, shape: str, dims: int, device: torch.device) -> None:
    if x.dim() != dims or x.dtype != torch.int32 or x.device != device:
        raise ValueError(f"{name} must be {shape} torch.int32 on {device}, got {like(x)}")
    if dims == 1 and not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {x.stride()}")


def readable(*tensors: Tensor) -> bool:
    """Whether looking at what they hold costs nothing: on a GPU it would wait, and a compiler's hold nothing."""
    return not torch.compiler.is_compiling() and all(x.device.type == "cpu" and type(x) is Tensor for x in tensors)


# ---- what a variant refuses: sentences ----


def _native_refuses(q, k_cache, v_cache, *_) -> str | None:
    if q.device.type == "cpu":
        return no_float64(q)
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the native kernel takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in NATIVE_HEAD_DIMS or v_cache.shape[-1] != q.shape[-1]:
        return f"the native kernel has heads of 64 and 128 features, not {q.shape[-1]} and {v_cache.shape[-1]}"
    if k_cache.shape[1] % 16 != 0:
        return f"the native kernel has pages of a multiple of 16 tokens, not {k_cache.shape[1]}"
    seen = not torch.compiler.is_compiling()  # where offsets would break the graph: the op checks them again
    for x in (q, k_cache, v_cache):
        if any(size > 1 and step % 8 != 0 for size, step in zip(x.shape[:-1], x.stride(), strict=False)):
            return f"the native kernel reads rows at multiples of 16 bytes, not at strides {x.stride()}"
        if seen and x.storage_offset() % 8 != 0:
            return "the native kernel reads rows at multiples of 16 bytes: a tensor starts between two of them"
    if q.is_cuda and registry.shared_memory(q.device) < NATIVE_SHARED_MEMORY:
        return f"the native kernel needs {NATIVE_SHARED_MEMORY} bytes of shared memory a block"
    return None


# ---- the ops ----

CACHE = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens"
OPTIONS = "float scale, int window, float softcap, Tensor? sinks"


def _fake(q, lse_shape, v_cache):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1]), q.new_empty(lse_shape, dtype=wide)


registry.define(
    f"paged_attention({CACHE}, {OPTIONS}, bool invariant=True, bool settled=False, int spare=0)"
    " -> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: _fake(q, (q.shape[0], q.shape[2], q.shape[1]), v),
    ref=ref.paged_attention,
    check=_check_decode,
    capabilities={"native": ((8, 0), registry.ANY[1])},
    supports={"native": _native_refuses, "triton": no_float64},
    triton="paged_attention.paged_attention",
)
registry.define(
    f"paged_prefill({CACHE}, Tensor cu_seqlens_q, int max_seqlen_q, {OPTIONS}) -> (Tensor o, Tensor lse)",
    fake=lambda q, k, v, *_: _fake(q, (q.shape[1], q.shape[0]), v),
    ref=ref.paged_prefill,
    check=_check_prefill,
    supports={"native": no_float64, "triton": no_float64},
    triton="paged_attention.paged_prefill",
)
