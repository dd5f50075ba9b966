"""Hyena of order 2, Poli et al. 2023, arXiv:2302.10866: a convolution as long as the text between two gates.

    q, k, v = conv(W x)        y = q * (h * (k v) + D k v)        out = W_o y
    h(t) = MLP(features of t) exp(-a_c t)      the MLP's activation is sin(w .)

The filter h is made of the lags' features alone: lag t / L and sines of it. Nothing is approximated while decoding: the
state keeps the products k v that the filter still reaches, and a token costs a sum over them.
B = batch, S = tokens, M = d_model, L = lags, F = features.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts, check_tokens
from cs336.nn.linear import Linear
from cs336.nn.positions import RotaryEmbedding
from cs336.nn.recent import Recent
from cs336.nn.recurrence import CausalConv1d
from cs336.nn.state import Context, place_of

BANDS = 16  # sines and cosines of a lag


class HyenaFilter(nn.Module):
    """The filter (lags, d_model), in float32 or wider."""

    def __init__(self, d_model: int, length: int, width: int, *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.d_model, self.length = d_model, length
        self.in_proj = Linear(1 + 2 * BANDS, width, bias=True, **place)
        self.hidden_proj = Linear(width, width, bias=True, **place)
        self.out_proj = Linear(width, d_model, **place)
        self.frequency = nn.Parameter(torch.empty(width, **place))

    def reset_dynamics(self) -> None:
        for projection in (self.in_proj, self.hidden_proj, self.out_proj):
            projection.reset_parameters()
        nn.init.constant_(self.frequency, 10.0)  # arXiv:2302.10866, appendix A: high, for the filter to have detail

    def forward(self, num: int) -> Tensor:
        """Of lags 0 to num - 1, at most `length`."""
        weight = self.in_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lag_L1 = torch.arange(min(num, self.length), device=weight.device, dtype=dtype)[:, None] / self.length
        angle = 2 * math.pi * lag_L1 * torch.arange(1, BANDS + 1, device=weight.device, dtype=dtype)
        x_LF = torch.cat((lag_L1, torch.cos(angle), torch.sin(angle)), -1)
        with torch.autocast("cpu" if weight.device.type == "meta" else weight.device.type, enabled=False):
            for projection in (self.in_proj, self.hidden_proj):
                linear = nn.functional.linear(x_LF, projection.weight.to(dtype), projection.bias.to(dtype))
                x_LF = torch.sin(self.frequency.to(dtype) * linear)
            h_LM = nn.functional.linear(x_LF, self.out_proj.weight.to(dtype))
        # Down to 1 % at 0.3 of the lags in the first channel, to 5 % at the end in the last.
        pace_M = -math.log(0.01) / torch.linspace(0.3, 1.5, self.d_model, device=weight.device, dtype=dtype)
        return h_LM * torch.exp(-lag_L1 * pace_M)


class HyenaState:
    """The products that the filter still reaches and the short convolution's inputs; the filter, of which all rows and
    copies share one, is not counted."""

    def __init__(self, products: Recent, conv: Recent, filter_LM: Tensor):
        self.products, self.conv, self.filter = products, conv, filter_LM

    @property
    def rollback(self) -> int:
        return self.conv.rollback

    @property
    def nbytes(self) -> int:
        return self.products.nbytes + self.conv.nbytes

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.products.select(rows), self.conv.select(rows), self.filter)

    def put(self, rows: Tensor, state: Self) -> None:
        self.products.put(rows, state.products)
        self.conv.put(rows, state.conv)


class Hyena(nn.Module):
    """x (B, S, d_model) -> like x. The arguments are HyenaConfig's."""

    def __init__(self, d_model: int, config: "HyenaConfig", *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.d_model, self.config = d_model, config
        self.in_proj = Linear(d_model, 3 * d_model, **place)
        self.conv1d = CausalConv1d(3 * d_model, config.conv_size, **place)
        self.filter = HyenaFilter(d_model, config.filter_length, config.filter_width, **place)
        self.D = nn.Parameter(torch.empty(d_model, **place))
        self.out_proj = Linear(d_model, d_model, **place)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """The start of what is no matrix and no norm: the filter, D and the short convolution."""
        self.D.fill_(1)
        self.conv1d.reset_parameters()
        self.filter.reset_dynamics()

    def new_state(self, batch_size: int, max_len: int, *, rollback: int = 0, device=None, dtype=None) -> HyenaState:
        """Room for the products of max_len tokens, or of as many as the filter reaches; device and dtype are the
        weights' if None."""
        place = place_of(self.in_proj.weight, device, dtype) | {"rollback": rollback}
        size = min(max_len, self.config.filter_length)
        products = Recent.allocate(batch_size, size, (self.d_model,), **place)
        with torch.no_grad():
            filter_LM = self.filter(size).to(place["device"])
        return HyenaState(products, self.conv1d.new_state(batch_size, **place), filter_LM)

    def forward(self, x_BSM: Tensor, context: Context | None = None, state: HyenaState | None = None) -> Tensor:
        """x (B, S, d_model) -> (B, S, d_model). context: segments keep documents apart; with a state its lengths."""
        check_tokens(x_BSM, self.d_model)
        context = Context() if context is None else context
        q, k, v = self.conv1d(self.in_proj(x_BSM), context, None if state is None else state.conv).chunk(3, -1)
        u_BSM = k * v
        if state is None:
            y_BSM = ops.long_conv(u_BSM, self.filter(x_BSM.shape[1]), context.segments)
        else:
            y_BSM = self._continue(u_BSM, context, state)
        return self.out_proj(q * (y_BSM + u_BSM * self.D.to(u_BSM.dtype)))

    def _continue(self, u_BSM: Tensor, context: Context, state: HyenaState) -> Tensor:
        assert context.lengths is not None
        begins, S = state.products.empty, u_BSM.shape[1]
        before_BLM = u_BSM[:, :0] if begins else state.products.last(len(state.filter) - 1, context.lengths)[0]
        state.products.write((u_BSM,), context)
        both_BLM = torch.cat((before_BLM.to(u_BSM.dtype), u_BSM), 1)
        if S == 1 and not begins:
            wide_BLM = both_BLM.to(state.filter.dtype)
            return (wide_BLM * state.filter.flip(0)).sum(1, keepdim=True).to(u_BSM.dtype)
        return ops.long_conv(both_BLM, state.filter)[:, before_BLM.shape[1] :]


@dataclass(frozen=True)
class HyenaConfig:
    """Hyena: see Hyena."""

    filter_length: int
    """Tokens that the filter reaches, the token itself included: what is further back is not seen."""
    filter_width: int = 64
    """Hidden features of the MLP that makes the filter."""
    conv_size: int = 3
    """Taps of the short convolution."""
    kind: Literal["hyena"] = "hyena"
    takes_positions: ClassVar[tuple[str, ...]] = ("none",)

    def __post_init__(self):
        check_counts(filter_length=self.filter_length, filter_width=self.filter_width, conv_size=self.conv_size)
        if self.conv_size == 1:
            raise ValueError("conv_size must be 2 or more: a convolution of 1 sees no other token")

    def rope_dim(self, d_model: int) -> int:
        """Order is known from the convolution: no feature is rotated."""
        return 0

    def build(self, d_model: int, *, norm_eps: float, rope: RotaryEmbedding | None, device=None, dtype=None) -> Hyena:
        return Hyena(d_model, self, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        conv = (self.conv_size + 1) * 3 * d_model
        return 4 * d_model * d_model + conv + self._filter(d_model) + 3 * self.filter_width + d_model

    def flops(self, d_model: int, context_length: int) -> int:
        """Of the forward pass, a token of one sequence: its matmuls, the filter's while it is in reach, and three real
        transforms of 2 T points, 2.5 n log2 n each."""
        in_reach = min(1.0, self.filter_length / context_length) if context_length else 0.0
        transforms = 15 * d_model * max(1, 2 * context_length).bit_length()
        return 8 * d_model * d_model + int(2 * self._filter(d_model) * in_reach) + transforms

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x; q, k and v before the short convolution and after; their product, the long
        convolution's with it, and that gated. The filter, one for all sequences, is left out, and the spectra are
        computed again."""
        return width * 10 * d_model

    def state_bytes(self, d_model: int, max_len: int, width: int, rollback: int = 0) -> int:
        """Of one sequence: the products in reach and the short convolution's inputs, `width` bytes an element."""
        products = min(max_len, self.filter_length) + rollback
        return width * d_model * (products + 3 * (self.conv_size - 1 + rollback))

    def _filter(self, d_model: int) -> int:
        return self.filter_width * (1 + 2 * BANDS + self.filter_width + d_model)
