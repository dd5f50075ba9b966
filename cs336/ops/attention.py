"""Attention.  o = softmax(scale * q k^T + mask) v                        Vaswani et al. 2017, arXiv:1706.03762

Grouped queries (arXiv:2305.13245) share a key-value head; a soft-cap c (arXiv:2408.00118) replaces each score s by
c * tanh(s / c) before the mask. FLOPs: forward 4 B Hq S T D, backward 10 B Hq S T D with the scores recomputed; causal
halves both where S = T. Bytes that must move: q, k, v and o once.

B = batch, Hq = query heads, Hkv = key-value heads, S = queries, T = keys, D = features of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import attention as ref


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped queries.

    Args:
        q: (B, Hq, S, D) floating point.
        k, v: (B, Hkv, T, D) like q; Hq is a multiple of Hkv, and query head h reads key-value head h // (Hq / Hkv).
        causal: a query sees no later key. The last query stands at the last key: S < T continues a cache.
        scale: of the scores; 1 / sqrt(D) if None.
        softcap: bound of the scores' magnitude; none if None.
        mask: boolean, broadcastable to (B, Hq, S, T), True where a query may attend; combined with causal.

    Returns o (B, Hq, S, D) like q. A query that may attend to nothing gives zeros.
    Raises ValueError for shapes, dtypes or devices that do not fit.

    Runs torch's scaled_dot_product_attention, and the reference with a soft-cap or where "ref" is forced.
    """
    _check(q, k, v, softcap, mask)
    mask = None if mask is None else torch.atleast_2d(mask)  # torch's kernels take no fewer dims
    S, T = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if softcap is not None or registry.forced() == "ref":
        return ref.fwd(q, k, v, causal, scale, softcap, mask)
    triangle = causal and mask is None and S == T
    allowed = None if triangle else ref.visible(S, T, causal, mask, q.device)
    gqa = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=triangle, scale=scale, enable_gqa=gqa)
    if allowed is None or (mask is None and S <= T):
        return o
    return o.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # cuDNN's backend gives such rows the mean of v


def _check(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, mask: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[3] == 0 or k.shape[1] == 0:
        raise ValueError(f"q must be (B, Hq, S, D) and k (B, Hkv, T, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's batch and head dim: q is {tuple(q.shape)}, k {tuple(k.shape)}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"query heads must be a multiple of key-value heads, got {q.shape[1]} and {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]), q.device)


def _check_mask(mask: Tensor, scores_shape: tuple[int, ...], device: torch.device) -> None:
    if mask.dtype != torch.bool or mask.device != device:
        raise ValueError(
            f"mask must be bool on {device}, True where a query may attend; got {mask.dtype} {mask.device}"
        )
    fits = mask.dim() <= 4 and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(scores_shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to (B, Hq, S, T) = {scores_shape}, got {tuple(mask.shape)}")
