"""Dense MLPs.   down(act(up(x)))   or, gated,   down(act(gate(x)) * up(x))

    act(h)       plain                            gated
    relu         ReLU                             ReGLU
    relu2        ReLU^2, arXiv:2109.08668
    gelu         GELU, arXiv:1606.08415           GEGLU
    gelu_tanh    GELU's tanh approximation        GEGLU as Gemma has it
    silu         SiLU                             SwiGLU
    sigmoid      sigmoid                          GLU, arXiv:1612.08083
    clamped_gelu c sigmoid(1.702 c), c = min(h, 7)   times up within +-7, plus 1: gpt-oss's, arXiv:2508.10925

Gates are from Shazeer 2020, arXiv:2002.05202. M = d_model, F = d_ff.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_choice, check_counts, check_flags
from cs336.nn.linear import Linear, join, joined, side_by_side
from cs336.ops.activation import Kind, gated

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "clamped_gelu"]
LIMIT = 7.0  # of clamped_gelu
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": ops.relu2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": ops.silu,
    "sigmoid": torch.sigmoid,
    "clamped_gelu": lambda x: (c := x.clamp(max=LIMIT)) * torch.sigmoid(1.702 * c),
}
KINDS = {"silu": Kind.SILU, "gelu": Kind.GELU, "gelu_tanh": Kind.GELU_TANH}  # what ops.activation.gated knows
# Tensors of d_ff features that the backward of an activation and of the product behind it reads.
KEPT = {"relu": 1, "relu2": 2, "gelu": 2, "gelu_tanh": 2, "silu": 2, "sigmoid": 1, "clamped_gelu": 4}


def kept(activation: str, gated: bool) -> int:
    """The same, and of the product with up: both factors, and up itself where it is clamped."""
    return KEPT[activation] + (2 + (activation == "clamped_gelu")) * gated


def default_d_ff(d_model: int) -> int:
    """8/3 d_model, which gives SwiGLU the parameters of a plain MLP of 4 d_model, rounded up to a multiple of 64."""
    return -(-8 * d_model // (3 * 64)) * 64


def gate(activation: str, gate_F: Tensor, up_F: Tensor) -> Tensor:
    """act(gate) * up."""
    if activation == "silu":
        return ops.swiglu(gate_F, up_F)
    if activation in ("gelu", "gelu_tanh"):
        return ops.geglu(gate_F, up_F, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "clamped_gelu":
        up_F = up_F.clamp(-LIMIT, LIMIT) + 1
    return ACTIVATIONS[activation](gate_F) * up_F


class MLP(nn.Module):
    """x (..., d_model) -> (..., d_model); the formula is at the top of the file.

    up_proj, and gate_proj if gated, are (d_ff, d_model), down_proj (d_model, d_ff). d_ff None is 4 d_model, or
    default_d_ff(d_model) if gated. bias: of each.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        d_ff = MLPConfig(activation, gated, d_ff).width(d_model)
        if gated:
            self.gate_proj = Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.up_proj = Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self._gated(x))
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))

    def _gated(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj)
        both = side_by_side(x, layers) if self.activation in KINDS else None
        return gate(self.activation, *joined(x, layers)) if both is None else gated(both, KINDS[self.activation])

    def join(self) -> None:
        """Lay gate and up_proj together: see nn/linear.py."""
        if self.gated:
            join((self.gate_proj, self.up_proj))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, gated={self.gated}"


class SwiGLU(MLP):
    """down(silu(gate(x)) * up(x)): a gated MLP without biases."""

    def __init__(self, d_model: int, d_ff: int | None = None, *, device=None, dtype=None):
        super().__init__(d_model, d_ff, activation="silu", gated=True, device=device, dtype=dtype)


class GELU(MLP):
    """down(gelu(up(x))), the plain MLP of GPT-2 without biases."""

    def __init__(self, d_model: int, d_ff: int | None = None, *, device=None, dtype=None):
        super().__init__(d_model, d_ff, device=device, dtype=dtype)


class _Counts:
    """What a dense MLP takes, of its d_ff, activation, gated and bias."""

    d_ff: int | None
    activation: Activation
    gated: bool
    bias: bool

    def width(self, d_model: int) -> int:
        default = default_d_ff(d_model) if self.gated else 4 * d_model
        return default if self.d_ff is None else self.d_ff

    def num_parameters(self, d_model: int) -> int:
        biases = (2 if self.gated else 1) * self.width(d_model) + d_model if self.bias else 0
        return self._matrices(d_model) + biases

    def idle_parameters(self, d_model: int) -> int:
        """Weights of matrices that do not multiply a given token."""
        return 0

    def flops(self, d_model: int) -> int:
        """Of the forward pass, a token: its matmuls."""
        return 2 * self._matrices(d_model)

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, the hidden features that the activation keeps, and gated ones' product."""
        return width * (d_model + kept(self.activation, self.gated) * self.width(d_model))

    def _matrices(self, d_model: int) -> int:
        return (3 if self.gated else 2) * d_model * self.width(d_model)


@dataclass(frozen=True)
class MLPConfig(_Counts):
    """See MLP. Of silu, gated, SwiGLUConfig is the short name; of gelu, plain, GELUConfig."""

    activation: Activation = "gelu"
    """Of the hidden features, or of the gate."""
    gated: bool = False
    """down(act(gate(x)) * up(x)) instead of down(act(up(x)))."""
    d_ff: int | None = None
    """Hidden features. None: 4 d_model, or if gated 8/3 d_model rounded up to a multiple of 64."""
    bias: bool = False
    """Biases of every projection."""
    kind: Literal["mlp"] = "mlp"

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        check_flags(gated=self.gated, bias=self.bias)
        check_counts(optional=True, d_ff=self.d_ff)

    def build(self, d_model: int, *, device=None, dtype=None) -> MLP:
        return MLP(
            d_model,
            self.d_ff,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            device=device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class SwiGLUConfig(_Counts):
    d_ff: int | None = None
    """Hidden features. None: 8/3 d_model, rounded up to a multiple of 64."""
    kind: Literal["swiglu"] = "swiglu"

    activation = "silu"
    gated = True
    bias = False

    def __post_init__(self):
        check_counts(optional=True, d_ff=self.d_ff)

    def build(self, d_model: int, *, device=None, dtype=None) -> SwiGLU:
        return SwiGLU(d_model, self.d_ff, device=device, dtype=dtype)


@dataclass(frozen=True)
class GELUConfig(_Counts):
    d_ff: int | None = None
    """Hidden features. None: 4 d_model."""
    kind: Literal["gelu"] = "gelu"

    activation = "gelu"
    gated = False
    bias = False

    def __post_init__(self):
        check_counts(optional=True, d_ff=self.d_ff)

    def build(self, d_model: int, *, device=None, dtype=None) -> GELU:
        return GELU(d_model, self.d_ff, device=device, dtype=dtype)


@dataclass(frozen=True)
class NoMLPConfig:
    """A block of a mixer alone, with one norm: Mamba's (arXiv:2312.00752)."""

    kind: Literal["none"] = "none"

    def width(self, d_model: int) -> int:
        return 0

    def build(self, d_model: int, *, device=None, dtype=None) -> None:
        return None

    def num_parameters(self, d_model: int) -> int:
        return 0

    def idle_parameters(self, d_model: int) -> int:
        return 0

    def flops(self, d_model: int) -> int:
        return 0

    def activation_bytes(self, d_model: int, width: int) -> int:
        return 0
