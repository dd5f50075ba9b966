"""Linear layers whose weights are whole numbers, or floats of eight bits, with a scale a group: y = x w^T + b, with
w = (q - zero) * scale.

A step of few tokens takes as long as its weights take to be read, which are a half or a quarter of bfloat16's here. Two
native kernels share the rows: one for as many as its multiplications take no time, and one whose products are wgmma's.
ref/linear_quantized.py says how they are kept. FLOPs 2 M N K; bytes that must move: x and y once, N K (int8, fp8) or
N K / 2 (int4), and the scales.

M = rows, K = in_features, N = out_features, G = groups of a row: ceil(K / group).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import like, no_float64
from cs336.ops.dispatch import matrix, rows, run, transformed
from cs336.ops.linear_few_rows import HALVES, HOPPER, native_refuses_rows
from cs336.ops.ref import linear_quantized as ref

FP8 = torch.float8_e4m3fn
PER_BYTE = {torch.int8: 1, torch.uint8: 2, FP8: 1}  # weights
CHUNK = {torch.int8: 64, torch.uint8: 128, FP8: 64}  # features whose scale the native kernels want to be one
MOST = 2**30 - 1  # rows and features of the native kernels


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 128,
    zeros: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """A linear layer of int8 weights.

    Args:
        x: (..., K) floating point.
        weight: (N, K) int8, contiguous; scales: (N, ceil(K / group)) floating point, contiguous.
        bias: (N,) like x, or None.
        group: neighbours in a row that share a scale.
        zeros: (N, ceil(K / group)) int16, contiguous, each from -128 to 128: the q that means 0. None: 0.
        constant: as in ops.linear_few_rows, of weight, scales and zeros.

    Returns y (..., N) like x, summed in float32. x and bias have gradients, the weights none. Raises ValueError for
    arguments that do not fit.
    """
    return _call("linear_int8", ref.dequantize_int8, x, weight, scales, bias, group, zeros, constant)


def linear_int4(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 128,
    zeros: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """A linear layer of int4 weights: as linear_int8, with weight (N, K / 2) uint8 and an even group. Byte j of a row
    holds q[2 j] + 8 below and q[2 j + 1] + 8 above."""
    return _call("linear_int4", ref.dequantize_int4, x, weight, scales, bias, group, zeros, constant)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    group: int | None = None,
    constant: bool = False,
) -> Tensor:
    """A linear layer of fp8 weights: as linear_int8, with weight (N, K) float8_e4m3fn of finite numbers and no zeros.
    group None: a row shares one scale, (N, 1)."""
    if group is None:
        group = x.shape[-1] if x.dim() else 1
    return _call("linear_fp8", ref.dequantize_fp8, x, weight, scales, bias, group, None, constant)


def _call(
    name: str,
    dequantize,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    zeros: Tensor | None,
    constant: bool,
) -> Tensor:
    if x.dim() == 0:
        raise ValueError("x must be (..., K), got no dims")
    flat = rows(matrix(x))
    more = () if name == "linear_fp8" else (zeros,)
    _CHECKS[name](flat, weight, scales, bias, group, *more, constant)
    if transformed():
        y = getattr(ref, name)(flat, weight, scales, bias, group, *more)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear.apply(name, dequantize, flat, weight, scales, bias, group, *more)
    else:
        y = run(name, flat, weight, scales, bias, group, *more, constant)
    return y.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, dequantize, x, weight, scales, bias, group: int, *zeros) -> Tensor:
        ctx.save_for_backward(weight, scales, *zeros)
        ctx.group, ctx.dequantize = group, dequantize
        return run(name, x, weight, scales, bias, group, *zeros)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        for_x, for_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[5]
        weight, scales, *zeros = ctx.saved_tensors
        dx = dy @ ctx.dequantize(weight, scales, ctx.group, *zeros).to(dy.dtype) if for_x else None
        return None, None, dx, None, None, dy.sum(0) if for_bias else None, None, *(None for _ in zeros)


def _check_int8(x: Tensor, weight: Tensor, scales: Tensor, bias, group: int, zeros, constant: bool) -> None:
    _check(x, weight, scales, bias, group, zeros, torch.int8)


def _check_int4(x: Tensor, weight: Tensor, scales: Tensor, bias, group: int, zeros, constant: bool) -> None:
    if group % 2:
        raise ValueError(f"int4 weights lie two in a byte, so that a group is even, got {group}")
    _check(x, weight, scales, bias, group, zeros, torch.uint8)


def _check_fp8(x: Tensor, weight: Tensor, scales: Tensor, bias, group: int, constant: bool) -> None:
    _check(x, weight, scales, bias, group, None, FP8)


def _check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int, zeros: Tensor | None, dtype: torch.dtype
) -> None:
    if x.dim() != 2 or not x.is_floating_point() or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be (M, K) floating point with its last dim contiguous, got {like(x)}")
    if group < 1:
        raise ValueError(f"group must be 1 or more, got {group}")
    K, per_byte = x.shape[1], PER_BYTE[dtype]
    if weight.dim() != 2 or weight.shape[1] * per_byte != K or weight.dtype != dtype:
        many = "K" if per_byte == 1 else f"K / {per_byte}"
        raise ValueError(f"weight must be (N, {many}) {dtype} for x {tuple(x.shape)}, got {like(weight)}")
    if scales.shape != (weight.shape[0], -(-K // group)) or not scales.is_floating_point():
        wanted = (weight.shape[0], -(-K // group))
        raise ValueError(f"scales must be {wanted} floating point for groups of {group}, got {like(scales)}")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.int16):
        raise ValueError(f"zeros must be int16 and as scales, {tuple(scales.shape)}, got {like(zeros)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias must be ({weight.shape[0]},) {x.dtype}, got {like(bias)}")
    for name, t in (("weight", weight), ("scales", scales), ("bias", bias), ("zeros", zeros)):
        if t is not None and (t.device != x.device or not t.is_contiguous()):
            raise ValueError(f"{name} must be contiguous on {x.device}, got {like(t)} with strides {t.stride()}")


_CHECKS: dict[str, Callable[..., None]] = {
    "linear_int8": _check_int8,
    "linear_int4": _check_int4,
    "linear_fp8": _check_fp8,
}


def _native_refuses(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int, *_) -> str | None:
    if x.shape[0] > MOST:
        return f"the native kernel takes up to {MOST} rows, not {x.shape[0]}"
    if reason := native_refuses_rows(x, weight, MOST):
        return reason
    if x.shape[0] > 1 and x.stride(0) == 0:
        return "the native kernel takes rows of x that lie apart, not one that is expanded"
    if scales.dtype not in (torch.float32, *HALVES):
        return f"the native kernel takes scales in float32, float16 and bfloat16, not {scales.dtype}"
    chunk = CHUNK[weight.dtype]
    if group < x.shape[1] and group % chunk:
        return f"the native kernel takes groups of a multiple of {chunk} features, or all {x.shape[1]}, not {group}"
    return None


for _name, _check_of in _CHECKS.items():
    _zeros = "" if _name == "linear_fp8" else ", Tensor? zeros=None"
    registry.define(
        f"{_name}(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int group{_zeros}, bool constant=False)"
        " -> Tensor",
        fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
        ref=getattr(ref, _name),
        triton=f"linear_quantized.{_name}",
        check=_check_of,
        supports={"native": _native_refuses, "triton": no_float64},
        capabilities={"native": HOPPER},
    )
