"""Cross-entropy of integer targets.  loss = lse - z[target], lse = logsumexp(z)

z are the logits, or c * tanh(logits / c) with a soft-cap c (arXiv:2408.00118). Label smoothing e adds
e (z[target] - mean z) (arXiv:1512.00567), z-loss adds z_loss * lse^2 (arXiv:2204.02311). The entropy is
-sum p log p, p = exp(z - lse). The backward needs one float a row from the forward, two with the entropy's gradient: no
probabilities are kept. N = rows, V = vocabulary. Bytes that must move, in elements of the logits: forward NV, backward
2NV; both at once, in place, 2NV.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import has_kernel, rows
from cs336.ops.ref import cross_entropy as ref
from cs336.ops.scale import scale_to


def _contract(logits, targets, softcap, z_loss, label_smoothing, **per_row: Tensor | None) -> None:
    """logits (N, V), targets (N,) int64; what else a row has is (N,) in the dtype that the reference computes in."""
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be (N, V), floating point, with V >= 1, got {like(logits)}")
    check_last_dims(logits=logits)
    N, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    for name, t, expected in (("targets", targets, torch.int64), *((name, t, dtype) for name, t in per_row.items())):
        if t is None:
            continue
        if t.shape != (N,) or t.dtype != expected or t.device != logits.device or not t.is_contiguous():
            raise ValueError(f"{name} must be ({N},) {expected} on {logits.device}, contiguous, got {like(t)}")
    check_options(softcap, z_loss, label_smoothing)


def _check_fwd(logits, targets, ignore_index, softcap, z_loss, label_smoothing, with_entropy) -> None:
    _contract(logits, targets, softcap, z_loss, label_smoothing)


def _check_bwd(
    logits, targets, lse, entropy, dloss, dlse, dentropy, ignore_index, softcap, z_loss, label_smoothing
) -> None:
    needed = None if dentropy is None else entropy
    stats = {"lse": lse, "entropy": needed, "dloss": dloss, "dlse": dlse, "dentropy": dentropy}
    _contract(logits, targets, softcap, z_loss, label_smoothing, **stats)


def _check_gradient(logits, targets, scale, ignore_index, softcap, z_loss, label_smoothing) -> None:
    _contract(logits, targets, softcap, z_loss, label_smoothing)
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(f"rows of logits must not overlap, got stride {logits.stride()}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if scale.numel() != 1 or scale.dtype != dtype or scale.device != logits.device:
        raise ValueError(f"scale must be one {dtype} on {logits.device}, got {like(scale)}")


def _new_stat(logits: Tensor, count: int | None = None) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[0] if count is None else count, dtype=dtype)


KERNELS = {"native": no_float64, "triton": no_float64}
OPTIONS = "int ignore_index, float? softcap, float z_loss, float label_smoothing"

registry.define(
    f"cross_entropy_fwd(Tensor logits, Tensor targets, {OPTIONS}, bool with_entropy) "
    "-> (Tensor loss, Tensor lse, Tensor entropy)",
    fake=lambda logits, *args: (*(_new_stat(logits) for _ in range(2)), _new_stat(logits, None if args[-1] else 0)),
    ref=ref.fwd,
    triton="cross_entropy.fwd",
    check=_check_fwd,
    supports=KERNELS,
)
registry.define(
    "cross_entropy_bwd(Tensor logits, Tensor targets, Tensor lse, Tensor entropy, Tensor dloss, Tensor? dlse, "
    f"Tensor? dentropy, {OPTIONS}) -> Tensor dlogits",
    fake=lambda logits, *_: logits.new_empty(logits.shape),
    ref=ref.bwd,
    triton="cross_entropy.bwd",
    check=_check_bwd,
    supports=KERNELS,
)
registry.define(
    f"cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor scale, {OPTIONS}) -> (Tensor loss, Tensor lse)",
    fake=lambda logits, *_: (_new_stat(logits), _new_stat(logits)),
    ref=ref.gradient_,
    triton="cross_entropy.gradient_",
    check=_check_gradient,
    supports=KERNELS,
)


def run_fwd(logits_NV: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """cross_entropy_fwd by a kernel, or in plain torch, which inductor fuses."""
    if has_kernel("cross_entropy_fwd", logits_NV, *args):
        return registry.call("cross_entropy_fwd", logits_NV, *args)
    return ref.fwd(logits_NV, *args)


def run_bwd(logits_NV: Tensor, *args) -> Tensor:
    if has_kernel("cross_entropy_bwd", logits_NV, *args):
        return registry.call("cross_entropy_bwd", logits_NV, *args)
    return ref.bwd(logits_NV, *args)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, targets_N, options, with_entropy):
        loss_N, lse_N, entropy_N = run_fwd(logits_NV, targets_N, *options, with_entropy)
        ctx.save_for_backward(logits_NV, targets_N, lse_N, entropy_N)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return loss_N, lse_N, entropy_N

    @staticmethod
    def backward(ctx, dloss_N, dlse_N, dentropy_N):
        logits_NV, targets_N, lse_N, entropy_N = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            ignore_index, softcap, z_loss, label_smoothing = ctx.options
            outs = ref.fwd(logits_NV, targets_N, ignore_index, softcap, z_loss, label_smoothing, True)
            return _differentiable_gradient(outs, logits_NV, (dloss_N, dlse_N, dentropy_N)), None, None, None
        if dentropy_N is not None and dentropy_N.numel() != lse_N.numel():
            dentropy_N = None  # of the empty one that nobody asked for
        dloss_N = torch.zeros_like(lse_N) if dloss_N is None else dloss_N
        gradients = [None if g is None else g.contiguous() for g in (dloss_N, dlse_N, dentropy_N)]
        return run_bwd(logits_NV, targets_N, lse_N, entropy_N, *gradients, *ctx.options), None, None, None


class _InPlace(torch.autograd.Function):
    """The sum of scale * loss; the forward puts the gradient in the logits' place, the backward scales it there."""

    @staticmethod
    def forward(ctx, logits_NV, targets_N, scale, options):
        gradient_NV = logits_NV.detach()
        loss_N, _ = registry.call("cross_entropy_gradient_", gradient_NV, targets_N, scale, *options)
        ctx.save_for_backward(gradient_NV)
        ctx.spent = False
        return loss_N.sum() * scale

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy in place is differentiable once; create_graph=True needs in_place=False")
        if ctx.spent:
            raise RuntimeError(
                "the first backward has scaled the logits' gradient in their place: call cross_entropy again, or "
                "without in_place, for a second one"
            )
        ctx.spent = True
        (gradient_NV,) = ctx.saved_tensors
        return scale_to(gradient_NV, dloss, gradient_NV.dtype, in_place=True), None, None, None


