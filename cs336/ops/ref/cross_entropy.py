"""Cross-entropy in plain torch, fp32 inside, any device. Per row: no reduction, and no probabilities in the forward.

Rows whose target is ignore_index are not looked at: all they return is 0. A target outside the vocabulary makes its row
NaN. N = rows, V = vocabulary.
"""

import torch
from torch import Tensor

from cs336.ops.ref.wide import wide


def fwd(
    logits_NV: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps and entropies (nothing if not asked for), each (N,)."""
    z_NV, kept_N = _capped(logits_NV, softcap), targets_N != ignore_index
    inside_N = _inside(targets_N, logits_NV)
    lse_N = torch.logsumexp(z_NV, -1)
    picked_N = z_NV.gather(1, torch.where(inside_N, targets_N, 0)[:, None])[:, 0]
    picked_N = torch.where(inside_N, picked_N, torch.nan)
    loss_N = lse_N - picked_N
    if label_smoothing:
        loss_N = loss_N + label_smoothing * (picked_N - z_NV.mean(-1))
    if z_loss:
        loss_N = loss_N + z_loss * lse_N.square()
    entropy_N = lse_N.new_empty(0)
    if with_entropy:
        log_p_NV = z_NV - lse_N[:, None]
        entropy_N = torch.where(kept_N, -(log_p_NV.exp() * log_p_NV.clamp(min=-1e30)).sum(-1), 0.0)  # 0 * -inf is 0
    return torch.where(kept_N, loss_N, 0.0), torch.where(kept_N, lse_N, 0.0), entropy_N


def bwd(
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor,
    dloss_N: Tensor,
    dlse_N: Tensor | None,
    dentropy_N: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> Tensor:
    """dz = p (dloss (1 + 2 z_loss lse) + dlse - dentropy (log p + entropy)) - dloss (target's share)."""
    kept_N1 = (targets_N != ignore_index)[:, None]
    inside_N1 = _inside(targets_N, logits_NV)[:, None]
    index_N1, lse_N1 = torch.where(inside_N1, targets_N[:, None], 0), lse_N[:, None]
    dloss_N1 = dloss_N[:, None]
    of_p_N1 = torch.where(inside_N1, dloss_N1 * (1 + 2 * z_loss * lse_N1), torch.nan)
    if dlse_N is not None:
        of_p_N1 = of_p_N1 + dlse_N[:, None]

    def gradient(logits: Tensor, at_target: bool) -> Tensor:
        z = _capped(logits, softcap)
        log_p = z - lse_N1
        of_p = of_p_N1
        if dentropy_N is not None:
            of_p = of_p - dentropy_N[:, None] * (log_p.clamp(min=-1e30) + entropy_N[:, None])
        if at_target:  # p - 1 without cancellation where p is nearly 1
            share_N1 = dloss_N1 * (1 - label_smoothing)
            dz = log_p.exp() * (of_p - share_N1) + share_N1 * torch.expm1(log_p)
        else:
            dz = log_p.exp_().mul_(of_p)  # in place, as below: of all this size there is one tensor
        if label_smoothing:
            dz -= dloss_N1 * (label_smoothing / logits_NV.shape[1])
        if softcap is not None:
            t = z / softcap
            dz *= (1 - t) * (1 + t)  # exact where t nears 1; 1 - t^2 would round the square
        return dz.masked_fill_(~kept_N1, 0.0).to(logits.dtype)

    # p everywhere, then p - 1 at the targets: no (N, V) one-hot.
    return gradient(logits_NV, False).scatter_(1, index_N1, gradient(logits_NV.gather(1, index_N1), True))


def gradient_(
    logits_NV: Tensor,
    targets_N: Tensor,
    scale: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps; logits become scale * d(sum of losses) / d logits."""
    options = ignore_index, softcap, z_loss, label_smoothing
    loss_N, lse_N, nothing = fwd(logits_NV, targets_N, *options, False)
    logits_NV.copy_(bwd(logits_NV, targets_N, lse_N, nothing, scale.expand_as(lse_N), None, None, *options))
    return loss_N, lse_N


def _inside(targets_N: Tensor, logits_NV: Tensor) -> Tensor:
    return (targets_N >= 0) & (targets_N < logits_NV.shape[1])


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return wide(logits) if softcap is None else softcap * torch.tanh(wide(logits) / softcap)
