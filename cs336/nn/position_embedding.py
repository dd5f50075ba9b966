"""Absolute positions, added to the embedding of the tokens.   x_t = embedding[token_t] + table[position_t]

S = tokens, M = d_model, T = context length.
"""

import torch
from torch import Tensor, nn

from cs336.nn.derived import Derived
from cs336.ops.ref.embedding import look_up


class LearnedPositions(nn.Module):
    """A row of weight (max_len, d_model), which is learned, for each position: GPT-2's.

    positions (..., S) int64 or int32 in [0, max_len) -> (..., S, d_model). Errors: see look_up.
    """

    def __init__(
        self,
        max_len: int,
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        return look_up(self.weight, positions, "positions")


class SinusoidalPositions(Derived):
    """Vaswani et al. 2017, arXiv:1706.03762: features 2i and 2i + 1 are sin and cos of position / 10000^(2i / d_model).

    positions (..., S) int64 or int32 in [0, max_len) -> (..., S, d_model) float32. The table is no part of the state.
    Raises ValueError for an odd d_model.
    """

    table: Tensor

    def __init__(self, max_len: int, d_model: int, *, device: torch.device | str | None = None):
        super().__init__()
        if d_model % 2 != 0:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {d_model}")
        self.register_buffer("table", torch.empty(max_len, d_model, device=device), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        T, M = self.table.shape
        rates = 10000.0 ** (-torch.arange(0, M, 2, dtype=torch.float64, device="cpu") / M)
        angles = torch.outer(torch.arange(T, dtype=torch.float64, device="cpu"), rates)
        self.table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(self.table.device, torch.float32)

    def forward(self, positions: Tensor) -> Tensor:
        return look_up(self.table, positions, "positions")
