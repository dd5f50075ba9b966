"""Activations of an MLP in plain torch, fp32 inside, any device; gated by `up` if there is one."""

import math

import torch
from torch import Tensor

from cs336.ops.ref.wide import wide


def fwd(x: Tensor, up: Tensor | None, kind: int) -> Tensor:
    y = _ACTIVATIONS[kind](wide(x))[0]
    return (y if up is None else y * wide(up)).to(x.dtype)


def bwd(x: Tensor, up: Tensor | None, dy: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """dx, and dup: empty without up."""
    y, slope = _ACTIVATIONS[kind](wide(x))
    dx = slope * wide(dy) if up is None else slope * wide(dy) * wide(up)
    return dx.to(x.dtype), x.new_empty(0) if up is None else (y * wide(dy)).to(x.dtype)


def gated_bwd(both: Tensor, dy: Tensor, kind: int) -> Tensor:
    """Of x and up side by side, (M, 2N), as their gradients are."""
    x, up = both.chunk(2, -1)
    return torch.cat(bwd(x, up, dy, kind), -1)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x sigmoid(x), arXiv:1606.08415; and its derivative, as all of these."""
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x), arXiv:1606.08415"""
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)"""
    s = torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return x * s, s + x * s * (1 - s) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x.square())


def _relu2(x: Tensor) -> tuple[Tensor, Tensor]:
    """max(x, 0)^2, arXiv:2109.08668"""
    r = torch.relu(x)
    return r.square(), 2 * r


_ACTIVATIONS = (_silu, _gelu, _gelu_tanh, _relu2)
