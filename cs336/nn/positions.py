from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cs336 import ops
from cs336.nn.checks import check_flags, check_kind, check_positive
from cs336.nn.derived import Derived
from cs336.nn.rope_scaling import LongRopeScaling, RopeScaling
from cs336.ops import rope_tables
from cs336.ops.ref.embedding import look_up


class RotaryEmbedding(Derived):
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864: pair i turns by position * theta^(-2i / rotary_dim).

    Pairs are (x[i], x[i + rotary_dim / 2]), or neighbours when interleaved, of the first rotary_dim features (all of
    head_dim if None); the others pass. The tables cos and sin (max_seq_len, rotary_dim / 2) are float32 whatever the
    model's dtype, and derived, so no part of its state. scaling stretches them: see nn/rope_scaling.py.
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
        rotary_dim: int | None = None,
        scaling: RopeScaling | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even to rotate pairs, got {head_dim}")
        self.head_dim, self.max_seq_len, self.theta, self.interleaved = head_dim, max_seq_len, theta, interleaved
        self.rotary_dim, self.scaling = head_dim if rotary_dim is None else rotary_dim, scaling
        if self.rotary_dim % 2 != 0 or not 2 <= self.rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim must be even and from 2 to head_dim {head_dim}, got {rotary_dim}")
        for name in ("cos", "sin"):
            table = torch.empty(max_seq_len, self.rotary_dim // 2, device=device, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        frequencies, scale = rope_tables.inverse_frequencies(self.rotary_dim, self.theta), 1.0
        if self.scaling is not None:
            frequencies, scale = self.scaling.frequencies(self.rotary_dim, self.theta, self.max_seq_len)
        self.cos, self.sin = rope_tables.tables(frequencies, self.max_seq_len, scale, device=self.cos.device)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate x by the positions of its rows.

        x: (..., S, head_dim).
        positions: (..., S) int64 or int32 in [0, max_seq_len), 0 to S - 1 if None; its leading dims are x's first
            ones or 1, so that (B, S) fits x (B, S, D) and x (B, H, S, D).

        Returns a tensor like x.
        Raises ValueError for shapes or dtypes that do not fit, IndexError for positions outside the tables.
        """
        tables = self._tables(x, positions)
        turned = ops.rope(x[..., : self.rotary_dim], *tables, interleaved=self.interleaved)
        return self._with_rest(turned, x)

    def rotate_qk(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`forward` of q (..., Hq, S, head_dim) and of k (..., Hkv, S, head_dim), which heads share: in one launch on a
        GPU where these have four dims."""
        if q.dim() != 4 or (positions is not None and positions.dim() > 2):
            return self(q, positions), self(k, positions)
        r = self.rotary_dim
        if q.is_cuda and positions is not None and positions.shape == (q.shape[0], q.shape[2]):
            tables, rows = (self.cos, self.sin), positions  # the kernel looks the rows up itself
        else:
            tables, rows = self._tables(q, positions), None
        q_turned, k_turned = ops.rope_qk(q[..., :r], k[..., :r], *tables, positions=rows, interleaved=self.interleaved)
        return self._with_rest(q_turned, q), self._with_rest(k_turned, k)

    def _with_rest(self, turned: Tensor, x: Tensor) -> Tensor:
        r = self.rotary_dim
        return turned if r == self.head_dim else torch.cat((turned, x[..., r:]), -1)

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
        return (
            f"{self.head_dim}, {self.max_seq_len}, theta={self.theta}, interleaved={self.interleaved}, "
            f"rotary_dim={self.rotary_dim}, scaling={self.scaling}"
        )


@dataclass(frozen=True)
class RopeConfig:
    theta: float = 10000.0
    """Base of the wavelengths: pair i of D features turns by theta^(-2i / D) radians a token."""
    interleaved: bool = False
    """Rotate neighbouring features, as arXiv:2104.09864 does, instead of the two halves of a head."""
    fraction: float = 1.0
    """How much of a head is rotated, its first features, and the rest left as it is: GPT-NeoX's, arXiv:2204.06745."""
    scaling: RopeScaling | None = None
    """To a longer context: linear, ntk, yarn, llama3 or longrope."""
    kind: Literal["rope"] = "rope"

    def __post_init__(self):
        check_positive(theta=self.theta, fraction=self.fraction)
        check_flags(interleaved=self.interleaved)
        check_kind("scaling", self.scaling, *get_args(get_args(RopeScaling)[0]), optional=True)
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, got {self.fraction}")

    def rotary_dim(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)

    def check(self, head_dim: int) -> None:
        if head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
        if self.rotary_dim(head_dim) < 2 or self.rotary_dim(head_dim) % 2 != 0:
            raise ValueError(
                f"fraction {self.fraction} of head_dim {head_dim} rotates {self.rotary_dim(head_dim)} features: "
                "they must be an even number, at least 2"
            )
        if isinstance(self.scaling, LongRopeScaling):
            self.scaling.check(self.rotary_dim(head_dim))

    def build(self, head_dim: int, max_seq_len: int, *, device=None) -> RotaryEmbedding:
        return RotaryEmbedding(
            head_dim,
            max_seq_len,
            self.theta,
            interleaved=self.interleaved,
            rotary_dim=self.rotary_dim(head_dim),
            scaling=self.scaling,
            device=device,
        )


class _Unrotated:
    def check(self, head_dim: int) -> None:
        """Any head will do."""

    def build(self, head_dim: int, max_seq_len: int, *, device=None) -> None:
        return None


@dataclass(frozen=True)
class NoPositionsConfig(_Unrotated):
    """Order is known from causality alone (arXiv:2305.19466)."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class AlibiConfig(_Unrotated):
    """Attention with linear biases, arXiv:2108.12409: each head takes its slope times the distance in tokens off the
    scores. It counts tokens, whatever positions a forward pass is told."""

    kind: Literal["alibi"] = "alibi"


class AlibiSlopes(Derived):
    """slopes (num_heads,) float32: 2^(-8 (h + 1) / num_heads) of head h where num_heads is a power of two; else those
    of the power below, then every other one of the power above, as the paper does."""

    slopes: Tensor

    def __init__(self, num_heads: int, *, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("slopes", torch.empty(num_heads, device=device), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        H = len(self.slopes)
        power = 1 << (H.bit_length() - 1)
        exponents = [(h + 1) / power for h in range(power)] + [(h + 0.5) / power for h in range(H - power)]
        self.slopes = torch.tensor([2.0 ** (-8 * e) for e in exponents], dtype=torch.float32).to(self.slopes.device)

    def bias(self, seen_B1ST: Tensor, behind_BST: Tensor) -> Tensor:
        """What is added to scores, (B, H, S, T) float32, where each key stands `behind` its query by so many tokens;
        -inf where it is not seen."""
        return (-self.slopes[:, None, None] * behind_BST[:, None].abs()).masked_fill(~seen_B1ST, -torch.inf)
