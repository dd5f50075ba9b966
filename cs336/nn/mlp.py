from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts
from cs336.nn.linear import Linear


def default_d_ff(d_model: int) -> int:
    """8/3 d_model, which gives SwiGLU the parameters of a plain MLP of 4 d_model, rounded up to a multiple of 64."""
    return -(-8 * d_model // (3 * 64)) * 64


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020, arXiv:2002.05202.  x (..., d_model) -> (..., d_model).

    gate_proj and up_proj are (d_ff, d_model), down_proj (d_model, d_ff); d_ff is default_d_ff(d_model) if None.
    """

    # One matmul for gate and up was no faster on an H200, forward and backward, compiled: 22.0 ms to 21.6 for 6 layers.
    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_ff = default_d_ff(d_model) if d_ff is None else d_ff
        self.gate_proj = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.up_proj = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.down_proj = Linear(d_ff, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class GELU(nn.Module):
    """down(gelu(up(x))), the plain MLP of GPT-2 without biases; gelu is x * Phi(x), arXiv:1606.08415.

    x (..., d_model) -> (..., d_model). up_proj is (d_ff, d_model), down_proj (d_model, d_ff); d_ff None is 4 d_model.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.up_proj = Linear(d_model, d_ff, device=device, dtype=dtype)
        self.down_proj = Linear(d_ff, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


@dataclass(frozen=True)
class SwiGLUConfig:
    d_ff: int | None = None
    """Hidden features. None: 8/3 d_model, rounded up to a multiple of 64."""
    kind: Literal["swiglu"] = "swiglu"

    def __post_init__(self):
        check_counts(optional=True, d_ff=self.d_ff)

    def width(self, d_model: int) -> int:
        return default_d_ff(d_model) if self.d_ff is None else self.d_ff

    def build(self, d_model: int, *, device=None, dtype=None) -> SwiGLU:
        return SwiGLU(d_model, self.d_ff, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        return 3 * d_model * self.width(d_model)

    def flops(self, d_model: int) -> int:
        """Of the forward pass, a token: its matmuls."""
        return 2 * self.num_parameters(d_model)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, the gate before and after silu, up, and their product."""
        return width * (d_model + 4 * self.width(d_model))


@dataclass(frozen=True)
class GELUConfig:
    d_ff: int | None = None
    """Hidden features. None: 4 d_model."""
    kind: Literal["gelu"] = "gelu"

    def __post_init__(self):
        check_counts(optional=True, d_ff=self.d_ff)

    def width(self, d_model: int) -> int:
        return 4 * d_model if self.d_ff is None else self.d_ff

    def build(self, d_model: int, *, device=None, dtype=None) -> GELU:
        return GELU(d_model, self.d_ff, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        return 2 * d_model * self.width(d_model)

    def flops(self, d_model: int) -> int:
        """Of the forward pass, a token: its matmuls."""
        return 2 * self.num_parameters(d_model)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, and the hidden features before and after gelu."""
        return width * (d_model + 2 * self.width(d_model))