def _differentiable_gradient(outs: tuple[Tensor, ...], logits_NV: Tensor, douts: tuple) -> Tensor:
    """With create_graph: in plain torch, differentiable again."""
    given = [(out, d) for out, d in zip(outs, douts, strict=True) if d is not None and d.shape == out.shape]
    return torch.autograd.grad([o for o, _ in given], logits_NV, [d for _, d in given], create_graph=True)[0]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    return_entropy: bool = False,
    in_place: bool = False,
) -> Any:
    """Negative log-likelihood of targets under softmax(logits), with fp32 accumulation.

    With reduction "none" and no extra terms it is minus the log-probability of each target.

    Args:
        logits: (..., V) floating point, V >= 1.
        targets: (...) int64 or int32, each in [0, V) or ignore_index.
        ignore_index: rows with this target count for nothing: all they return is 0, their gradient is 0, they are not
            in the mean.
        softcap: bound of the logits' magnitude, applied first; none if None.
        z_loss: weight of the squared log-sum-exp, which is added to the loss.
        label_smoothing: the share, in [0, 1], of the target's probability that is spread over the whole vocabulary.
        reduction: "mean" over the rows that count (0 if none does), "sum" or "none".
        return_lse: return the log-sum-exp of each row too, (...).
        return_entropy: return the entropy of each row too, (...) in nats.
        in_place: of a sum or mean alone, the gradient takes the place of logits that were computed and are contiguous,
            which nothing may read then, where a kernel makes both at once: half the memory, and the logits are read
            once. They are differentiable once.

    Returns float32 (float64 for float64 logits): a scalar, or (...) with reduction "none"; a tuple (loss, lse,
    entropy) with those that were asked for. All are differentiable.
    Raises ValueError for shapes, dtypes, devices, numbers or a reduction that do not fit, and IndexError on a CPU for a
    target outside the vocabulary; on a GPU that makes its row NaN.
    """
    _check(logits, targets)
    check_options(softcap, z_loss, label_smoothing)
    check_reduction(reduction)
    targets_N = targets.reshape(-1).long()
    check_targets(targets_N, logits.shape[-1], ignore_index)
    logits_NV = rows(logits.reshape(-1, logits.shape[-1]))
    options = ignore_index, softcap, float(z_loss), float(label_smoothing)
    alone = reduction != "none" and not (return_lse or return_entropy)
    if in_place and alone and torch.is_grad_enabled() and logits.requires_grad:
        scale = torch.ones((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        if reduction == "mean":
            scale = scale / (targets_N != ignore_index).sum().clamp(min=1)
        if _becomes_its_gradient(logits_NV, targets_N, scale, options):
            return _InPlace.apply(logits_NV, targets_N, scale, options)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        loss_N, lse_N, entropy_N = ref.fwd(logits_NV, targets_N, *options, return_entropy)
    else:
        loss_N, lse_N, entropy_N = _CrossEntropy.apply(logits_NV, targets_N, options, return_entropy)
    loss = reduced(loss_N, targets, ignore_index, reduction)
    if not (return_lse or return_entropy):
        return loss
    extra = ((return_lse, lse_N), (return_entropy, entropy_N))
    return loss, *(t.view(targets.shape) for wanted, t in extra if wanted)


def _becomes_its_gradient(logits_NV: Tensor, targets_N: Tensor, scale: Tensor, options: tuple) -> bool:
    """Not where torch.compile looks; nor rows that something lies between; nor of float16, which is to be scaled before
    it is rounded; nor of a leaf, or a view of one, whose values are somebody's."""
    whole = logits_NV if logits_NV._base is None else logits_NV._base
    if torch.compiler.is_compiling() or whole.is_leaf or logits_NV.dtype == torch.float16:
        return False
    if not logits_NV.is_contiguous():
        return False
    return has_kernel("cross_entropy_gradient_", logits_NV, targets_N, scale, *options)


def reduced(loss_N: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_N.view(targets.shape)
    if reduction == "sum":
        return loss_N.sum()
    return loss_N.sum() / (targets != ignore_index).sum().clamp(min=1)


def check_targets(targets_N: Tensor, V: int, ignore_index: int) -> None:
    """On a CPU: elsewhere the host does not wait, and the kernels answer with NaN. What is traced has no values."""
    traced = torch.compiler.is_compiling() or type(targets_N) is not Tensor
    if targets_N.device.type != "cpu" or traced or torch._C._are_functorch_transforms_active():
        return
    outside = ((targets_N < 0) | (targets_N >= V)) & (targets_N != ignore_index)
    if outside.any():
        bad = targets_N[outside][0].item()
        raise IndexError(f"targets must be 0 to {V - 1}, or ignore_index {ignore_index}, got {bad}")


def check_options(softcap: float | None, z_loss: float, label_smoothing: float) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and not negative, got {z_loss}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check(logits: Tensor, targets: Tensor) -> None:
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
