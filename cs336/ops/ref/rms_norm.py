"""RMSNorm in plain torch, fp32 inside, any device. This file is the definition; the kernels are optimisations."""

from torch import Tensor


def fwd(x_MN: Tensor, w_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x_MN.float()
    rstd_M = (x.square().mean(-1) + eps).rsqrt()
    return (x * rstd_M[:, None] * w_N.float()).to(x_MN.dtype), rstd_M


def residual_fwd(x_MN: Tensor, residual_MN: Tensor, w_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    sum_MN = (x_MN.float() + residual_MN.float()).to(x_MN.dtype)
    return *fwd(sum_MN, w_N, eps), sum_MN


def bwd(dy_MN: Tensor, dsum_MN: Tensor | None, x_MN: Tensor, w_N: Tensor, rstd_M: Tensor) -> tuple[Tensor, Tensor]:
    xhat_MN = x_MN.float() * rstd_M[:, None]
    wdy_MN = dy_MN.float() * w_N.float()
    dx_MN = (wdy_MN - xhat_MN * (xhat_MN * wdy_MN).mean(-1, keepdim=True)) * rstd_M[:, None]
    if dsum_MN is not None:
        dx_MN = dx_MN + dsum_MN.float()
    return dx_MN.to(x_MN.dtype), (dy_MN.float() * xhat_MN).sum(0).to(w_N.dtype)
