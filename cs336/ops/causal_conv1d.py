"""Depthwise causal convolution.  y[t, c] = bias[c] + sum_k weight[c, K - 1 - k] x[t - k, c]      k = 0 to K - 1

The short convolution of Mamba (arXiv:2312.00752). Bytes that must move: x and y once, backward dy, x and dx; 2 K FLOPs
an element, backward 4 K: memory-bound on every device. B = batch, S = tokens, C = channels, K = taps.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import has_kernel, rows, run, transformed
from cs336.ops.recurrent_step import check_rows
from cs336.ops.ref import causal_conv1d as ref

MOST_TAPS = 16  # of the Triton kernels, which read each tap's tile by itself


def _check(x, weight, bias, segments) -> None:
    """Raises ValueError for what no variant takes."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, S, C), floating point, got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"weight must be ({x.shape[2]}, K) to fit x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias must be ({x.shape[2]},), got {tuple(bias.shape)}")
    if segments is not None and segments.shape != x.shape[:2]:
        raise ValueError(f"segments must be {tuple(x.shape[:2])} to fit x, got {tuple(segments.shape)}")
    for name, other, floats in (("weight", weight, True), ("bias", bias, True), ("segments", segments, False)):
        if other is not None and (other.device != x.device or other.is_floating_point() != floats):
            kind = "floating point" if floats else "integers"
            raise ValueError(f"{name} must be {kind} on {x.device}, as x is, got {other.dtype} on {other.device}")


def _check_fwd(x, weight, bias, segments) -> None:
    _check(x, weight, bias, segments)
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, got strides {weight.stride()}")
    check_last_dims(x=x, bias=bias, segments=segments)


def _check_bwd(dy, x, weight, segments) -> None:
    _check_fwd(x, weight, None, segments)
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device or (dy.shape[2] > 1 and dy.stride(2) != 1):
        raise ValueError(f"dy must be like x, {like(x)}, its last dim contiguous, got {like(dy)} {dy.stride()}")


def _triton_refuses(x, weight, *_) -> str | None:
    if reason := no_float64(x) or no_float64(weight):
        return reason
    if weight.shape[1] > MOST_TAPS:
        return f"the Triton kernels take up to {MOST_TAPS} taps, not {weight.shape[1]}"
    return None


def _fake_bwd(dy, x, weight, segments):
    stat = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=stat), x.new_empty(x.shape[2], dtype=stat)


registry.define(
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? segments) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    ref=ref.fwd,
    triton="causal_conv1d.fwd",
    check=_check_fwd,
    supports={"triton": _triton_refuses},
)
registry.define(
    "causal_conv1d_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? segments) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_bwd,
    ref=ref.bwd,
    triton="causal_conv1d.bwd",
    check=_check_bwd,
    supports={"triton": lambda dy, *rest: _triton_refuses(*rest)},
)


def _check_step(ring, x, weight, bias, lengths, places, silu) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (B, C), floating point, got {tuple(x.shape)} {x.dtype}")
    _check_fwd(x[:, None], weight, bias, None)
    (C, K), least = weight.shape, max(1, weight.shape[1] - 1)
    if ring.dim() != 3 or ring.shape[2] != C or ring.shape[1] < least:
        raise ValueError(f"ring must be (N, {least} or more, {C}) for {K} taps, got {tuple(ring.shape)}")
    if not ring.is_contiguous() or not ring.is_floating_point() or ring.device != x.device:
        found = f"{ring.dtype} on {ring.device}, strides {ring.stride()}"
        raise ValueError(f"ring must be contiguous, floating point, on {x.device}, as x is, got {found}")
    check_rows(ring, x.shape[0], lengths, places)


registry.define(
    "causal_conv1d_step_(Tensor(a!) ring, Tensor x, Tensor weight, Tensor? bias, Tensor lengths, Tensor? places, "
    "bool silu) -> Tensor",
    fake=lambda ring, x, *_: x.new_empty(x.shape),
    ref=ref.step_,
    triton="causal_conv1d.step_",
    check=_check_step,
    supports={"triton": lambda ring, x, weight, *_: _triton_refuses(x, weight)},
)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, segments):
        ctx.save_for_backward(x, weight, segments)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.by_kernel = has_kernel("causal_conv1d_fwd", x, weight, bias, segments)
        if ctx.by_kernel:
            return registry.call("causal_conv1d_fwd", x, weight, bias, segments)
        return ref.fwd(x, weight, bias, segments)

    @staticmethod
    def backward(ctx, dy):
        x, weight, segments = ctx.saved_tensors
        if ctx.by_kernel and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            dx, dweight, dbias = registry.call("causal_conv1d_bwd", rows(dy), x, weight, segments)
        else:  # which can be differentiated again
            dx, dweight, dbias = ref.bwd(dy, x, weight, segments)
        return dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own K taps, over a token and those before it, in fp32 (fp64 for fp64).

    Args:
        x: (B, S, C) floating point; before the first token stand zeros.
        weight: (C, K), floating point; the last tap is the token's own.
        bias: (C,) or None.
        segments: (B, S) integers, equal ones side by side: a tap that reaches into another segment gives 0.

    Returns y like x. Raises ValueError for shapes, dtypes or devices that do not fit.

    By Triton's kernels on a GPU, in plain torch elsewhere.
    """
    _check(x, weight, bias, segments)
    bias, segments = (None if t is None else rows(t) for t in (bias, segments))
    args = rows(x), weight.contiguous(), bias, segments
    return ref.fwd(*args) if transformed() else _Conv.apply(*args)


def causal_conv1d_step_(
    ring: Tensor,
    x: Tensor,
    weight: Tensor,
    lengths: Tensor,
    places: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """causal_conv1d of one token a row, behind those that a ring holds, which then holds it too.

    Args:
        ring: (N, R, C) floating point, contiguous, written to; R >= K - 1. A row's token t is in slot t mod R.
        x: (B, C) floating point; weight: (C, K); bias: (C,) or None.
        lengths: (B,) int32 or int64, tokens of each row before this one.
        places: (B,) int32 or int64, which rows of the ring these are; None: the first B. Of rows that share one none
            may be read again.
        silu: return silu(y), rounded once.

    Returns y (B, C) like x. No gradient. Raises ValueError for arguments that do not fit. What lengths and places hold
    is checked on a CPU; on a GPU a row whose place is outside the ring is skipped, and its y undefined.
    """
    bias = None if bias is None else rows(bias)
    args = ring, x if x.dim() == 0 else rows(x), weight.contiguous(), bias, lengths, places, silu
    _check_step(*args)
    return run("causal_conv1d_step_", *args)
