"""Causal convolution with a filter as long as the text, by the FFT.  y[t, c] = sum_j filter[j, c] x[t - j, c]

Hyena's operator (arXiv:2302.10866): O(T log T), three transforms of 2 T points a channel. In plain torch, in fp32.
B = batch, T = tokens, L = taps, C = channels.
"""

import torch
from torch import Tensor

from cs336.ops.dispatch import recomputed
from cs336.ops.ref.wide import wide


def long_conv(x: Tensor, filter: Tensor, segments: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own filter, over a token and those before it.

    Args:
        x: (B, T, C) floating point.
        filter: (L, C) floating point, the token's own tap first, L >= 1 unless T is 0; what is further back than L - 1
            tokens does not count.
        segments: (B, T) integers, equal ones side by side: tokens with different ones are strangers. How many there
            are, the host waits for.

    Returns y like x; the spectra are computed again in the backward. A token's bits depend on later ones, by rounding.
    Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, T, C), floating point, got {tuple(x.shape)} {x.dtype}")
    if filter.dim() != 2 or filter.shape[1] != x.shape[2] or (filter.shape[0] == 0 and x.shape[1] != 0):
        raise ValueError(f"filter must be (L, {x.shape[2]}) to fit x {tuple(x.shape)}, got {tuple(filter.shape)}")
    if segments is not None and segments.shape != x.shape[:2]:
        raise ValueError(f"segments must be {tuple(x.shape[:2])} to fit x, got {tuple(segments.shape)}")
    return recomputed(_long_conv, x, filter, segments) if x.numel() else x.clone()


def _long_conv(x_BTC: Tensor, filter_LC: Tensor, segments_BT: Tensor | None) -> Tensor:
    if segments_BT is None:
        return _by_fft(wide(x_BTC), wide(filter_LC)).to(x_BTC.dtype)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT.diff() != 0
    document = starts_BT.flatten().cumsum(0) - 1
    first = starts_BT.flatten().nonzero()[:, 0]
    column = torch.arange(len(document), device=document.device) - first[document]
    x_NTC = wide(x_BTC).new_zeros(len(first), int(column.max()) + 1, x_BTC.shape[2])
    x_NTC = x_NTC.index_put((document, column), wide(x_BTC).flatten(0, 1))
    return _by_fft(x_NTC, wide(filter_LC))[document, column].view(x_BTC.shape).to(x_BTC.dtype)


def _by_fft(x_BTC: Tensor, filter_LC: Tensor) -> Tensor:
    T = x_BTC.shape[1]
    filter_LC = filter_LC[:T]
    size = 1 << (T + len(filter_LC) - 2).bit_length()  # no less than T + L - 1: nothing wraps around
    spectrum = torch.fft.rfft(x_BTC, size, dim=1) * torch.fft.rfft(filter_LC, size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :T]
