"""Dropout by a counter in plain torch, any device: the bits that the kernels make, in int64."""

import torch
from torch import Tensor

from cs336.ops.ref.wide import narrow, wide

LOW = 0xFFFFFFFF
MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


def fwd(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    y = torch.where(words(x.numel(), seed).view(x.shape) >= threshold(p), wide(x) * (1 / (1 - p)), 0.0)
    return narrow(y if residual is None else y + wide(residual), x)


def threshold(p: float) -> int:
    """Words below it are dropped: p of 2^32."""
    return min(round(p * 2**32), LOW)


def words(count: int, seed: Tensor) -> Tensor:
    """Philox-4x32-10 (Salmon et al. 2011) of the counters 0, 1, ..., four words each: (count,) int64 in [0, 2^32)."""
    counter = torch.arange(-(-count // 4), device=seed.device)
    state = [counter & LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(MULTIPLIERS[0], state[0]), _product(MULTIPLIERS[1], state[2])
        state = [high1 ^ state[1] ^ key[0], low1, high0 ^ state[3] ^ key[1], low0]
        key = [(k + w) & LOW for k, w in zip(key, WEYL, strict=True)]
    return torch.stack(state, -1).view(-1)[:count]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and lower 32 bits of a b; int64 holds what 16 of b's make."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16, (a * b) & LOW
