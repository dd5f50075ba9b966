"""AdamW in plain torch, fp32 inside (fp64 for fp64), any device: the definition; the kernels are optimisations."""

import torch
from torch import Tensor

from cs336.ops.ref.rounding import join, split


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    lr = lr.double().reshape(())
    for p, grad, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        t = step.double().reshape(())
        step_size, rsqrt_bias2 = (lr / (1 - beta1**t)).to(m.dtype), (1 - beta2**t).rsqrt().to(m.dtype)
        g = grad.to(m.dtype)
        if grad_scale is not None:
            g = g * grad_scale.reshape(())
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        update = m / (v.sqrt() * rsqrt_bias2 + eps)
        before = p.to(torch.promote_types(p.dtype, m.dtype))
        p.copy_(before - (before * (lr * weight_decay).to(m.dtype) + update * step_size))


def remainder_step_(params: list[Tensor], remainders: list[Tensor], grads: list[Tensor], *rest) -> None:
    """step_ of the float32 weights whose halves params and remainders are: see ref/rounding.py."""
    wide = [join(p, remainder) for p, remainder in zip(params, remainders, strict=True)]
    step_(wide, grads, *rest)
    for p, remainder, w in zip(params, remainders, wide, strict=True):
        rounded, bits = split(w)
        p.copy_(rounded)
        remainder.copy_(bits)
