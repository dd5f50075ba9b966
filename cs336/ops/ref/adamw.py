"""AdamW in plain torch, fp32 inside (fp64 for fp64), any device: the definition; the kernels are optimisations."""

import torch
from torch import Tensor


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
