"""Cross-entropy in plain torch, fp32 inside, any device. Per row: no reduction, and no probabilities in the forward."""

import torch
from torch import Tensor


def fwd(logits_NV: Tensor, targets_N: Tensor, ignore_index: int, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses (N,), zero where ignored, and the rows' log-sum-exp (N,), which the backward needs."""
    z_NV = _capped(logits_NV, softcap)
    lse_N = torch.logsumexp(z_NV, -1)
    kept_N = targets_N != ignore_index
    picked_N = z_NV.gather(1, torch.where(kept_N, targets_N, 0)[:, None])[:, 0]
    return torch.where(kept_N, lse_N - picked_N, 0.0), lse_N


def bwd(
    dloss_N: Tensor, logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    z_NV, lse_N1 = _capped(logits_NV, softcap), lse_N[:, None]
    kept_N = targets_N != ignore_index
    index_N1 = torch.where(kept_N, targets_N, 0)[:, None]
    dloss_N1 = torch.where(kept_N, dloss_N, 0.0)[:, None]

    def through_cap(z: Tensor) -> Tensor:
        return dloss_N1 if softcap is None else dloss_N1 * (1 - (z / softcap).square())

    # p everywhere, then p - 1 at the targets: no (N, V) one-hot. In place, to hold fewer of these in eager mode.
    dlogits_NV = (z_NV - lse_N1).exp_().mul_(through_cap(z_NV)).to(logits_NV.dtype)
    picked_N1 = z_NV.gather(1, index_N1)
    at_target_N1 = torch.expm1(picked_N1 - lse_N1) * through_cap(picked_N1)
    return dlogits_NV.scatter_(1, index_N1, at_target_N1.to(logits_NV.dtype))


def _capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return wide_NV if softcap is None else softcap * torch.tanh(wide_NV / softcap)
