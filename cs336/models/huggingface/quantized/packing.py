"""Whole numbers of 4 or 8 bits side by side in int32, the first in the lowest bits."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(u: Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Numbers from 0 to 2^bits - 1 -> int32, 32 / bits of them a word along a dim, which is padded with 0.

    order: which of a word's numbers stand there in turn, if not the first, the second and so on.
    """
    many = 32 // bits
    u = u.to(torch.int64).movedim(dim, -1)
    words = torch.nn.functional.pad(u, (0, -u.shape[-1] % many)).unflatten(-1, (-1, many))
    words = words if order is None else words[..., list(order)]
    word = (words << bits * torch.arange(many, device=u.device)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).movedim(-1, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int, size: int, order: Sequence[int] | None = None) -> Tensor:
    """What `pack` was given: int16, `size` numbers along a dim."""
    many = 32 // bits
    shifts = bits * torch.arange(many, device=words.device, dtype=torch.int32)
    u = (words.movedim(dim, -1)[..., None] >> shifts) & (2**bits - 1)
    if order is not None:
        u = u[..., torch.tensor(order, device=u.device).argsort()]
    return u.flatten(-2)[..., :size].to(torch.int16).movedim(-1, dim)
