from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_positive
from cs336.nn.embedding import look_up
from cs336.ops import rope_tables


class RotaryEmbedding(nn.Module):
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864: pair i turns by position * theta^(-2i / head_dim).

    Pairs are (x[i], x[i + head_dim / 2]), or neighbours when interleaved. The tables cos and sin
    (max_seq_len, head_dim / 2) are float32 whatever the model's dtype, and derived, so no part of its state.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        theta: float = 10000.0,
        *,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even to rotate pairs, got {head_dim}")
        self.head_dim, self.max_seq_len, self.theta, self.interleaved = head_dim, max_seq_len, theta, interleaved
        for name in ("cos", "sin"):
            table = torch.empty(max_seq_len, head_dim // 2, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        frequencies = rope_tables.inverse_frequencies(self.head_dim, self.theta)
        self.cos, self.sin = rope_tables.tables(frequencies, self.max_seq_len, device=self.cos.device)

    def _apply(self, fn, recurse=True):
        """On another device derive the tables anew: no cast rounds them, and to_empty leaves no garbage in them."""
        device = fn(torch.empty(0, device=self.cos.device)).device
        if device != self.cos.device:
            self.cos = torch.empty_like(self.cos, device=device)
            self.sin = torch.empty_like(self.sin, device=device)
            self.reset_parameters()
        return self

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate x by the positions of its rows.

        x: (..., S, head_dim).
        positions: (..., S) int64 or int32 in [0, max_seq_len), 0 to S - 1 if None; its leading dims are x's first
            ones or 1, so that (B, S) fits x (B, S, D) and x (B, H, S, D).

        Returns a tensor like x.
        Raises ValueError for shapes or dtypes that do not fit, IndexError for positions outside the tables.
        """
        return ops.rope(x, *self._tables(x, positions), interleaved=self.interleaved)

    def rotate_qk(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` of q (..., Hq, S, head_dim) and of k (..., Hkv, S, head_dim), which heads share: in one launch on a
        GPU where these have four dims."""
        if q.dim() != 4 or (positions is not None and positions.dim() > 2):
            return self(q, positions), self(k, positions)
        return ops.rope_qk(q, k, *self._tables(q, positions), interleaved=self.interleaved)

    def _tables(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin of x's rows, broadcastable to x."""
        if x.dim() < 2 or x.shape[-1] != self.head_dim:
            raise ValueError(f"x must be (..., S, {self.head_dim}), got shape {tuple(x.shape)}")
        S = x.shape[-2]
        if positions is None:
            if self.max_seq_len < S:
                raise ValueError(f"x has {S} positions, the tables have {self.max_seq_len}: raise max_seq_len")
            return self.cos[:S], self.sin[:S]
        lead = positions.shape[:-1]
        fits = len(lead) <= x.dim() - 2 and all(p in (1, n) for p, n in zip(lead, x.shape[:-2], strict=False))
        if positions.shape[-1:] != (S,) or not fits:
            raise ValueError(f"positions must be (..., {S}) to fit x {tuple(x.shape)}, got {tuple(positions.shape)}")
        if lead:
            positions = positions.view(*lead, *[1] * (x.dim() - 2 - len(lead)), S)
        cos, sin = (look_up(table, positions, "positions") for table in (self.cos, self.sin))
        return cos, sin

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.max_seq_len}, theta={self.theta}, interleaved={self.interleaved}"


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10000.0
    interleaved: bool = False
    """Rotate neighbouring features, as arXiv:2104.09864 does, instead of the two halves of a head."""
    kind: Literal["rope"] = "rope"

    def __post_init__(self):
        check_positive(theta=self.theta)

    def check(self, head_dim: int) -> None:
        if head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")

    def build(self, head_dim: int, max_seq_len: int, *, device=None) -> RotaryEmbedding:
        return RotaryEmbedding(head_dim, max_seq_len, self.theta, interleaved=self.interleaved, device=device)


@dataclass(frozen=True)
class NoPositionsConfig:
    """Order is known from causality alone (arXiv:2305.19466)."""

    kind: Literal["none"] = "none"

    def check(self, head_dim: int) -> None:
        """Any head will do."""

    def build(self, head_dim: int, max_seq_len: int, *, device=None) -> None:
        return None
