"""Cross-entropy in plain torch, fp32 inside, any device. Per row: no reduction, and no probabilities in the forward."""

import torch
from torch import Tensor


def fwd(logits_NV: Tensor, targets_N: Tensor, ignore_index: int, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses (N,), zero where ignored, and the rows' log-sum-exp (N,), which the backward needs."""
    z_NV = _capped(logits_NV, softcap)
    lse_N = torch.logsumexp(z_NV, -1)
    kept_N = targets_N != ignore_index
    picked_N = z_NV.gather(-1, torch.where(kept_N, targets_N, 0)[:, None])[:, 0]
    return torch.where(kept_N, lse_N - picked_N, 0.0), lse_N


def bwd(
    dloss_N: Tensor, logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    z_NV = _capped(logits_NV, softcap)
    onehot_NV = torch.arange(z_NV.shape[1], device=z_NV.device) == targets_N[:, None]
    dz_NV = (z_NV - lse_N[:, None]).exp_().add_(onehot_NV, alpha=-1)  # in place: eager would hold six of these
    dz_NV.mul_(torch.where(targets_N != ignore_index, dloss_N, 0.0)[:, None])
    if softcap is not None:
        dz_NV.mul_(1 - (z_NV / softcap).square())
    return dz_NV.to(logits_NV.dtype)


def _capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return wide_NV if softcap is None else softcap * torch.tanh(wide_NV / softcap)
