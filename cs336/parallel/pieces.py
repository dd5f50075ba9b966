"""Part of a tensor that is split among ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements start, start + 1, ... of a flattened tensor."""

    tensor: Tensor
    """(n,)"""
    shape: torch.Size
    """Of the whole tensor."""
    start: int


def chunk(numel: int, ranks: int) -> int:
    """Elements of all but the last pieces of a tensor that is split evenly."""
    return -(-numel // ranks)


def bounds(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """The piece of a rank, from and up to; it may be empty."""
    size = chunk(numel, ranks)
    return min(rank * size, numel), min((rank + 1) * size, numel)
