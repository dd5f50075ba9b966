"""Cross-entropy of integer targets.  loss = logsumexp(z) - z[target]

z are the logits, or c * tanh(logits / c) with a soft-cap c (arXiv:2408.00118). The backward,
dlogits = (exp(z - logsumexp(z)) - onehot(target)) * dloss, needs one float a row from the forward: no probabilities
are kept. N = rows, V = vocabulary. Bytes that must move, in elements of the logits: forward NV, backward 2NV.
"""

import torch
from torch import Tensor

from cs336.ops.ref import cross_entropy as ref


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, targets_N, ignore_index, softcap):
        loss_N, lse_N = ref.fwd(logits_NV, targets_N, ignore_index, softcap)
        ctx.save_for_backward(logits_NV, targets_N, lse_N)
        ctx.options = ignore_index, softcap
        return loss_N

    @staticmethod
    def backward(ctx, dloss_N):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("cross_entropy is differentiable once; create_graph=True needs torch's F.cross_entropy")
        return ref.bwd(dloss_N, *ctx.saved_tensors, *ctx.options), None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of targets under softmax(logits), with fp32 accumulation.

    Args:
        logits: (..., V) floating point, V >= 1.
        targets: (...) int64 or int32, each in [0, V) or ignore_index.
        ignore_index: rows with this target count for nothing: zero loss, zero gradient, not in the mean.
        softcap: bound of the logits' magnitude, applied first; none if None.
        reduction: "mean" over the rows that count (0 if none does), "sum" or "none".

    Returns float32 (float64 for float64 logits): a scalar, or (...) with reduction "none". Differentiable once.
    Raises ValueError for shapes, dtypes, devices or a reduction that do not fit.
    """
    _check(logits, targets, softcap, reduction)
    targets_N = targets.reshape(-1).long()
    loss_N = _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), targets_N, ignore_index, softcap)
    if reduction == "none":
        return loss_N.view(targets.shape)
    if reduction == "sum":
        return loss_N.sum()
    return loss_N.sum() / (targets_N != ignore_index).sum().clamp(min=1)


def _check(logits: Tensor, targets: Tensor, softcap: float | None, reduction: str) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V >= 1, got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32 class indices, got {targets.dtype}")
    if targets.shape != logits.shape[:-1] or targets.device != logits.device:
        raise ValueError(
            f"targets must be {tuple(logits.shape[:-1])} on {logits.device} to fit logits {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)} on {targets.device}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
