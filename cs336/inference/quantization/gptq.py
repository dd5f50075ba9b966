"""GPTQ: what rounding a weight does to a layer's outputs is made good by the weights not yet rounded.  arXiv:2210.17323

With H = X^T X of the inputs X that calibration saw, and U the upper Cholesky factor of (H + damping mean(diag H) I)^-1,
feature by feature: e = (w_k - round(w_k)) / U_kk, and from the features j behind it, w_j -= e U_kj. Those of a block
are changed at once, the ones behind the block with one matmul.

N = out_features, K = in_features, B = features of a block.
"""

import torch
from torch import Tensor, nn

from cs336.inference.quantization.calibration import Inputs
from cs336.inference.quantization.layerwise import Scheme, fill_block
from cs336.inference.quantization.rounding import check_finite, grids, on_grid, wide
from cs336.nn import QuantizedWeight
from cs336.nn.quantized import BITS

BLOCK = 128


@torch.no_grad()
def gptq(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    *,
    bits: int = 4,
    group: int = 128,
    act_order: bool = False,
    asymmetric: bool = False,
    damping: float = 0.01,
) -> QuantizedWeight:
    """The weight on grids of `bits` bits, one a group, that minimise the error of x w^T greedily.

    Args:
        weight_NK: (N, K) floating point, which the scales are like.
        hessian_KK: (K, K) X^T X, or a multiple of it. A feature that was always 0 is rounded to the nearest.
        act_order: round the features of the largest diag H first, and make groups of them: the result has an order.
        damping: of the mean of diag H, what is added to the diagonal.

    Raises ValueError for a weight or a Hessian that is not finite, or a Hessian of another shape.
    """
    K = weight_NK.shape[1]
    check_finite(weight_NK)
    if hessian_KK.shape != (K, K) or not hessian_KK.isfinite().all():
        raise ValueError(f"the Hessian must be ({K}, {K}) finite numbers, got {tuple(hessian_KK.shape)}")
    w_NK, h_KK = wide(weight_NK).clone(), hessian_KK.double()
    order = h_KK.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is not None:
        w_NK, h_KK = w_NK[:, order], h_KK[order][:, order]
    u_KK = _inverse_factor(h_KK, damping).to(w_NK.dtype)
    q_NK, scales, zeros = torch.empty_like(w_NK, dtype=torch.int8), [], []
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        errors_NB = torch.empty_like(w_NK[:, start:end])
        for k in range(start, end):
            if k % group == 0:
                scale_N1, zero_N1 = grids(
                    _group(w_NK, errors_NB, u_KK, start, k, min(k + group, K))[:, None],
                    bits,
                    asymmetric,
                    weight_NK.dtype,
                )
                scales.append(scale_N1)
                zeros.append(zero_N1)
            w_N = w_NK[:, k]
            q_N = on_grid(w_N[:, None, None], scale_N1, zero_N1, bits)[:, 0, 0]
            rounded_N = (q_N if zero_N1 is None else q_N - zero_N1[:, 0]) * scale_N1[:, 0].to(w_N.dtype)
            errors_NB[:, k - start] = (w_N - rounded_N) / u_KK[k, k]
            w_NK[:, k + 1 : end] -= errors_NB[:, k - start, None] * u_KK[k, k + 1 : end]
            q_NK[:, k] = q_N
        w_NK[:, end:] -= errors_NB @ u_KK[start:end, end:]
    zeros_NG = torch.cat([zero for zero in zeros if zero is not None], 1) if asymmetric else None
    return QuantizedWeight(q_NK, torch.cat(scales, 1), zeros_NG, order)


def _group(w_NK: Tensor, errors_NB: Tensor, u_KK: Tensor, start: int, k: int, stop: int) -> Tensor:
    """The weights of features k to stop as they are by now; the block's errors have not yet reached those behind it."""
    end = start + errors_NB.shape[1]
    behind = w_NK[:, end:stop] - errors_NB[:, : k - start] @ u_KK[start:k, end:stop]
    return torch.cat((w_NK[:, k : min(stop, end)], behind), 1)


def _inverse_factor(h_KK: Tensor, damping: float) -> Tensor:
    """The upper factor of the inverse of the damped Hessian."""
    h_KK = h_KK.clone()
    diagonal_K = h_KK.diagonal()
    live_K = diagonal_K > 0
    mean = diagonal_K[live_K].mean() if live_K.any() else diagonal_K.new_ones(())
    diagonal_K[~live_K] = mean
    diagonal_K += damping * mean
    lower_KK, failed = torch.linalg.cholesky_ex(h_KK)
    if failed:
        raise ValueError(f"the Hessian with a damping of {damping} is not positive definite: damp it more")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True)


def gptq_block(block: nn.Module, inputs: list[Inputs], scheme: Scheme) -> str:
    """GPTQ of each layer of a block: see layerwise.fill_block."""

    def quantize(weight_NK: Tensor, group: int, read: Inputs) -> QuantizedWeight:
        bits, order, zeros = BITS[scheme.method], scheme.order, scheme.zeros
        return gptq(weight_NK, read.hessian, bits=bits, group=group, act_order=order, asymmetric=zeros)

    return fill_block(block, inputs, scheme, quantize)
