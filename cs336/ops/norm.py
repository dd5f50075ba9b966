"""What rms_norm and layer_norm share: checks, rows, and one autograd.Function over their raw ops.

For a norm NAME with parameters p = (weight,) or (weight, bias) and per-row statistics s:
    NAME_fwd(x, *p, eps) -> (y, *s)
    NAME_residual_fwd(x, residual, *p, eps) -> (y, *s, sum)
    NAME_bwd(dy, dsum, x, weight, *s) -> (dx, *dp)      dsum: None, or the gradient of sum, added to dx
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cs336.ops import dispatch, registry
from cs336.ops.checks import like
from cs336.ops.ref import layer_norm, rms_norm

REF = {"rms_norm": rms_norm, "layer_norm": layer_norm}
ROWS, STATS = ("x", "residual", "dy", "dsum"), ("mean", "rstd")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Norm(torch.autograd.Function):
    # Without setup_context, which makes a call four times as slow: functorch's transforms take `_plain` instead.

    @staticmethod
    def forward(ctx, name, x_MN, residual_MN, eps, *params):
        y_MN, *stats, sum_MN = _forward(name, x_MN, residual_MN, eps, params)
        ctx.save_for_backward(x_MN if sum_MN is None else sum_MN, params[0], *stats)
        ctx.set_materialize_grads(False)
        ctx.name, ctx.eps = name, eps
        return y_MN if sum_MN is None else (y_MN, sum_MN)

    @staticmethod
    def backward(ctx, dy_MN, dsum_MN=None):
        _, _, needs_residual, _, *needs_params = ctx.needs_input_grad
        dparams: Sequence[Tensor | None]
        if dy_MN is None:
            dx_MN, dparams = dsum_MN, [None for _ in needs_params]
        else:
            dsum_MN = None if dsum_MN is None else rows(dsum_MN)
            dx_MN, *dparams = _backward(ctx, rows(dy_MN), dsum_MN)
        dparams = [dp if needs else None for dp, needs in zip(dparams, needs_params, strict=True)]
        return None, dx_MN, dx_MN if needs_residual else None, None, *dparams


def _forward(name: str, x_MN: Tensor, residual_MN: Tensor | None, eps: float, params: Sequence) -> tuple:
    """y, the rows' statistics, and the sum or None."""
    if residual_MN is None:
        return *registry.call(f"{name}_fwd", x_MN, *params, eps), None
    return registry.call(f"{name}_residual_fwd", x_MN, residual_MN, *params, eps)


def _backward(ctx, dy_MN: Tensor, dsum_MN: Tensor | None) -> Sequence[Tensor]:
    """dx and the gradients of the parameters."""
    x_MN, w_N, *stats = ctx.saved_tensors
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return registry.call(f"{ctx.name}_bwd", dy_MN, dsum_MN, x_MN, w_N, *stats)
    ref = REF[ctx.name]  # create_graph: in plain torch, differentiable again, from x alone
    args = (x_MN, w_N) if len(stats) == 1 else (x_MN, w_N, None)
    return ref.bwd(dy_MN, dsum_MN, x_MN, w_N, *ref.fwd(*args, ctx.eps)[1:])


def _plain(name: str, x_MN: Tensor, residual_MN: Tensor | None, eps: float, params: Sequence) -> Any:
    """y and the sum, or y, in plain torch: what functorch and forward mode can transform."""
    if residual_MN is None:
        return REF[name].fwd(x_MN, *params, eps)[0]
    y_MN, *_, sum_MN = REF[name].residual_fwd(x_MN, residual_MN, *params, eps)
    return y_MN, sum_MN


def norm(
    name: str, x: Tensor, residual: Tensor | None, eps: float, weight: Tensor, bias: Sequence[Tensor | None] = ()
) -> Tensor | tuple[Tensor, Tensor]:
    """The public functions' body: y, or (y, sum) with a residual, shaped like x. `bias` is () or (bias,)."""
    try:
        return _norm(name, x, residual, eps, weight, bias)
    except (RuntimeError, IndexError, AttributeError):
        check(
            x, weight, *bias, residual=residual
        )  # the op has checked the same for itself: here it costs 1 us of a call's 15
        raise


def _norm(name, x, residual, eps, weight, bias):
    if residual is not None:
        _check_like("residual", residual, "x", x)
        residual = rows(residual)
    x_MN = rows(x)
    params = [p if p is None or p.is_contiguous() else p.contiguous() for p in (weight, *bias)]
    wanted = x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    wanted = wanted or (bias and bias[0] is not None and bias[0].requires_grad)
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        out = _plain(name, x_MN, residual, eps, params)
    elif wanted and torch.is_grad_enabled():
        out = _Norm.apply(name, x_MN, residual, eps, *params)
    elif residual is None:
        out = registry.call(f"{name}_fwd", x_MN, *params, eps)[0]
    else:
        y_MN, *_, sum_MN = registry.call(f"{name}_residual_fwd", x_MN, residual, *params, eps)
        out = y_MN, sum_MN
    if x_MN is x:
        return out
    return out.view_as(x) if residual is None else (out[0].view_as(x), out[1].view_as(x))  # view(shape) is 4x slower


def rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) rows with the last dim contiguous; copies only where the strides do not allow a view."""
    return dispatch.rows(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def contract(*names: str) -> Callable[..., None]:
    """The check of a raw op with these arguments: what each must be follows from its name.

    x, residual, dy, dsum: rows (M, N). w, b: features (N,). mean, rstd: a number a row, (M,).
    """

    def check_raw(*args):
        given = {name: t for name, t in zip(names, args, strict=True) if isinstance(t, Tensor)}
        x = given["x"]
        check(x, given["w"], given.get("b"), **{n: t for n, t in given.items() if n in ROWS[1:]})
        for name, t in given.items():
            if name in STATS and (t.shape != x.shape[:1] or t.dtype != stat_dtype(x) or t.device != x.device):
                raise ValueError(f"{name} must be ({x.shape[0]},) {stat_dtype(x)} on {x.device}, got {like(t)}")
            if name in ROWS and (t.dim() != 2 or (t.shape[1] > 1 and t.stride(1) != 1)):
                raise ValueError(f"{name} must be (M, N) with its last dim contiguous, got {like(t)} {t.stride()}")
            if name not in ROWS and not t.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got stride {t.stride()}")

    return check_raw


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, **like_x: Tensor | None) -> None:
    """What the public functions and the raw ops both ask of their arguments."""
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor, got {given!r:.80}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., N) with N >= 1, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 or x's {x.dtype}, got {weight.dtype}")
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(f"weight must be ({x.shape[-1]},) on {x.device} to fit x, got {like(weight)}")
    if bias is not None:
        _check_like("bias", bias, "weight", weight)
    for name, t in like_x.items():
        if t is not None:
            _check_like(name, t, "x", x)


def stat_dtype(x: Tensor) -> torch.dtype:
    """Of mean and rstd."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor like {other_name}, {like(other)}, got {t!r:.80}")
    if t.shape != other.shape or t.dtype != other.dtype or t.device != other.device:
        raise ValueError(f"{name} must be like {other_name}, {like(other)}, got {like(t)}")
