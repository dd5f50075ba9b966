"""Linear attention with a decay and, if asked, the delta rule: ops/linear_attention.py has the recurrences.

    q, k, v = silu(conv(W x))        o = norm(recurrence(q, k, v, beta, g)) * silu(W_g x)        y = W_o o

The decay of a head is none (arXiv:2006.16236, with a norm in the place of its normaliser, arXiv:2210.10340), constant
(RetNet, arXiv:2307.08621: g_h = log(1 - 2^(-5-h))), or made of the token (arXiv:2312.06635, by Mamba-2's formula,
arXiv:2405.21060: g = -exp(A_log) softplus(W_a x + dt_bias)). The delta rule has beta = sigmoid(W_b x) and q, k of
length 1 (DeltaNet, arXiv:2406.06484); with the token's decay it is Gated DeltaNet (arXiv:2412.06464).

B = batch, S = tokens, M = d_model, H = heads, K = features of a key, V = of a value.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_choice, check_counts, check_flags, check_tokens, head_size
from cs336.nn.derived import Derived
from cs336.nn.linear import Linear, in_a_row, join
from cs336.nn.norms import RMSNorm
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.recent import Snapshots
from cs336.nn.recurrence import CausalConv1d, RecurrentState, is_step, recur
from cs336.nn.state import Context, place_of
from cs336.ops.ref.wide import wide


def draw_decay(A_log: Tensor, dt_bias: Tensor) -> None:
    """Mamba-2's start: exp(A_log) uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]."""
    A_log.uniform_(1, 16).log_()
    dt = torch.exp(torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class HeadDecay(Derived):
    """g (num_heads,) float64: the log of RetNet's decay of each head, log(1 - 2^(-5-h))."""

    g: Tensor

    def __init__(self, num_heads: int, *, device: torch.device | str | None = None):
        super().__init__()
        self.register_buffer("g", torch.empty(num_heads, device=device, dtype=torch.float64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        head_H = torch.arange(len(self.g), device=self.g.device, dtype=torch.float64)
        self.g = torch.log1p(-torch.exp2(-5 - head_H))


class LinearAttention(nn.Module):
    """x (B, S, d_model) -> like x. The arguments are LinearAttentionConfig's."""

    def __init__(
        self, d_model: int, config: "LinearAttentionConfig", *, norm_eps: float = 1e-5, device=None, dtype=None
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.d_model, self.config = d_model, config
        H, K, V = config.num_heads, config.key_size(d_model), config.value_size(d_model)
        self.q_proj = Linear(d_model, H * K, **place)
        self.k_proj = Linear(d_model, H * K, **place)
        self.v_proj = Linear(d_model, H * V, **place)
        size = config.conv_size
        self.conv1d = None if size == 0 else CausalConv1d(H * (2 * K + V), size, bias=False, **place)
        self.b_proj = Linear(d_model, H, **place) if config.delta else None
        self.a_proj = self.A_log = self.dt_bias = self.decay = None
        if config.decay == "head":
            self.decay = HeadDecay(H, device=device)
        if config.decay == "token":
            self.a_proj = Linear(d_model, H, **place)
            self.A_log, self.dt_bias = (nn.Parameter(torch.empty(H, **place)) for _ in range(2))
        self.g_proj = Linear(d_model, H * V, **place)
        self.o_norm = RMSNorm(V, norm_eps, **place)
        self.o_proj = Linear(H * V, d_model, **place)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """The start of what is no matrix and no norm: the decays and the convolution."""
        if self.A_log is not None and self.dt_bias is not None:
            draw_decay(self.A_log, self.dt_bias)
        if self.conv1d is not None:
            self.conv1d.reset_parameters()

    def new_state(self, batch_size: int, max_len: int, *, rollback: int = 0, device=None, dtype=None) -> RecurrentState:
        """The same size whatever max_len is; device and dtype are the weights' if None."""
        config, place = self.config, place_of(self.q_proj.weight, device, dtype) | {"rollback": rollback}
        sizes = config.num_heads, config.key_size(self.d_model), config.value_size(self.d_model)
        memory = Snapshots.allocate(batch_size, *sizes, **place)
        return RecurrentState(memory, None if self.conv1d is None else self.conv1d.new_state(batch_size, **place))

    def forward(self, x_BSM: Tensor, context: Context | None = None, state: RecurrentState | None = None) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model). context: segments keep documents apart; with a state its lengths."""
        check_tokens(x_BSM, self.d_model)
        context = Context() if context is None else context
        if state is not None and is_step(x_BSM, context, state):
            return self._step(x_BSM[:, 0], context, state)[:, None]
        config, H, conv = self.config, self.config.num_heads, None if state is None else state.conv
        qkv = in_a_row(x_BSM, (self.q_proj, self.k_proj, self.v_proj))
        if self.conv1d is not None:
            qkv = self.conv1d(qkv, context, conv)
        keys, values = H * config.key_size(self.d_model), H * config.value_size(self.d_model)
        q, k, v = (
            x.unflatten(-1, (H, -1)).transpose(1, 2) for x in F.silu(qkv).split((keys, keys, values), -1)
        )  # (B, H, S, K or V)
        tokens = {"q": q, "k": k, "v": v}
        op: Callable = ops.linear_attention
        if self.b_proj is not None:
            op = ops.gated_delta_rule
            # A GPU's autocast takes lengths in float32, and what is divided by them becomes float32 too.
            tokens |= {"q": F.normalize(q, dim=-1).to(q.dtype), "k": F.normalize(k, dim=-1).to(k.dtype)}
            tokens["beta"] = torch.sigmoid(wide(self.b_proj(x_BSM))).transpose(1, 2)
        g_BHS = self._decay(x_BSM)
        if g_BHS is not None:
            tokens["g"] = g_BHS
        o_BHSV = recur(op, tokens, context, None if state is None else state.memory)
        o_BSHV = self.o_norm(o_BHSV.transpose(1, 2))
        return self.o_proj(ops.swiglu(self.g_proj(x_BSM), o_BSHV.flatten(-2)))

    def _step(self, x_BM: Tensor, context: Context, state: RecurrentState) -> Tensor:
        """One token more of each row, in few launches."""
        H, K, V = self.config.num_heads, self.config.key_size(self.d_model), self.config.value_size(self.d_model)
        reading, channels = self._reading(), H * (2 * K + V)
        whole = in_a_row(x_BM, list(reading.values()))
        sizes = [H * V, *(H for name in reading if name in ("g", "beta"))]
        gates = dict(zip([*reading][3:], whole[..., channels:].split(sizes, -1), strict=True))
        qkv = whole[..., :channels]
        if self.conv1d is None:
            qkv = F.silu(qkv)
        else:
            assert state.conv is not None
            qkv = self.conv1d.step(qkv, context, state.conv)
        q, k, v = (x.unflatten(-1, (H, -1)) for x in qkv.split((H * K, H * K, H * V), -1))
        options: dict[str, Any] = gates | {"gate": gates["gate"].unflatten(-1, (H, V))}
        if self.a_proj is not None:
            options |= {"A_log": self.A_log, "dt_bias": self.dt_bias}
        elif self.decay is not None:
            options["g"] = self.decay.g.expand(len(x_BM), H)
        options |= {"norm": self.o_norm.weight, "eps": self.o_norm.eps}
        assert context.lengths is not None
        o_BHV = ops.recurrent_step_(state.memory.states, q, k, v, context.lengths, context.rows, **options)
        return self.o_proj(o_BHV.flatten(-2))

    def _reading(self) -> dict[str, Linear]:
        """What reads x: q, k, v and the gate of the output; of each head the decay's and the delta rule's gates."""
        found = {"q": self.q_proj, "k": self.k_proj, "v": self.v_proj, "gate": self.g_proj}
        found |= {"g": self.a_proj} if self.a_proj is not None else {}
        return found | ({"beta": self.b_proj} if self.b_proj is not None else {})

    def join(self) -> None:
        """Lay all that reads x together: see nn/linear.py."""
        join(list(self._reading().values()))

    def _decay(self, x_BSM: Tensor) -> Tensor | None:
        if self.config.decay == "none":
            return None
        if self.decay is not None:
            B, S, H = *x_BSM.shape[:2], self.config.num_heads
            return self.decay.g.to(torch.promote_types(x_BSM.dtype, torch.float32))[None, :, None].expand(B, H, S)
        assert self.a_proj is not None
        assert self.A_log is not None
        assert self.dt_bias is not None
        # softplus(a) = log(exp(a) + exp(0)): F.softplus's own backward is compiled for strides that it does not have.
        a_BSH = wide(self.a_proj(x_BSM)) + wide(self.dt_bias)
        dt_BSH = torch.logaddexp(a_BSH, torch.zeros_like(self.dt_bias, dtype=a_BSH.dtype))
        return (-torch.exp(wide(self.A_log)) * dt_BSH).transpose(1, 2)


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Linear attention: see LinearAttention. Its state is of one size whatever the length of the text."""

    num_heads: int
    """Heads, each with a state of head_dim x value_dim numbers."""
    head_dim: int | None = None
    """Features of a query and a key. None: d_model / num_heads."""
    value_dim: int | None = None
    """Features of a value. None: head_dim."""
    decay: Literal["none", "head", "token"] = "token"
    """How the state fades: not at all, at a pace of each head's (arXiv:2307.08621), or as the token says."""
    delta: bool = False
    """Replace what the state holds under a key instead of adding to it (arXiv:2406.06484)."""
    conv_size: int = 4
    """Taps of the causal convolution over queries, keys and values. 0: no convolution."""
    kind: Literal["linear_attention"] = "linear_attention"
    takes_positions: ClassVar[tuple[str, ...]] = ("none",)

    def __post_init__(self):
        check_counts(num_heads=self.num_heads)
        check_counts(optional=True, head_dim=self.head_dim, value_dim=self.value_dim)
        check_choice("decay", self.decay, ("none", "head", "token"))
        check_flags(delta=self.delta)
        if self.conv_size != 0:
            check_counts(conv_size=self.conv_size)
        if self.conv_size == 1:
            raise ValueError("conv_size must be 2 or more, a convolution of 1 sees no other token, or 0 for none")

    def key_size(self, d_model: int) -> int:
        """Raises ValueError where d_model is not a multiple of num_heads."""
        return head_size(d_model, self.num_heads, self.head_dim)

    def value_size(self, d_model: int) -> int:
        return self.key_size(d_model) if self.value_dim is None else self.value_dim

    def rope_dim(self, d_model: int) -> int:
        """Order is known from the recurrence: no feature is rotated. Raises ValueError for heads that do not fit."""
        self.key_size(d_model)
        return 0

    def build(
        self, d_model: int, *, norm_eps: float, rope: RotaryEmbedding | None, device=None, dtype=None
    ) -> LinearAttention:
        return LinearAttention(d_model, self, norm_eps=norm_eps, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        H, V = self.num_heads, self.value_size(d_model)
        conv = self.conv_size * self._channels(d_model)
        return self._matrices(d_model) + conv + (2 * H if self.decay == "token" else 0) + V

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token: its matmuls, in chunks of 64 tokens; the delta rule's triangular solve too."""
        H, K, V, C = self.num_heads, self.key_size(d_model), self.value_size(d_model), ops.chunked.CHUNK
        recurrence = 2 * C * (K + V) + 4 * K * V
        if self.delta:
            recurrence += 2 * C * K + 2 * K * V + C * (K + V)
        return 2 * self._matrices(d_model) + H * recurrence

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x; q, k and v before the convolution, before silu and after; o, normed, its
        gate before and after silu, and their product; in float32 what makes the decay and beta, and the norm's rstd.
        The recurrence is computed again."""
        H, K, V, channels = self.num_heads, self.key_size(d_model), self.value_size(d_model), self._channels(d_model)
        elements = d_model + channels * (2 if self.conv_size == 0 else 3) + 5 * H * V
        if self.delta:
            elements += 2 * H * K + 4 * H  # of length 1, and their lengths before
        stats = 3 * H * (self.decay == "token") + H * self.delta + H
        return width * elements + 4 * stats

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence: a float32 matrix a head and token that it can go back, and the convolution's inputs, `width`
        bytes an element."""
        memory = max(width, 4) * self.num_heads * self.key_size(d_model) * self.value_size(d_model) * (rollback + 1)
        conv = 0 if self.conv_size == 0 else width * self._channels(d_model) * (self.conv_size - 1 + rollback)
        return memory + conv

    def _channels(self, d_model: int) -> int:
        return self.num_heads * (2 * self.key_size(d_model) + self.value_size(d_model))

    def _matrices(self, d_model: int) -> int:
        H, V = self.num_heads, self.value_size(d_model)
        return d_model * (self._channels(d_model) + 2 * H * V + H * self.delta + H * (self.decay == "token"))
