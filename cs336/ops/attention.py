"""Attention.  o = softmax(scale * q k^T + mask) v                        Vaswani et al. 2017, arXiv:1706.03762

Grouped queries (arXiv:2305.13245) share a key-value head; a soft-cap c (arXiv:2408.00118) replaces each score s by
c * tanh(s / c) before the mask. FLOPs where E = D: forward 4 B Hq S T D, backward 10 B Hq S T D with the scores
recomputed; causal halves both where S = T. Bytes that must move: q, k, v and o once.

B = batch, Hq = query heads, Hkv = key-value heads, S = queries, T = keys, D = features of a head, E = of its values.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import attention as ref


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped queries.

    Args:
        q: (..., Hq, S, D) floating point; without heads (S, D).
        k: (..., Hkv, T, D) like q; Hq is a multiple of Hkv, and query head h reads key-value head h // (Hq / Hkv).
        v: (..., Hkv, T, E) like k.
        mask: broadcastable to (..., Hq, S, T): boolean, True where a query may attend, or float32 or q's dtype, added
            to the scores. Combined with causal.
        causal: a query sees no later key. The last query stands at the last key: S < T continues a cache.
        scale: of the scores; 1 / sqrt(D) if None.
        softcap: bound of the scores' magnitude, before the mask; none if None.

    Returns o (..., Hq, S, E) like q. A query that may attend to nothing gives zeros.
    Raises ValueError for shapes, dtypes or devices that do not fit.

    Runs torch's scaled_dot_product_attention; the reference with a soft-cap, with a float32 mask beside 16-bit tensors
    (torch's kernels would round it or refuse it), or where "ref" is forced.
    """
    _check(q, k, v, softcap, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead = q.shape[:-3]
    mask = None if mask is None else _four_dims(mask, lead)
    if q.dim() != 4:
        q_BHSD, k_BHTD, v_BHTE = (_four_dims(x, lead) for x in (q, k, v))
        o_BHSE = attention(q_BHSD, k_BHTD, v_BHTE, mask, causal=causal, scale=scale, softcap=softcap)
        return o_BHSE.view(*q.shape[:-1], v.shape[-1])
    wide_mask = mask is not None and mask.dtype not in (torch.bool, q.dtype)
    if softcap is not None or wide_mask or registry.forced() == "ref":
        return ref.fwd(q, k, v, causal, scale, softcap, mask)
    return _torchs(q, k, v, causal, scale, mask)


def _four_dims(x: Tensor, lead: torch.Size) -> Tensor:
    """x (..., a, b, c), whose leading dims broadcast to `lead`, with those in one."""
    if x.dim() <= 3 or len(lead) <= 1:
        return x.view(*[1] * (4 - x.dim()), *x.shape)
    return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)


def _torchs(q_BHSD: Tensor, k_BHTD: Tensor, v_BHTE: Tensor, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
    S, T = q_BHSD.shape[2], k_BHTD.shape[2]
    gqa = not q_BHSD.shape[1] == k_BHTD.shape[1]  # noqa: SIM201 (under torch.compile != gives a symbol, not a bool)
    attend = functools.partial(F.scaled_dot_product_attention, q_BHSD, k_BHTD, v_BHTE, scale=scale, enable_gqa=gqa)
    if causal and mask is None and S == T:
        return attend(is_causal=True)
    allowed = ref.visible(S, T, causal, mask, q_BHSD.device)
    bias = allowed
    if mask is not None and mask.dtype != torch.bool and allowed is not None:
        bias = mask.masked_fill(~allowed, -torch.inf)
    o_BHSE = attend(attn_mask=bias)
    if allowed is None or (mask is None and S <= T):
        return o_BHSE
    return o_BHSE.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # cuDNN's backend gives such rows the mean of v


def _check(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, mask: Tensor | None) -> None:
    if q.dim() < 2 or k.dim() != q.dim() or q.shape[-1] == 0:
        raise ValueError(f"q must be (..., Hq, S, D) and k (..., Hkv, T, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, got {q.dtype}")
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's batch and head dim: q is {tuple(q.shape)}, k {tuple(k.shape)}")
    Hq, Hkv = (q.shape[-3], k.shape[-3]) if q.dim() > 2 else (1, 1)
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(f"query heads must be a multiple of key-value heads, got {Hq} and {Hkv}")
    if v.shape[:-1] != k.shape[:-1] or v.dim() != k.dim():
        raise ValueError(f"v must have k's shape but for its last dim: k is {tuple(k.shape)}, v {tuple(v.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, got {x.dtype} on {x.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if mask is not None:
        _check_mask(mask, q, (*q.shape[:-1], k.shape[-2]))


def _check_mask(mask: Tensor, q: Tensor, scores_shape: tuple[int, ...]) -> None:
    if mask.dtype not in (torch.bool, torch.float32, q.dtype) or mask.device != q.device:
        raise ValueError(
            f"mask must be bool (True where a query may attend), float32 or {q.dtype} (added to the scores) on "
            f"{q.device}, got {mask.dtype} on {mask.device}"
        )
    fits = mask.dim() <= len(scores_shape) and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(scores_shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to (..., Hq, S, T) = {scores_shape}, got {tuple(mask.shape)}")
