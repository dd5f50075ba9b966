"""LayerNorm in plain torch, fp32 inside (fp64 for fp64), any device: the definition; the kernels are optimisations."""

from torch import Tensor

from cs336.ops.ref.wide import wide


def fwd(x_MN: Tensor, w_N: Tensor, b_N: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = wide(x_MN)
    mean_M = x.mean(-1)
    centred_MN = x - mean_M[:, None]
    rstd_M = (centred_MN.square().mean(-1) + eps).rsqrt()
    y_MN = centred_MN * rstd_M[:, None] * wide(w_N)
    if b_N is not None:
        y_MN = y_MN + wide(b_N)
    return y_MN.to(x_MN.dtype), mean_M, rstd_M


def residual_fwd(
    x_MN: Tensor, residual_MN: Tensor, w_N: Tensor, b_N: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sum_MN = (wide(x_MN) + wide(residual_MN)).to(x_MN.dtype)
    return *fwd(sum_MN, w_N, b_N, eps), sum_MN


def bwd(
    dy_MN: Tensor, dsum_MN: Tensor | None, x_MN: Tensor, w_N: Tensor, mean_M: Tensor, rstd_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy = wide(dy_MN)
    xhat_MN = (wide(x_MN) - mean_M[:, None]) * rstd_M[:, None]
    wdy_MN = dy * wide(w_N)
    dx_MN = wdy_MN - wdy_MN.mean(-1, keepdim=True) - xhat_MN * (xhat_MN * wdy_MN).mean(-1, keepdim=True)
    dx_MN = dx_MN * rstd_M[:, None]
    if dsum_MN is not None:
        dx_MN = dx_MN + wide(dsum_MN)
    return dx_MN.to(x_MN.dtype), (dy * xhat_MN).sum(0).to(w_N.dtype), dy.sum(0).to(w_N.dtype)
