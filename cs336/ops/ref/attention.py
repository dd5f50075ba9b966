"""Attention in plain torch, fp32 inside, any device: the whole (B, Hq, S, T) score matrix."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def fwd(
    q_BHSD: Tensor,
    k_BHTD: Tensor,
    v_BHTE: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
    mask: Tensor | None,
) -> Tensor:
    Hq, S = q_BHSD.shape[1:3]
    Hkv, T = k_BHTD.shape[1:3]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BHSD, k_BHTD, v_BHTE))
    # Query head h reads key head h // G. Batched matmuls, so that FLOP counters see them.
    k, v = (x.repeat_interleave(Hq // Hkv, dim=1) if Hq != Hkv else x for x in (k, v))
    with _full_precision(q.device):
        scores_BHST = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores_BHST = softcap * torch.tanh(scores_BHST / softcap)
        if mask is not None and mask.dtype != torch.bool:
            scores_BHST = scores_BHST + mask
        allowed = visible(S, T, causal, mask, q.device)
        if allowed is None:
            return (torch.softmax(scores_BHST, -1) @ v).to(q_BHSD.dtype)
        scores_BHST = scores_BHST.masked_fill(~allowed, torch.finfo(q.dtype).min)
        p_BHST = torch.softmax(scores_BHST, -1).masked_fill(~allowed, 0.0)  # a row that sees nothing is zero, not NaN
        return (p_BHST @ v).to(q_BHSD.dtype)


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast would cast the operands of a matmul back to 16 bits."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def visible(S: int, T: int, causal: bool, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may attend to, broadcastable to (B, Hq, S, T), or None for all of them.

    mask: boolean, or added to the scores: -inf hides a key.
    """
    allowed = mask if mask is None or mask.dtype == torch.bool else mask > -torch.inf
    if causal and S > 1:
        triangle_ST = torch.ones(S, T, dtype=torch.bool, device=device).tril(T - S)
        return triangle_ST if allowed is None else triangle_ST & allowed
    return allowed
