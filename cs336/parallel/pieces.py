"""Parts of a tensor that is split among ranks, and the tensor put together again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The `index`-th of `parts` equal parts of a tensor, along dim."""

    dim: int
    index: int
    parts: int

    def of(self, whole: Tensor) -> Tensor:
        """That part: a view."""
        return whole.chunk(self.parts, self.dim)[self.index]


WHOLE = Cut(0, 0, 1)


@dataclass(frozen=True)
class Piece:
    """Elements start, start + 1, ... of a tensor, or of a cut of it, flattened."""

    tensor: Tensor
    """(n,)"""
    shape: torch.Size
    """Of the whole tensor."""
    start: int
    cut: Cut = WHOLE


def assembled(pieces: Sequence[Piece]) -> Tensor:
    """The whole tensor. Raises ValueError for pieces that leave a gap, or overlap."""
    cuts = sorted({piece.cut for piece in pieces}, key=lambda cut: cut.index)
    if cuts != [Cut(cuts[0].dim, i, len(cuts)) for i in range(len(cuts))]:
        raise ValueError("the parts of a tensor do not make it whole")
    size = list(pieces[0].shape)
    if len(cuts) > 1:
        size[cuts[0].dim] //= len(cuts)
    parts = [_joined([p for p in pieces if p.cut == cut], torch.Size(size)) for cut in cuts]
    return torch.cat(parts, cuts[0].dim) if len(parts) > 1 else parts[0]


def _joined(pieces: Sequence[Piece], size: torch.Size) -> Tensor:
    """A cut of a tensor."""
    pieces = sorted((p for p in pieces if p.tensor.numel()), key=lambda p: p.start) or pieces[:1]
    ends = [0, *(p.start + p.tensor.numel() for p in pieces)]
    if [p.start for p in pieces] != ends[:-1] or ends[-1] != size.numel():
        raise ValueError("the pieces of a tensor do not make it whole")
    return (torch.cat([p.tensor for p in pieces]) if len(pieces) > 1 else pieces[0].tensor).view(size)


def chunk(numel: int, ranks: int) -> int:
    """Elements of all but the last pieces of a tensor that is split evenly."""
    return -(-numel // ranks)


def bounds(numel: int, ranks: int, rank: int) -> tuple[int, int]:
    """The piece of a rank, from and up to; it may be empty."""
    size = chunk(numel, ranks)
    return min(rank * size, numel), min((rank + 1) * size, numel)
