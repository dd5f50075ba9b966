"""RMSNorm.  y = x * rsqrt(mean(x^2) + eps) * w         Zhang & Sennrich 2019, arXiv:1910.07467

With a residual, x is first replaced by the sum x + residual, which is returned too: the next layer's residual.
M = rows, N = features. Bytes that must move, in elements of x: forward 2MN (with residual 4MN), backward 3MN (with the
sum's gradient 4MN). FLOPs are about 4MN and 10MN: memory-bound on every device.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import rms_norm as ref


def _fake_fwd(x, w, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


registry.define(
    "rms_norm_fwd(Tensor x, Tensor w, float eps) -> (Tensor y, Tensor rstd)",
    fake=_fake_fwd,
    ref=ref.fwd,
)
registry.define(
    "rms_norm_residual_fwd(Tensor x, Tensor residual, Tensor w, float eps) -> (Tensor y, Tensor rstd, Tensor sum)",
    fake=lambda x, residual, w, eps: (*_fake_fwd(x, w, eps), x.new_empty(x.shape)),
    ref=ref.residual_fwd,
)
registry.define(
    "rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor w, Tensor rstd) -> (Tensor dx, Tensor dw)",
    fake=lambda dy, dsum, x, w, rstd: (x.new_empty(x.shape), w.new_empty(w.shape)),
    ref=ref.bwd,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MN, residual_MN, w_N, eps):
        if residual_MN is None:
            y_MN, rstd_M = registry.call("rms_norm_fwd", x_MN, w_N, eps)
            sum_MN = None
        else:
            y_MN, rstd_M, sum_MN = registry.call("rms_norm_residual_fwd", x_MN, residual_MN, w_N, eps)
        ctx.save_for_backward(x_MN if sum_MN is None else sum_MN, w_N, rstd_M)
        ctx.set_materialize_grads(False)
        ctx.has_residual = sum_MN is not None
        return y_MN if sum_MN is None else (y_MN, sum_MN)

    @staticmethod
    def backward(ctx, dy_MN, dsum_MN=None):
        if dy_MN is None:
            return dsum_MN, dsum_MN if ctx.has_residual else None, None, None
        dy_MN, dsum_MN = rows(dy_MN), None if dsum_MN is None else rows(dsum_MN)
        dx_MN, dw_N = registry.call("rms_norm_bwd", dy_MN, dsum_MN, *ctx.saved_tensors)
        return dx_MN, dx_MN if ctx.has_residual else None, dw_N, None


def rows(x: Tensor) -> Tensor:
    """x (..., N) as (M, N) rows with the last dim contiguous; copies only where the strides do not allow a view."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dim of x by its root mean square and scale it by weight, with fp32 accumulation.

    Args:
        x: (..., N) float32, float16 or bfloat16, N >= 1; rows may be strided.
        weight: (N,) in x's dtype or float32.
        eps: added to the mean square.
        residual: (..., N) like x; added to x first.

    Returns y (..., N) in x's dtype; with a residual (y, x + residual).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check(x, weight, residual)
    x_MN, residual_MN = rows(x), None if residual is None else rows(residual)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    ):
        out = _RmsNorm.apply(x_MN, residual_MN, weight, eps)
    elif residual_MN is None:
        out = registry.call("rms_norm_fwd", x_MN, weight, eps)[0]
    else:
        y_MN, _, sum_MN = registry.call("rms_norm_residual_fwd", x_MN, residual_MN, weight, eps)
        out = y_MN, sum_MN
    if residual is None:
        return out.view(x.shape)
    return out[0].view(x.shape), out[1].view(x.shape)


def check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """The checks that rms_norm and layer_norm share."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., N) with N >= 1, got shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},) to match x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 or x's {x.dtype}, got {weight.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be like x {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}"
        )
