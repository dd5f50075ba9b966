"""AdamW.  Loshchilov & Hutter, arXiv:1711.05101, with the bias correction of torch.optim.AdamW

    m += (1 - beta1) (g - m)        v += (1 - beta2) (g^2 - v)        g = grad * grad_scale
    p -= lr weight_decay p + lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

Bytes that must move: 28 a parameter when all is fp32 (read p, g, m, v; write p, m, v), 22 with bf16 p and g. About 15
FLOPs a parameter: memory-bound on every device. The native kernels take the whole list in one launch (CUDA: one for
each pair of dtypes, and for each 736 tensors).
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import adamw as ref

FP32 = frozenset({torch.float32})
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _check(params, grads, exp_avgs, exp_avg_sqs, grad_scale, lr, beta1, beta2, eps, weight_decay, step) -> None:
    lengths = [len(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
    if len(set(lengths)) > 1:
        raise ValueError(f"params, grads, exp_avgs and exp_avg_sqs must have one length, got {lengths}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in [0, 1), got {beta1} and {beta2}")
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check_tensor(f"params[{i}]", p, FLOATS, params[0].device)
        if not p.is_contiguous() and not _is_dense(p):
            raise ValueError(f"params[{i}] must be dense and not overlap itself, got stride {p.stride()}")
        for name, t, dtypes in (("grads", g, FLOATS), ("exp_avgs", m, FP32), ("exp_avg_sqs", v, FP32)):
            _check_tensor(f"{name}[{i}]", t, dtypes, p.device)
            if t.shape != p.shape or not _same_order(t, p):
                raise ValueError(
                    f"{name}[{i}] must have the shape and strides of params[{i}], {tuple(p.shape)} {p.stride()}, "
                    f"got {tuple(t.shape)} {t.stride()}"
                )
    if grad_scale is not None and params:
        _check_tensor("grad_scale", grad_scale, FP32, params[0].device)
        if grad_scale.numel() != 1:
            raise ValueError(f"grad_scale must be one element, got shape {tuple(grad_scale.shape)}")


def _check_tensor(name: str, t: Tensor, dtypes: frozenset[torch.dtype], device: torch.device) -> None:
    if t.dtype not in dtypes or t.device != device or t.layout != torch.strided:
        expected = " or ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"{name} must be dense {expected} on {device}, got {t.layout} {t.dtype} on {t.device}")


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


registry.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor? grad_scale, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    fake=lambda *args: None,
    ref=ref.step_,
    triton="adamw.step_",
    check=_check,
)


@torch.no_grad()
def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of AdamW, in place, on every tensor of the lists.

    Args:
        params: float32, float16 or bfloat16, dense (any order of dims), all on one device; none may share memory.
        grads: like params; float32, float16 or bfloat16, whatever the parameter's dtype.
        exp_avgs, exp_avg_sqs: float32, like params: the moments, zeros before the first step.
        lr, weight_decay, eps: not negative; the decay of one step is lr * weight_decay.
        beta1, beta2: in [0, 1).
        step: the number of this step, from 1.
        grad_scale: one float32 element on the device of params that multiplies the gradients (clipping, loss
            unscaling): they are not changed in memory, and the host does not wait for it.

    Raises ValueError, before anything is changed, for lists, tensors or numbers that do not fit.
    """
    args = (params, grads, exp_avgs, exp_avg_sqs, grad_scale, lr, beta1, beta2, eps, weight_decay, step)
    if not params:
        _check(*args)
        return
    try:
        registry.call("adamw_", *args)
    except RuntimeError:  # native ops check for themselves in a third of the time; this check tells more
        _check(*args)
        raise
