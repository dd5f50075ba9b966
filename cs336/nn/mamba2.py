"""Mamba-2, a state space with one decay a head, Dao & Gu 2024, arXiv:2405.21060.

    z, xBC, dt = W x        x, B, C = silu(conv(xBC))        dt = softplus(dt + dt_bias)
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t
    out = W_o norm(y * silu(z))                                          over the features of each group

Which is linear attention with q = C, k = B and v = dt x, so that ops.linear_attention runs it. Parameter names are the
reference implementation's. B = batch, S = tokens, M = d_model, I = inner features, H = heads, P = features of a head,
G = groups of heads that share B and C, N = features of the state.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts, check_tokens
from cs336.nn.linear import Linear
from cs336.nn.linear_attention import draw_decay
from cs336.nn.norms import RMSNorm
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.recent import Snapshots
from cs336.nn.recurrence import CausalConv1d, RecurrentState, is_step, recur
from cs336.nn.state import Context, place_of


class Mamba2(nn.Module):
    """x (B, S, d_model) -> like x. The arguments are Mamba2Config's."""

    def __init__(self, d_model: int, config: "Mamba2Config", *, norm_eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.d_model, self.config = d_model, config
        inner, H = config.inner_size(d_model), config.num_heads(d_model)
        self.in_proj = Linear(d_model, inner + config.conv_channels(d_model) + H, **place)
        self.conv1d = CausalConv1d(config.conv_channels(d_model), config.conv_size, **place)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(H, **place)) for _ in range(3))
        self.norm = RMSNorm(inner, norm_eps, **place)
        self.out_proj = Linear(inner, d_model, **place)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """The start of what is no matrix and no norm: the decays, D and the convolution."""
        draw_decay(self.A_log, self.dt_bias)
        self.D.fill_(1)
        self.conv1d.reset_parameters()

    def new_state(self, batch_size: int, max_len: int, *, rollback: int = 0, device=None, dtype=None) -> RecurrentState:
        """The same size whatever max_len is; device and dtype are the weights' if None."""
        config, place = self.config, place_of(self.in_proj.weight, device, dtype) | {"rollback": rollback}
        memory = Snapshots.allocate(
            batch_size, config.num_heads(self.d_model), config.state_dim, config.head_dim, **place
        )
        return RecurrentState(memory, self.conv1d.new_state(batch_size, **place))

    def forward(self, x_BSM: Tensor, context: Context | None = None, state: RecurrentState | None = None) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model). context: segments keep documents apart; with a state its lengths."""
        check_tokens(x_BSM, self.d_model)
        context = Context() if context is None else context
        if state is not None and is_step(x_BSM, context, state):
            return self._step(x_BSM[:, 0], context, state)[:, None]
        config, inner = self.config, self.config.inner_size(self.d_model)
        H, G, N = config.num_heads(self.d_model), config.num_groups, config.state_dim
        stat = torch.promote_types(x_BSM.dtype, torch.float32)
        z_BSI, xBC, dt_BSH = self.in_proj(x_BSM).split((inner, config.conv_channels(self.d_model), H), -1)
        xBC = F.silu(self.conv1d(xBC, context, None if state is None else state.conv))
        u_BSI, b, c = xBC.split((inner, G * N, G * N), -1)
        u_BSHP = u_BSI.unflatten(-1, (H, -1))
        dt_BSH = F.softplus(dt_BSH.to(stat) + self.dt_bias.to(stat))
        v_BSHP = (u_BSHP * dt_BSH[..., None]).to(u_BSI.dtype)
        tokens = {
            "q": c.unflatten(-1, (G, N)).transpose(1, 2),
            "k": b.unflatten(-1, (G, N)).transpose(1, 2),
            "v": v_BSHP.transpose(1, 2),
            "g": (dt_BSH * -torch.exp(self.A_log.to(stat))).transpose(1, 2),
        }
        o_BHSP = recur(_unscaled, tokens, context, None if state is None else state.memory)
        y_BSHP = o_BHSP.transpose(1, 2) + u_BSHP * self.D.to(u_BSI.dtype)[:, None]
        return self.out_proj(self._normed(y_BSHP.flatten(-2) * F.silu(z_BSI)))

    def _step(self, x_BM: Tensor, context: Context, state: RecurrentState) -> Tensor:
        """One token more of each row, in few launches."""
        config, inner = self.config, self.config.inner_size(self.d_model)
        H, G, N = config.num_heads(self.d_model), config.num_groups, config.state_dim
        z_BI, xBC, dt_BH = self.in_proj(x_BM).split((inner, config.conv_channels(self.d_model), H), -1)
        assert state.conv is not None
        assert context.lengths is not None
        u_BI, b, c = self.conv1d.step(xBC, context, state.conv).split((inner, G * N, G * N), -1)
        k_BGN, q_BGN = (x.unflatten(-1, (G, N)) for x in (b, c))
        u_BHP, z_BHP = (x.unflatten(-1, (H, -1)) for x in (u_BI, z_BI))
        where = context.lengths, context.rows
        options: dict[str, Any] = {
            "g": dt_BH,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "D": self.D,
            "gate": z_BHP,
            "scale": 1.0,
        }
        y_BHP = ops.recurrent_step_(state.memory.states, q_BGN, k_BGN, u_BHP, *where, **options)
        return self.out_proj(self._normed(y_BHP.flatten(-2)))

    def _normed(self, y_BSI: Tensor) -> Tensor:
        """Each group's features by themselves."""
        if self.config.num_groups == 1:
            return self.norm(y_BSI)
        y_BSGI = y_BSI.unflatten(-1, (self.config.num_groups, -1))
        normed = ops.rms_norm(y_BSGI, y_BSI.new_ones(y_BSGI.shape[-1]), self.norm.eps)
        assert isinstance(normed, Tensor)
        return normed.flatten(-2) * self.norm.weight.to(y_BSI.dtype)


