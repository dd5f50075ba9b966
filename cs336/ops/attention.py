"""Attention.  o = softmax(scale * q k^T + mask) v                        Vaswani et al. 2017, arXiv:1706.03762

Grouped queries (arXiv:2305.13245) share a key-value head; a soft-cap c (arXiv:2408.00118) replaces each score s by
c * tanh(s / c) before the mask; ALiBi (arXiv:2108.12409) takes slope * distance off it. FLOPs where E = D: forward
4 B Hq S T D, backward 10 B Hq S T D with the scores recomputed; causal halves both where S = T. Bytes that must move:
q, k, v and o once.

B = batch, Hq = query heads, Hkv = key-value heads, S = queries, T = keys, D = features of a head, E = of its values.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention  # torch's, also where cs336.enable() has replaced it

from cs336.ops import registry
from cs336.ops.attention_autograd import attend, autocast, check_sinks, limits, new_seed, with_sinks
from cs336.ops.attention_raw import check_dtype, check_extras, check_numbers, check_slopes
from cs336.ops.dispatch import has_kernel
from cs336.ops.ref import attention as ref


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention with grouped queries.

    Args:
        q: (..., Hq, S, D) floating point; without heads (S, D). Any strides: one whose last dim is not contiguous is
            copied, so that (B, S, H, D) storage, transposed, costs nothing.
        k: (..., Hkv, T, D) like q; Hq is a multiple of Hkv, and query head h reads key-value head h // (Hq / Hkv).
        v: (..., Hkv, T, E) like k.
        mask: broadcastable to (..., Hq, S, T): boolean, True where a query may attend, or float32 or q's dtype, added
            to the scores. Combined with causal and window.
        causal: a query sees no later key. The last query stands at the last key: S < T continues a cache.
        window: (left, right), how many keys before and after its own a query sees; None where it is open.
        softcap: bound of the scores' magnitude, before the mask; none if None.
        scale: of the scores; 1 / sqrt(D) if None.
        alibi_slopes: (Hq,) or (..., Hq) float32, without gradient: slope * |distance| is taken off the scores.
        dropout_p: share of the probabilities that is dropped, in [0, 1), whether training or not; the draw is made
            from torch's generator, and made again by the backward.
        sinks: (Hq,) floating point, one more score a head, whose value is zero: a share that goes nowhere, as in
            gpt-oss (arXiv:2508.10925). Differentiable.
        return_lse: return the scores' log-sum-exp too: (..., Hq, S) float32 (float64 of float64), -inf where a query
            sees no key, sinks included. Its gradient is taken into account.

    Returns o (..., Hq, S, E) like q, or (o, lse). A query that may attend to nothing gives zeros.
    Raises ValueError for shapes, dtypes or devices that do not fit.

    On a GPU the native kernel, then Triton's. Where neither takes the arguments, on a CPU and with a mask, torch's
    scaled_dot_product_attention, unless "ref" is forced; the reference, in plain torch, for what that does not know
    (softcap, ALiBi, our dropout, sinks, lse, a float32 mask beside 16-bit tensors). Second derivatives and torch.func's
    transforms are plain torch's, with all scores in memory; torch's kernel on a CPU has no second one: "ref" has, and
    torch.nn.attention.sdpa_kernel(SDPBackend.MATH). Autocast casts as it does for torch's.
    """
    q, k, v = autocast(q, k, v)
    left, right = limits(window)
    _check(q, k, v, mask)
    check_numbers(scale, softcap)
    if sinks is not None:
        check_sinks(sinks, q.shape[-3] if q.dim() > 2 else 1, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead = q.shape[:-3]
    mask = None if mask is None else _four_dims(mask, lead)
    q_BHSD, k_BHTD, v_BHTE = (q, k, v) if q.dim() == 4 else (_four_dims(x, lead) for x in (q, k, v))
    extras: tuple = ()
    check_slopes(alibi_slopes)
    if alibi_slopes is not None and alibi_slopes.dim() == 0:
        raise ValueError("alibi_slopes must be (Hq,) or (..., Hq), got a number")
    if alibi_slopes is not None or dropout_p != 0:
        slopes = None if alibi_slopes is None else alibi_slopes.reshape(-1, alibi_slopes.shape[-1]).squeeze(0)
        extras = slopes, dropout_p, new_seed(q.device) if dropout_p else None
        check_extras(q_BHSD, None, *extras)
    options = scale, causal, left, right, softcap or 0.0
    if extras:
        name, args = "attention_general", (q_BHSD, k_BHTD, v_BHTE, None, None, 0, 0, *options, *extras)
    else:
        name, args = "attention", (q_BHSD, k_BHTD, v_BHTE, *options)
    lse_BHS = None
    if mask is not None and registry.forced() in ("native", "triton"):
        raise NotImplementedError(f"attention has no {registry.forced()} kernel for a mask: torch's and ref take one")
    if mask is None and has_kernel(f"{name}_fwd", *args):
        o_BHSE, lse_BHS = attend(name, *args)
    elif (
        softcap is None
        and not extras
        and not return_lse
        and sinks is None
        and registry.forced() is None
        and scale > 0  # torch's CPU kernel scales after it masks: others would give NaN
        and forward_ad._current_level < 0  # which that kernel does not know
        and not (q.is_cuda and torch._C._are_functorch_transforms_active())  # nor the GPU's a mask under vmap
        and (mask is None or mask.dtype in (torch.bool, q.dtype))
    ):
        o_BHSE = _torchs(q_BHSD, k_BHTD, v_BHTE, *options[:4], mask)
    else:
        slopes, p, seed = extras or (None, 0.0, None)
        o_BHSE, lse_BHS = ref.fwd(q_BHSD, k_BHTD, v_BHTE, *options, slopes, p, seed, mask)
    if sinks is not None and lse_BHS is not None:
        o_BHSE, lse_BHS = with_sinks(o_BHSE, lse_BHS, sinks)
    o = o_BHSE if q.dim() == 4 else o_BHSE.reshape(*q.shape[:-1], v.shape[-1])
    return (o, lse_BHS.view(q.shape[:-1])) if return_lse and lse_BHS is not None else o


def _four_dims(x: Tensor, lead: torch.Size) -> Tensor:
    """x (..., a, b, c), whose leading dims broadcast to `lead`, with those in one."""
    if x.dim() <= 3 or len(lead) <= 1:
        return x.view(*[1] * (4 - x.dim()), *x.shape)
    return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)


def _torchs(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    mask: Tensor | None,
) -> Tensor:
    S, T = q_BHSD.shape[2], k_BHTD.shape[2]
    gqa = not q_BHSD.shape[1] == k_BHTD.shape[1]  # noqa: SIM201 (under torch.compile != gives a symbol, not a bool)
    attend = functools.partial(scaled_dot_product_attention, q_BHSD, k_BHTD, v_BHTE, scale=scale, enable_gqa=gqa)
    if causal and mask is None and S == T and left < 0:
        return attend(is_causal=True)
    allowed = ref.visible(S, T, causal, left, right, mask, q_BHSD.device)
    bias = allowed
    if mask is not None and mask.dtype != torch.bool and allowed is not None:
        bias = mask.masked_fill(~allowed, -torch.inf)
    o_BHSE = attend(attn_mask=bias)
    if allowed is None or (mask is None and S <= T):
        return o_BHSE
    return o_BHSE.masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # cuDNN's backend gives such rows the mean of v


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() < 2 or k.dim() != q.dim() or q.shape[-1] == 0:
        raise ValueError(f"q must be (..., Hq, S, D) and k (..., Hkv, T, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    check_dtype(q)
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
