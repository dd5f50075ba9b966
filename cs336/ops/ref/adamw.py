"""AdamW in plain torch, fp32 inside, any device. This file is the definition; the kernels are optimisations."""

from torch import Tensor


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    step_size = lr / (1 - beta1**step)
    rsqrt_bias2 = (1 - beta2**step) ** -0.5
    for p, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = grad.float() if grad_scale is None else grad.float() * grad_scale.reshape(())
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        update = m / (v.sqrt() * rsqrt_bias2 + eps)
        p.copy_(p.float() - (p.float() * (lr * weight_decay) + update * step_size))
