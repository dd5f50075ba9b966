"""AdamW: one launch a parameter, which is read and written once. The formula is csrc/common/adamw.h's."""

import math

import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

BLOCK = 1024


@triton.jit
def _lerp(start, end, weight):
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end + (weight - 1.0) * difference)


@triton.jit
def _adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, step_ptr, lr_ptr, scale_ptr, numel,
    one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    p = tl.load(p_ptr + i, mask).to(tl.float32)
    g = tl.load(g_ptr + i, mask).to(tl.float32)
    if scale_ptr is not None:
        g *= tl.load(scale_ptr)
    m = _lerp(tl.load(m_ptr + i, mask), g, one_minus_beta1)
    v = _lerp(tl.load(v_ptr + i, mask), g * g, one_minus_beta2)
    lr, step = tl.load(lr_ptr), tl.load(step_ptr).to(tl.float64)  # in float32 1 - 0.999 keeps three digits
    bias1 = (1.0 - tl.exp(step * log_beta1)).to(tl.float32)
    bias2 = (1.0 - tl.exp(step * log_beta2)).to(tl.float32)
    step_size, rsqrt_bias2, decay = lr / bias1, 1.0 / tl.sqrt(bias2), lr * weight_decay
    update = tl.div_rn(m, tl.sqrt_rn(v) * rsqrt_bias2 + eps)
    tl.store(m_ptr + i, m, mask)
    tl.store(v_ptr + i, v, mask)
    tl.store(p_ptr + i, cast(p - (decay * p + step_size * update), p_ptr.dtype.element_ty), mask)


def step_(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay):
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        if p.numel():
            _adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
                p, g, m, v, step, lr, grad_scale, p.numel(),
                1 - beta1, 1 - beta2, log_beta1, log_beta2, eps, weight_decay, BLOCK,
            )  # fmt: skip
