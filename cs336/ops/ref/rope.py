"""Rotary embedding in plain torch, fp32 inside (fp64 for float64), any device."""

import torch
from torch import Tensor

from cs336.ops.ref.embedding import look_up


def fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., D); cos and sin (..., P) broadcast. The first 2 P features turn, the others are copied."""
    pairs = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        x1, x2 = wide[..., 0 : 2 * pairs : 2], wide[..., 1 : 2 * pairs : 2]
        y = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)
    else:
        whole = 2 * pairs == x.shape[-1]  # two slices would be slower to differentiate
        x1, x2 = (wide if whole else wide[..., : 2 * pairs]).chunk(2, -1)
        y = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
    return torch.cat((y.to(x.dtype), x[..., 2 * pairs :]), -1) if 2 * pairs < x.shape[-1] else y.to(x.dtype)


def at(table: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of a table (L, P) at positions (1 or B, S), or a table (1 or B, S, P): (1 or B, 1, S, P)."""
    return (table if positions is None else look_up(table, positions, "positions"))[:, None]


def many(
    xs: list[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> list[Tensor]:
    """Each x (B, H, S, D); inverse turns back."""
    cos, sin = at(cos, positions), at(sin, positions)
    return [torch.empty_like(x).copy_(fwd(x, cos, -sin if inverse else sin, interleaved)) for x in xs]
