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
    p_ptr, g_ptr, m_ptr, v_ptr, remainder_ptr, step_ptr, lr_ptr, scale_ptr, used_ptr, numel,
    one_minus_beta1, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    if used_ptr is not None:
        mask = i < tl.where(tl.load(used_ptr) > 0, numel, 0)
    p = tl.load(p_ptr + i, mask).to(tl.float32)
    if remainder_ptr is not None:
        bits = p.to(tl.int32, bitcast=True) + tl.load(remainder_ptr + i, mask).to(tl.int32)
        p = bits.to(tl.float32, bitcast=True)
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
    p -= decay * p + step_size * update
    if remainder_ptr is not None:  # cs336/ops/ref/rounding.py
        bits = p.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) & -0x10000
        tl.store(remainder_ptr + i, tl.where(p != p, 0, bits - high).to(tl.int16), mask)
        p = tl.where(p != p, p, high.to(tl.float32, bitcast=True))
    tl.store(p_ptr + i, cast(p, p_ptr.dtype.element_ty), mask)


def update(p, g, m, v, step, lr, grad_scale, beta1, beta2, eps, weight_decay, *, remainder=None, used=None):
    """One parameter; with `remainder` p is a bfloat16 half of float32 weights, and stays as it is where `used` is 0."""
    if not p.numel():
        return
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    _adamw_kernel[(triton.cdiv(p.numel(), BLOCK),)](
        p, g, m, v, remainder, step, lr, grad_scale, used, p.numel(),
        1 - beta1, 1 - beta2, log_beta1, log_beta2, eps, weight_decay, BLOCK,
    )  # fmt: skip


def step_(params, grads, exp_avgs, exp_avg_sqs, steps, lr, grad_scale, beta1, beta2, eps, weight_decay):
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        update(p, g, m, v, step, lr, grad_scale, beta1, beta2, eps, weight_decay)
