"""Depthwise causal convolution.  y[t, c] = bias[c] + sum_k weight[c, K - 1 - k] x[t - k, c]      k = 0 to K - 1

The short convolution of Mamba (arXiv:2312.00752), in plain torch, which inductor makes one pass of. Bytes that must
move: x and y once; 2 K FLOPs an element: memory-bound on every device. B = batch, S = tokens, C = channels, K = taps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cs336.ops.ref.wide import wide


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSC, weight_CK, bias_C, segments_BS):
        ctx.save_for_backward(x_BSC, weight_CK, segments_BS)
        ctx.bias_dtype = None if bias_C is None else bias_C.dtype
        y_BSC = torch.zeros_like(wide(x_BSC)) if bias_C is None else wide(bias_C).expand(x_BSC.shape).clone()
        for k, tap_C, seen in _taps(x_BSC, weight_CK, segments_BS):
            y_BSC[:, k:] += _seen(wide(x_BSC[:, : x_BSC.shape[1] - k]), seen) * tap_C
        return y_BSC.to(x_BSC.dtype)

    @staticmethod
    def backward(ctx, dy_BSC):
        x_BSC, weight_CK, segments_BS = ctx.saved_tensors
        dy_BSC, S = wide(dy_BSC), x_BSC.shape[1]
        dx_BSC, dtaps = torch.zeros_like(dy_BSC), []
        for k, tap_C, seen in _taps(x_BSC, weight_CK, segments_BS):
            part = _seen(dy_BSC[:, k:], seen)
            dx_BSC = dx_BSC + torch.nn.functional.pad(part * tap_C, (0, 0, 0, k))
            dtaps.append((part * _seen(wide(x_BSC[:, : S - k]), seen)).sum((0, 1)))
        dtaps += [torch.zeros_like(dtaps[0])] * (weight_CK.shape[1] - len(dtaps))  # taps that reach before the first
        dweight_CK = torch.stack(dtaps[::-1], -1).to(weight_CK.dtype)
        dbias = None if ctx.bias_dtype is None else dy_BSC.sum((0, 1)).to(ctx.bias_dtype)
        return dx_BSC.to(x_BSC.dtype), dweight_CK, dbias, None


def _seen(values_BSC: Tensor, seen: Tensor | None) -> Tensor:
    """Zeros where another segment stands: a product with zero would let its NaN through."""
    return values_BSC if seen is None else torch.where(seen, values_BSC, 0)


def _taps(x_BSC: Tensor, weight_CK: Tensor, segments_BS: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Of each shift k: its weights (C,), and which tokens, from the k-th on, see the one k before them."""
    K, S = weight_CK.shape[1], x_BSC.shape[1]
    for k in range(min(K, max(S, 1))):
        seen = None
        if segments_BS is not None and k:
            seen = (segments_BS[:, k:] == segments_BS[:, : S - k])[..., None]
        yield k, wide(weight_CK[:, K - 1 - k]), seen


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own K taps, over a token and those before it, in fp32 (fp64 for fp64).

    Args:
        x: (B, S, C) floating point; before the first token stand zeros.
        weight: (C, K), floating point; the last tap is the token's own.
        bias: (C,) or None.
        segments: (B, S) integers, equal ones side by side: a tap that reaches into another segment gives 0.

    Returns y like x. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, S, C), floating point, got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"weight must be ({x.shape[2]}, K) to fit x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias must be ({x.shape[2]},), got {tuple(bias.shape)}")
    if segments is not None and segments.shape != x.shape[:2]:
        raise ValueError(f"segments must be {tuple(x.shape[:2])} to fit x, got {tuple(segments.shape)}")
    return _Conv.apply(x, weight, bias, segments)