def _unscaled(**tokens):
    return ops.linear_attention(**tokens, scale=1.0)


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2: see Mamba2. Its state is of one size whatever the length of the text."""

    state_dim: int = 128
    """Features of the state: of B and C."""
    head_dim: int = 64
    """Features of a head; there are expand * d_model / head_dim heads."""
    expand: int = 2
    """Inner features are expand * d_model, a multiple of head_dim."""
    num_groups: int = 1
    """Of heads that share B and C; each is normed by itself."""
    conv_size: int = 4
    """Taps of the causal convolution."""
    kind: Literal["mamba2"] = "mamba2"
    takes_positions: ClassVar[tuple[str, ...]] = ("none",)

    def __post_init__(self):
        check_counts(state_dim=self.state_dim, head_dim=self.head_dim, expand=self.expand)
        check_counts(num_groups=self.num_groups, conv_size=self.conv_size)
        if self.conv_size == 1:
            raise ValueError("conv_size must be 2 or more: a convolution of 1 sees no other token")

    def inner_size(self, d_model: int) -> int:
        return self.expand * d_model

    def num_heads(self, d_model: int) -> int:
        """Raises ValueError where the inner features are no whole heads, or these no whole groups."""
        inner = self.inner_size(d_model)
        if inner % self.head_dim != 0:
            raise ValueError(f"expand * d_model = {inner} is not a multiple of head_dim {self.head_dim}")
        if inner // self.head_dim % self.num_groups != 0:
            raise ValueError(f"{inner // self.head_dim} heads are not a multiple of num_groups {self.num_groups}")
        return inner // self.head_dim

    def conv_channels(self, d_model: int) -> int:
        return self.inner_size(d_model) + 2 * self.num_groups * self.state_dim

    def rope_dim(self, d_model: int) -> int:
        """Order is known from the recurrence: no feature is rotated. Raises ValueError for heads that do not fit."""
        self.num_heads(d_model)
        return 0

    def build(self, d_model: int, *, norm_eps: float, rope: RotaryEmbedding | None, device=None, dtype=None) -> Mamba2:
        return Mamba2(d_model, self, norm_eps=norm_eps, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        inner, channels = self.inner_size(d_model), self.conv_channels(d_model)
        return self._matrices(d_model) + (self.conv_size + 1) * channels + 3 * self.num_heads(d_model) + inner

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token: its matmuls, in chunks of 64 tokens."""
        H, N, P, C = self.num_heads(d_model), self.state_dim, self.head_dim, ops.chunked.CHUNK
        return 2 * self._matrices(d_model) + H * (2 * C * (N + P) + 4 * N * P)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x and what in_proj makes of it; x, B and C before silu and after; v; y,
        silu(z), their product, and it normed, with groups before its weight too; in float32 dt before and after
        softplus, the decay and the norm's rstd. The recurrence is computed again."""
        inner, channels, H = self.inner_size(d_model), self.conv_channels(d_model), self.num_heads(d_model)
        inners = 5 if self.num_groups == 1 else 6
        elements = d_model + (inner + channels + H) + 2 * channels + inners * inner
        return width * elements + 4 * (3 * H + self.num_groups)

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence: a float32 matrix a head and token that it can go back, and the convolution's inputs, `width`
        bytes an element."""
        memory = max(width, 4) * self.inner_size(d_model) * self.state_dim * (rollback + 1)
        return memory + width * self.conv_channels(d_model) * (self.conv_size - 1 + rollback)

    def _matrices(self, d_model: int) -> int:
        inner = self.inner_size(d_model)
        return d_model * (2 * inner + self.conv_channels(d_model) + self.num_heads(d_model))
