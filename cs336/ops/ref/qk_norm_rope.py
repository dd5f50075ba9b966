"""RMSNorm over each head of q and k, then rotation, in plain torch, fp32 inside, any device."""

import torch
from torch import Tensor

from cs336.ops.ref import rope
from cs336.ops.ref.wide import wide


def fwd(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = rope.at(cos, positions), rope.at(sin, positions)
    ys, rstds = [], []
    for x_BHSD, w_D in ((q_BHSD, q_weight_D), (k_BHSD, k_weight_D)):
        y, rstd_BHS = _turned(x_BHSD, w_D, cos, sin, interleaved, eps)
        ys.append(torch.empty_like(x_BHSD).copy_(y))
        rstds.append(rstd_BHS.contiguous())
    return ys[0], ys[1], rstds[0], rstds[1]


def plain(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The first two of fwd's, which nothing is copied into: what functorch and forward mode can transform."""
    tables = rope.at(cos, positions), rope.at(sin, positions), interleaved
    q_turned, _ = _turned(q_BHSD, q_weight_D, *tables, eps)
    k_turned, _ = _turned(k_BHSD, k_weight_D, *tables, eps)
    return q_turned.to(q_BHSD.dtype), k_turned.to(k_BHSD.dtype)


def _turned(x_BHSD: Tensor, w_D: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, eps: float):
    """y, wide, and rstd (B, H, S)."""
    x = wide(x_BHSD)
    rstd_BHS = (x.square().mean(-1) + eps).rsqrt()
    return rope.fwd(x * rstd_BHS[..., None] * wide(w_D), cos, sin, interleaved), rstd_BHS


def bwd(
    dq_BHSD: Tensor,
    dk_BHSD: Tensor,
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    q_rstd_BHS: Tensor,
    k_rstd_BHS: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = rope.at(cos, positions), rope.at(sin, positions)
    dxs, dws = [], []
    for dy_BHSD, x_BHSD, w_D, rstd_BHS in (
        (dq_BHSD, q_BHSD, q_weight_D, q_rstd_BHS),
        (dk_BHSD, k_BHSD, k_weight_D, k_rstd_BHS),
    ):
        dy = rope.fwd(wide(dy_BHSD), cos, -sin, interleaved)
        xhat, wdy = wide(x_BHSD) * rstd_BHS[..., None], dy * wide(w_D)
        dx = (wdy - xhat * (wdy * xhat).mean(-1, keepdim=True)) * rstd_BHS[..., None]
        dxs.append(torch.empty_like(x_BHSD).copy_(dx))
        dws.append((dy * xhat).sum((0, 1, 2)).to(w_D.dtype))
    return dxs[0], dxs[1], dws[0], dws[1]
