"""LayerNorm in plain torch, fp32 inside, any device. This file is the definition; the kernels are optimisations."""

from torch import Tensor


def fwd(x_MN: Tensor, w_N: Tensor, b_N: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x_MN.float()
    mean_M = x.mean(-1)
    centred_MN = x - mean_M[:, None]
    rstd_M = (centred_MN.square().mean(-1) + eps).rsqrt()
    y_MN = centred_MN * rstd_M[:, None] * w_N.float()
    if b_N is not None:
        y_MN = y_MN + b_N.float()
    return y_MN.to(x_MN.dtype), mean_M, rstd_M


def residual_fwd(
    x_MN: Tensor, residual_MN: Tensor, w_N: Tensor, b_N: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_MN = (x_MN.float() + residual_MN.float()).to(x_MN.dtype)
    return *fwd(sum_MN, w_N, b_N, eps), sum_MN


def bwd(
    dy_MN: Tensor, dsum_MN: Tensor | None, x_MN: Tensor, w_N: Tensor, mean_M: Tensor, rstd_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy_MN.float()
    xhat_MN = (x_MN.float() - mean_M[:, None]) * rstd_M[:, None]
    wdy_MN = dy * w_N.float()
    dx_MN = wdy_MN - wdy_MN.mean(-1, keepdim=True) - xhat_MN * (xhat_MN * wdy_MN).mean(-1, keepdim=True)
    dx_MN = dx_MN * rstd_M[:, None]
    if dsum_MN is not None:
        dx_MN = dx_MN + dsum_MN.float()
    return dx_MN.to(x_MN.dtype), (dy * xhat_MN).sum(0).to(w_N.dtype), dy.sum(0).to(w_N.dtype)
