"""Weights in groups of whole numbers, and y = x w^T + b of them, in plain torch with fp32 inside.

w[n, k] = q[n, k] * scales[n, k // group]. int8: q from -128 to 127, a byte each. int4: q from -8 to 7, kept as q + 8,
two in a byte: the lower half is that of the even k.

M = rows, K = in_features, N = out_features, G = groups of a row: ceil(K / group).
"""

import torch
from torch import Tensor


def dequantize_int8(q_NK: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """The weights (N, K), float32 or as wide as the scales."""
    wide = torch.promote_types(scales_NG.dtype, torch.float32)
    return q_NK.to(wide) * scales_NG.to(wide).repeat_interleave(group, 1)[:, : q_NK.shape[1]]


def dequantize_int4(packed_NJ: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """packed (N, K / 2) uint8 -> the weights (N, K), float32 or as wide as the scales."""
    q_NK = torch.stack((packed_NJ & 15, packed_NJ >> 4), -1).flatten(1).to(torch.int8) - 8
    return dequantize_int8(q_NK, scales_NG, group)


def linear_int8(x_MK: Tensor, q_NK: Tensor, scales_NG: Tensor, b_N: Tensor | None, group: int) -> Tensor:
    return _linear(x_MK, dequantize_int8(q_NK, scales_NG, group), b_N)


def linear_int4(x_MK: Tensor, packed_NJ: Tensor, scales_NG: Tensor, b_N: Tensor | None, group: int) -> Tensor:
    return _linear(x_MK, dequantize_int4(packed_NJ, scales_NG, group), b_N)


def _linear(x_MK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    y_MN = x_MK.to(wide) @ w_NK.to(wide).t()
    return (y_MN if b_N is None else y_MN + b_N.to(wide)).to(x_MK.dtype)
