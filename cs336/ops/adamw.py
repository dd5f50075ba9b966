"""AdamW.  Loshchilov & Hutter, arXiv:1711.05101, with the bias correction of torch.optim.AdamW

    m += (1 - beta1) (g - m)        v += (1 - beta2) (g^2 - v)        g = grad * grad_scale
    p -= lr weight_decay p + lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

Bytes that must move: 28 a parameter when all is fp32 (read p, g, m, v; write p, m, v), 22 with bf16 p and g, 26 with
remainders beside these. About 15 FLOPs a parameter: memory-bound on every device. The native kernels take the whole
list in one launch (CUDA: one for each pair of dtypes, and for each 544 tensors).
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import FLOATS
from cs336.ops.ref import adamw as ref


def _check(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay) -> None:
    lengths = [len(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, exp_avgs, exp_avg_sqs and steps must have one length, got {lengths}")
    _check_numbers(beta1, beta2, eps=eps, weight_decay=weight_decay)
    if not params:
        return
    device = params[0].device
    in_double = params[0].dtype == torch.float64
    floats, moments = ((torch.float64,),) * 2 if in_double else (FLOATS, (torch.float32,))
    for i, (p, g, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        _check_tensor(f"params[{i}]", p, floats, device)
        if not p.is_contiguous() and not _is_dense(p):
            raise ValueError(f"params[{i}] must be dense and not overlap itself, got stride {p.stride()}")
        for name, t, dtypes in (("grads", g, floats), ("exp_avgs", m, moments), ("exp_avg_sqs", v, moments)):
            _check_tensor(f"{name}[{i}]", t, dtypes, device)
            if t.shape != p.shape or not _same_order(t, p):
                raise ValueError(
                    f"{name}[{i}] must have the shape and strides of params[{i}], {tuple(p.shape)} {p.stride()}, "
                    f"got {tuple(t.shape)} {t.stride()}"
                )
        _check_element(f"steps[{i}]", step, device)
    _check_element("lr", lr, device, in_double)
    if grad_scale is not None:
        _check_element("grad_scale", grad_scale, device, in_double)


def _check_remainders(params, remainders, *rest) -> None:
    _check(params, *rest)
    if len(remainders) != len(params):
        raise ValueError(f"params and remainders must have one length, got {len(params)} and {len(remainders)}")
    for i, (p, remainder) in enumerate(zip(params, remainders, strict=True)):
        _check_tensor(f"params[{i}]", p, [torch.bfloat16], params[0].device)
        _check_tensor(f"remainders[{i}]", remainder, [torch.int16], p.device)
        if remainder.shape != p.shape or not _same_order(remainder, p):
            raise ValueError(
                f"remainders[{i}] must have the shape and strides of params[{i}], {tuple(p.shape)} {p.stride()}, "
                f"got {tuple(remainder.shape)} {remainder.stride()}"
            )


def _check_numbers(beta1: float, beta2: float, **not_negative: float) -> None:
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")


def _check_tensor(name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    if t.dtype not in dtypes or t.device != device or t.layout != torch.strided:
        expected = " or ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name} must be dense {expected} on {device}, got {t.layout} {t.dtype} on {t.device}")


def _check_element(name: str, t: Tensor, device: torch.device, in_double: bool = False) -> None:
    dtypes = [torch.float32, torch.float64] if in_double else [torch.float32]
    names = " or ".join(map(str, dtypes))
    if t.dtype not in dtypes or t.device != device or t.numel() != 1:
        raise ValueError(
            f"{name} must be one {names} element on {device}, got {tuple(t.shape)} {t.dtype} on {t.device}"
        )


def _same_order(t: Tensor, p: Tensor) -> bool:
    """Whether element i of t's memory belongs to element i of p's; a dim of size 1 may have any stride."""
    if t.is_contiguous() and p.is_contiguous():
        return True
    return all(a == b for a, b, size in zip(t.stride(), p.stride(), p.shape, strict=True) if size != 1)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one span of memory, whatever the order of dims."""
    filled = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _no_float64(params, *_) -> str | None:
    in_double = len(params) > 0 and params[0].dtype == torch.float64
    return "adamw_ takes float64 in the reference alone" if in_double else None


registry.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps, "
    "Tensor lr, Tensor? grad_scale, float beta1, float beta2, float eps, float weight_decay) -> ()",
    fake=lambda *args: None,
    ref=ref.step_,
    triton="adamw.step_",
    check=_check,
    supports={"native": _no_float64, "triton": _no_float64},
)
registry.define(
    "adamw_remainder_(Tensor(a!)[] params, Tensor(b!)[] remainders, Tensor[] grads, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor[] steps, Tensor lr, Tensor? grad_scale, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    fake=lambda *args: None,
    ref=ref.remainder_step_,
    check=_check_remainders,
)


@torch.no_grad()
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor | list[Tensor],
    grad_scale: Tensor | None = None,
    remainders: list[Tensor] | None = None,
) -> None:
    """One step of AdamW, in place, on every tensor of the lists.

    Numbers that change from step to step can be tensors of one float32 element on the device of params. They are read
    there: a captured CUDA graph and a compiled function take their new values, and the host does not wait.

    Args:
        params: float32, float16 or bfloat16, dense (any order of dims), all on one device; none may share memory.
        grads: like params; float32, float16 or bfloat16, whatever the parameter's dtype.
        exp_avgs, exp_avg_sqs: float32, like params: the moments, zeros before the first step.
        lr: not negative; a number, or a tensor, whose value is not checked.
        weight_decay, eps: not negative; the decay of one step is lr * weight_decay.
        beta1, beta2: in [0, 1).
        step: the number of this step, from 1: for all, or a list with a tensor for each parameter. The value of a
            tensor is not checked.
        grad_scale: a tensor that multiplies the gradients (clipping, loss unscaling); they are not changed in memory.
        remainders: int16, like params, all bfloat16: the other halves of float32 weights, of which the step is. See
            cs336.optim.rounding.

    If params[0] is float64, all tensors of the four lists must be, lr and grad_scale may be, and plain torch does the
    step.
    Raises ValueError, before anything is changed, for lists, tensors or numbers that do not fit.
    """
    if not isinstance(lr, Tensor):
        _check_numbers(beta1, beta2, lr=lr)
        lr = _element(lr, params, torch.float64 if params and params[0].dtype == torch.float64 else torch.float32)
    if not isinstance(step, (Tensor, list)):
        if step < 1:
            raise ValueError(f"step counts from 1, got {step}")
        step = _element(step, params)
    steps = [step] * len(params) if isinstance(step, Tensor) else step
    name, check = "adamw_", cast(Callable[..., None], _check)
    args: tuple = (params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay)
    if remainders is not None:
        name, check, args = "adamw_remainder_", _check_remainders, (params, remainders, *args[1:])
    if not params:
        check(*args)
        return
    try:
        registry.call(name, *args)
    except RuntimeError:  # native ops check for themselves in a third of the time; this check tells more
        check(*args)
        raise


def _element(value: float, params: list[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((), value, dtype=dtype, device=params[0].device if params else None)
