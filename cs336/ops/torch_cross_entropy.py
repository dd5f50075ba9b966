"""torch.nn.functional.cross_entropy on ours, for cs336.enable() and backend="cs336"."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cs336.ops.checks import FLOATS
from cs336.ops.cross_entropy import cross_entropy
from cs336.ops.dispatch import has_kernel
from cs336.ops.linear_cross_entropy import linear_cross_entropy


def takes(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> bool:
    """Whether `of_logits` gives what torch's function would: rows of logits, class indices, no class weights."""
    return (
        weight is None
        and size_average is None
        and reduce is None
        and reduction in ("mean", "sum", "none")
        and 0 <= label_smoothing <= 1
        and input.dim() == 2
        and input.shape[1] > 0
        and input.dtype in FLOATS
        and target.shape == input.shape[:1]
        and target.dtype == torch.int64
        and target.device == input.device
    )


def of_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """What `takes` accepts, with torch's arguments; as torch's float32 under autocast, else in the logits' dtype."""
    rest = _without_mean(reduction)
    loss = cross_entropy(
        input, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=rest
    )  # fmt: skip
    dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    return _reduced(loss, target, ignore_index, reduction, dtype)


def of_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """The same of F.linear(x, weight, bias), in `dtype`; target (N,) are as many as x (..., H) has rows."""
    loss = linear_cross_entropy(
        x.reshape(-1, x.shape[-1]), weight, target, bias=bias, ignore_index=ignore_index,
        reduction=_without_mean(reduction), label_smoothing=label_smoothing,
    )  # fmt: skip
    return _reduced(loss, target, ignore_index, reduction, dtype)


def _without_mean(reduction: str) -> str:
    return "sum" if reduction == "mean" else reduction


def _reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """torch's mean over no rows is NaN, ours 0."""
    return (loss / (target != ignore_index).sum() if reduction == "mean" else loss).to(dtype)


def drop_in(original: Callable, input: Tensor, target: Tensor, *args, **kwargs) -> Tensor:
    """Ours where a kernel gives what torch's function would, else `original`, torch's."""
    plain = (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in (input, target))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # no forward mode
        and not torch.jit.is_tracing()
    )
    if plain and takes(input, target, *args, **kwargs) and has_kernel("cross_entropy_fwd", input):
        return of_logits(input, target, *args, **kwargs)
    return original(input, target, *args, **kwargs)
