"""Cross-entropy in Triton: one program a row, which is read once by the forward, with the sums of an online softmax.

How a row is cut depends on the vocabulary alone, so its result does not depend on other rows. A target outside the
vocabulary makes its row NaN.
"""

import torch
import triton
import triton.language as tl

from cs336.ops.triton.cast import cast

MAX_BLOCK = 8192


@triton.jit
def _capped(x, softcap):
    """z = softcap * tanh(x / softcap) and dz / dx, from an exponential that cannot overflow; x and 1 without a cap."""
    z, slope = x, 1.0
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        magnitude = softcap * (1.0 - e) / (1.0 + e)
        z = tl.where(x < 0, -magnitude, magnitude)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return z, slope


@triton.jit
def _expm1(x):
    """exp(x) - 1 of an x <= 0, without cancellation where it is nearly 0."""
    series = 1.0 + x / 9.0
    for i in tl.static_range(8, 1, -1):
        series = 1.0 + x / i * series
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _row_sums(row_ptr, V, softcap, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """Of a row's z: log-sum-exp, mean, and entropy (0 if not asked for)."""
    block = tl.arange(0, BLOCK)
    top = -float("inf")
    total, weighted, plain = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        live = start + block < V
        z, _ = _capped(tl.load(row_ptr + start + block, mask=live, other=-float("inf")).to(tl.float32), softcap)
        z = tl.where(live, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # so far nothing but -inf
        old = tl.exp(top - shift)
        e = tl.exp(z - shift)
        if ENTROPY:
            old_shift = tl.where(top == -float("inf"), shift, top)
            below = tl.where(z == -float("inf"), 0.0, z - shift)
            weighted = old * (weighted + (old_shift - shift) * total) + tl.sum(e * below, 0)
        total = old * total + tl.sum(e, 0)
        plain += tl.sum(tl.where(live, z, 0.0), 0)
        top = new_top
    log_total = tl.log(total)
    entropy = 0.0
    if ENTROPY:
        entropy = log_total - weighted / total
    return top + log_total, plain / V, entropy


@triton.jit
def _row_loss(row_ptr, target, V, lse, mean, softcap, z_loss, label_smoothing):
    inside = (target >= 0) & (target < V)
    picked, _ = _capped(tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32), softcap)
    loss = lse - picked + z_loss * lse * lse
    if label_smoothing is not None:
        loss += label_smoothing * (picked - mean)
    return tl.where(inside, loss, float("nan"))


@triton.jit
def _store_gradient(
    row_ptr, out_ptr, target, V, lse, dloss, of_p, dentropy, entropy, softcap, label_smoothing, BLOCK: tl.constexpr
):
    of_p = tl.where((target >= 0) & (target < V), of_p, float("nan"))
    share, spread = dloss, 0.0
    if label_smoothing is not None:
        share, spread = dloss * (1.0 - label_smoothing), dloss * label_smoothing / V
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < V
        z, slope = _capped(tl.load(row_ptr + columns, mask=live, other=0.0).to(tl.float32), softcap)
        log_p = z - lse
        weight = of_p
        if dentropy is not None:
            weight = of_p - dentropy * (tl.maximum(log_p, -1e30) + entropy)
        dz = tl.exp(log_p) * weight
        if (target >= start) & (target < start + BLOCK):
            dz = tl.where(columns == target, tl.exp(log_p) * (weight - share) + share * _expm1(log_p), dz)
        tl.store(out_ptr + columns, cast((dz - spread) * slope, out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _store_zeros(out_ptr, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + columns, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=columns < V)


@triton.jit(do_not_specialize=["ignore_index", "z_loss"])
def _fwd_kernel(
    logits_ptr,  # (N, V)
    targets_ptr,  # (N,) int64
    loss_ptr,  # (N,) float32, as the others
    lse_ptr,
    entropy_ptr,  # or None
    V,
    stride,
    ignore_index,
    softcap,  # a number or None
    z_loss,
    label_smoothing,  # a number or None
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    loss, lse, entropy = 0.0, 0.0, 0.0
    if target != ignore_index:
        row_ptr = logits_ptr + row * stride
        lse, mean, entropy = _row_sums(row_ptr, V, softcap, BLOCK, entropy_ptr is not None)
        loss = _row_loss(row_ptr, target, V, lse, mean, softcap, z_loss, label_smoothing)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["ignore_index", "z_loss"])
def _bwd_kernel(
    logits_ptr, targets_ptr, lse_ptr, entropy_ptr, dloss_ptr,
    dlse_ptr,  # (N,) or None
    dentropy_ptr,  # (N,) or None
    out_ptr,  # (N, V) contiguous
    V, stride, ignore_index, softcap, z_loss, label_smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr, out_row_ptr = logits_ptr + row * stride, out_ptr + row * V
    if target == ignore_index:
        _store_zeros(out_row_ptr, V, BLOCK)
    else:
        lse, dloss = tl.load(lse_ptr + row), tl.load(dloss_ptr + row)
        of_p = dloss * (1.0 + 2.0 * z_loss * lse)
        if dlse_ptr is not None:
            of_p += tl.load(dlse_ptr + row)
        if dentropy_ptr is not None:
            _store_gradient(
                row_ptr, out_row_ptr, target, V, lse, dloss, of_p, tl.load(dentropy_ptr + row),
                tl.load(entropy_ptr + row), softcap, label_smoothing, BLOCK,
            )  # fmt: skip
        else:
            _store_gradient(
                row_ptr, out_row_ptr, target, V, lse, dloss, of_p, None, None, softcap, label_smoothing, BLOCK
            )


@triton.jit(do_not_specialize=["ignore_index", "z_loss"])
def _gradient_kernel(
    logits_ptr,  # (N, V); becomes the gradient
    targets_ptr, loss_ptr, lse_ptr,
    scale_ptr,  # one float32
    V, stride, ignore_index, softcap, z_loss, label_smoothing,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * stride
    loss, lse = 0.0, 0.0
    if target == ignore_index:
        _store_zeros(row_ptr, V, BLOCK)
    else:
        lse, mean, _ = _row_sums(row_ptr, V, softcap, BLOCK, False)
        loss = _row_loss(row_ptr, target, V, lse, mean, softcap, z_loss, label_smoothing)
        tl.debug_barrier()  # all threads have read the target's logit
        scale = tl.load(scale_ptr)
        of_p = scale * (1.0 + 2.0 * z_loss * lse)
        _store_gradient(row_ptr, row_ptr, target, V, lse, scale, of_p, None, None, softcap, label_smoothing, BLOCK)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


def _plan(V: int) -> dict:
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def fwd(logits, targets, ignore_index, softcap, z_loss, label_smoothing, with_entropy):
    N, V = logits.shape
    loss, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    entropy = logits.new_empty(N if with_entropy else 0, dtype=torch.float32)
    if N:
        with torch.cuda.device_of(logits):
            _fwd_kernel[(N,)](
                logits, targets, loss, lse, entropy if with_entropy else None, V, logits.stride(0), ignore_index,
                softcap, z_loss, label_smoothing or None, **_plan(V),
            )  # fmt: skip
    return loss, lse, entropy


def bwd(
    logits, targets, lse, entropy, dloss, dlse, dentropy, ignore_index, softcap, z_loss, label_smoothing
):  # fmt: skip
    N, V = logits.shape
    dlogits = logits.new_empty(N, V)
    if N:
        with torch.cuda.device_of(logits):
            _bwd_kernel[(N,)](
                logits, targets, lse, entropy, dloss, dlse, dentropy, dlogits, V, logits.stride(0), ignore_index,
                softcap, z_loss, label_smoothing or None, **_plan(V),
            )  # fmt: skip
    return dlogits


def gradient_(logits, targets, scale, ignore_index, softcap, z_loss, label_smoothing):
    N, V = logits.shape
    loss, lse = (logits.new_empty(N, dtype=torch.float32) for _ in range(2))
    if N:
        with torch.cuda.device_of(logits):
            _gradient_kernel[(N,)](
                logits, targets, loss, lse, scale, V, logits.stride(0), ignore_index,
                softcap, z_loss, label_smoothing or None, **_plan(V),
            )  # fmt: skip
    return loss, lse
