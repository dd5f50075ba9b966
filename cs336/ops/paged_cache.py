"""Writing to a paged cache: new tokens, and whole pages. ops/paged_attention.py says what a page table is.

Bytes that must move: what is written, twice (read and written).
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims
from cs336.ops.dispatch import rows
from cs336.ops.paged_attention import check_caches, check_table, readable
from cs336.ops.ref import paged_cache as ref


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    sequences: Tensor,
    positions: Tensor,
) -> None:
    """Write token t's key and value at position positions[t] of sequence sequences[t], through the page table.

    Args:
        k_cache: (P, page, Hkv, D), written to; v_cache: (P, page, Hkv, E), written to.
        k: (T, Hkv, D), v: (T, Hkv, E), like the caches.
        page_table: (B, M) int32.
        sequences: (T,) int32, rows of page_table.
        positions: (T,) int32; a negative one skips its token. No two tokens may have one place.

    Raises ValueError for arguments that do not fit. What the int32 tensors hold is checked on a CPU; on a GPU a token
    whose place is outside the table or the cache is skipped.
    """
    args = k_cache, v_cache, rows(k), rows(v), page_table, sequences, positions
    _check_append(*args)
    registry.call("append_kv_", *args)


def copy_pages_(cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    """cache[targets[n]] = cache[sources[n]] for every n, for copy-on-write.

    Args:
        cache: (P, page, Hkv, D), written to.
        sources, targets: (N,) int32 pages; a pair with a negative one is skipped. Targets are distinct, and none of
            them is a source.

    Raises ValueError for arguments that do not fit. What sources and targets hold is checked on a CPU; on a GPU a pair
    outside the cache is skipped.
    """
    _check_copy(cache, sources, targets)
    registry.call("copy_pages_", cache, sources, targets)


def _check_append(k_cache, v_cache, k, v, page_table, sequences, positions) -> None:
    check_caches(k_cache, v_cache)
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.dim() != 3 or x.shape[1:] != cache.shape[2:] or x.dtype != cache.dtype or x.device != cache.device:
            raise ValueError(
                f"{name} must be (T, {cache.shape[2]}, {cache.shape[3]}) {cache.dtype} on {cache.device} like its "
                f"cache, got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
        check_last_dims(**{name: x})
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have the {k.shape[0]} tokens of k, got {v.shape[0]}")
    check_table(page_table, k_cache)
    _check_indices("sequences", sequences, k.shape[0], k_cache.device)
    _check_indices("positions", positions, k.shape[0], k_cache.device)
    if not readable(page_table, sequences, positions):
        return
    live = positions >= 0
    sequence, position = sequences[live].long(), positions[live].long()
    (P, page), (B, M) = k_cache.shape[:2], page_table.shape
    if ((sequence < 0) | (sequence >= B)).any():
        raise ValueError(f"sequences must be rows of page_table, from 0 to {B - 1}, got {sequence.tolist()}")
    if (position >= M * page).any():
        raise ValueError(f"positions must be below {M} pages of {page} tokens, got {position.tolist()}")
    pages = page_table[sequence, position // page]
    if ((pages < 0) | (pages >= P)).any():
        raise ValueError(f"page_table must hold pages from 0 to {P - 1} where tokens are written, got {pages.tolist()}")


def _check_copy(cache, sources, targets) -> None:
    if cache.dim() < 1:
        raise ValueError("cache must be (P, page, Hkv, D), got no dims")
    _check_indices("sources", sources, None, cache.device)
    _check_indices("targets", targets, sources.shape[0], cache.device)
    if not readable(sources, targets):
        return
    for name, x in (("sources", sources), ("targets", targets)):
        if (x >= cache.shape[0]).any():
            raise ValueError(f"{name} must be below {cache.shape[0]} pages, got {x.tolist()}")


def _check_indices(name: str, x: Tensor, length: int | None, device: torch.device) -> None:
    if x.dim() != 1 or x.dtype != torch.int32 or x.device != device or length not in (None, x.shape[0]):
        shape = "(N,)" if length is None else (length,)
        raise ValueError(
            f"{name} must be {shape} torch.int32 on {device}, got {tuple(x.shape)} {x.dtype} on {x.device}"
        )
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {x.stride()}")


registry.define(
    "append_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor page_table, Tensor sequences, "
    "Tensor positions) -> ()",
    fake=lambda *_: None,
    ref=ref.append_kv_,
    check=_check_append,
)
registry.define(
    "copy_pages_(Tensor(a!) cache, Tensor sources, Tensor targets) -> ()",
    fake=lambda *_: None,
    ref=ref.copy_pages_,
    check=_check_copy,
)
