"""Weights in groups of whole numbers, and y = x w^T + b of them, in plain torch with fp32 inside.

w[n, k] = (q[n, k] - zeros[n, k // group]) * scales[n, k // group], without zeros q * scale. int8: q from -128 to 127, a
byte each. fp8: float8_e4m3fn, without zeros. int4: q from -8 to 7, kept as q + 8, two in a byte: the lower half is that
of the even k. constant is for kernels.

M = rows, K = in_features, N = out_features, G = groups of a row: ceil(K / group).
"""

import torch
from torch import Tensor

from cs336.ops.ref.linear_few_rows import linear_few_rows


def dequantize_int8(q_NK: Tensor, scales_NG: Tensor, group: int, zeros_NG: Tensor | None = None) -> Tensor:
    """The weights (N, K), float32 or as wide as the scales."""
    K, wide = q_NK.shape[1], torch.promote_types(scales_NG.dtype, torch.float32)
    group = min(group, K)
    w_NK = q_NK.to(wide)
    if zeros_NG is not None:
        w_NK = w_NK - zeros_NG.to(wide).repeat_interleave(group, 1)[:, :K]
    return w_NK * scales_NG.to(wide).repeat_interleave(group, 1)[:, :K]


def dequantize_int4(packed_NJ: Tensor, scales_NG: Tensor, group: int, zeros_NG: Tensor | None = None) -> Tensor:
    """packed (N, K / 2) uint8 -> the weights (N, K), float32 or as wide as the scales."""
    return dequantize_int8(unpack_int4(packed_NJ), scales_NG, group, zeros_NG)


def dequantize_fp8(q_NK: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """The weights (N, K), float32 or as wide as the scales."""
    return dequantize_int8(q_NK, scales_NG, group)


def pack_int4(q_NK: Tensor) -> Tensor:
    """q (N, K) int8 from -8 to 7, K even -> (N, K / 2) uint8."""
    low, high = (q_NK + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack_int4(packed_NJ: Tensor) -> Tensor:
    """packed (N, K / 2) uint8 -> q (N, K) int8."""
    return torch.stack((packed_NJ & 15, packed_NJ >> 4), -1).flatten(1).to(torch.int8) - 8


def linear_int8(
    x_MK: Tensor, q_NK: Tensor, scales_NG, b_N: Tensor | None, group: int, zeros_NG=None, constant=False
) -> Tensor:
    return linear_few_rows(x_MK, dequantize_int8(q_NK, scales_NG, group, zeros_NG), b_N)


def linear_int4(
    x_MK: Tensor, packed_NJ: Tensor, scales_NG, b_N: Tensor | None, group: int, zeros_NG=None, constant=False
) -> Tensor:
    return linear_few_rows(x_MK, dequantize_int4(packed_NJ, scales_NG, group, zeros_NG), b_N)


def linear_fp8(x_MK: Tensor, q_NK: Tensor, scales_NG, b_N: Tensor | None, group: int, constant=False) -> Tensor:
    return linear_few_rows(x_MK, dequantize_fp8(q_NK, scales_NG, group), b_N)
