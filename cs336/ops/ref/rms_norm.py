"""RMSNorm in plain torch, fp32 inside (fp64 for fp64), any device: the definition; the kernels are optimisations."""

from torch import Tensor

from cs336.ops.ref.wide import wide


def fwd(x_MN: Tensor, w_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = wide(x_MN)
    rstd_M = (x.square().mean(-1) + eps).rsqrt()
    return (x * rstd_M[:, None] * wide(w_N)).to(x_MN.dtype), rstd_M


def residual_fwd(x_MN: Tensor, residual_MN: Tensor, w_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    sum_MN = (wide(x_MN) + wide(residual_MN)).to(x_MN.dtype)
    return *fwd(sum_MN, w_N, eps), sum_MN


def bwd(dy_MN: Tensor, dsum_MN: Tensor | None, x_MN: Tensor, w_N: Tensor, rstd_M: Tensor) -> tuple[Tensor, Tensor]:
    xhat_MN = wide(x_MN) * rstd_M[:, None]
    wdy_MN = wide(dy_MN) * wide(w_N)
    dx_MN = (wdy_MN - xhat_MN * (xhat_MN * wdy_MN).mean(-1, keepdim=True)) * rstd_M[:, None]
    if dsum_MN is not None:
        dx_MN = dx_MN + wide(dsum_MN)
    return dx_MN.to(x_MN.dtype), (wide(dy_MN) * xhat_MN).sum(0).to(w_N.dtype)
