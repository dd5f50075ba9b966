"""What a step of a paged decoder does to its queries, keys and values before it attends, in one launch.

    q, k = rope(norm(q) * w_q), rope(norm(k) * w_k)      then k and v are written through the page table

Norms are optional; ops/qk_norm_rope.py and ops/paged_cache.py have the parts. Bytes that must move: q, k and v read and
written once. What is normalised is not rounded before it turns. T = tokens, H, Hkv = heads, D = features of a head, E =
of a value, L = positions, P = pairs that turn.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.dispatch import rows, run
from cs336.ops.paged_cache import _check_append
from cs336.ops.ref import qk_norm_rope_append as ref
from cs336.ops.rope import check_heads, check_tables, kernels_refuse


def qk_norm_rope_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    page_table: Tensor,
    sequences: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    interleaved: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate, and write key and value of token t at position positions[t] of sequence sequences[t].

    Args:
        k_cache, v_cache, page_table, sequences, positions: as in `append_kv_`.
        q: (T, H, D) like k: (T, Hkv, D), like k_cache; v: (T, Hkv, E) like v_cache.
        cos, sin: (L, P) float32, 2 P <= D; those of a token are at its position.
        q_weight, k_weight: (D,) float32 or in q's dtype, of the norms; None for both: no norm.
        interleaved, eps: as in `qk_norm_rope`.

    Returns q and k as they attend. Those of a token with a negative position, which is not written, are undefined. No
    gradient. Raises ValueError for arguments that do not fit, as `append_kv_` does.
    """
    args: tuple[Any, ...] = k_cache, v_cache, *(x if x.dim() == 0 else rows(x) for x in (q, k, v)), cos, sin
    args += page_table, sequences, positions, q_weight, k_weight, interleaved, eps
    _check(*args)
    q, k = run("qk_norm_rope_append_", *args)
    return q, k


def _check(
    k_cache, v_cache, q, k, v, cos, sin, page_table, sequences, positions, q_weight, k_weight, interleaved, eps
) -> None:
    _check_append(k_cache, v_cache, k, v, page_table, sequences, positions)
    if q.dim() != 3 or k.dim() != 3:
        raise ValueError(f"q must be (T, H, D), got shape {tuple(q.shape)}")
    q_1HTD, k_1HTD = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    check_heads("q", q_1HTD, k_1HTD)
    check_tables(k_1HTD, cos, sin, positions[None])
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be both given or both None")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is None:
            continue
        if w.shape != q.shape[-1:] or w.device != q.device or w.dtype not in (q.dtype, torch.float32):
            raise ValueError(f"{name} must be ({q.shape[-1]},) float32 or {q.dtype}, got {tuple(w.shape)} {w.dtype}")
        if not w.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {w.stride()}")


registry.define(
    "qk_norm_rope_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k, Tensor v, Tensor cos, "
    "Tensor sin, Tensor page_table, Tensor sequences, Tensor positions, Tensor? q_weight, Tensor? k_weight, "
    "bool interleaved, float eps) -> (Tensor q_out, Tensor k_out)",
    fake=lambda k_cache, v_cache, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    ref=ref.qk_norm_rope_append_,
    triton="qk_norm_rope_append.qk_norm_rope_append_",
    check=_check,
    supports={"triton": lambda k_cache, v_cache, q, *_: kernels_refuse(q)},
)
