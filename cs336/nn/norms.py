from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_positive


class RMSNorm(nn.Module):
    """ops.rms_norm with its weight (dim,), which starts as 1.

    x (..., dim) -> y like x; with a residual like x, (y, x + residual).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if x.dtype == torch.float64:  # the op accumulates in fp32
            total = x if residual is None else x + residual
            y = F.rms_norm(total, (self.dim,), self.weight, self.eps)
            return y if residual is None else (y, total)
        return ops.rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class LayerNorm(nn.Module):
    """ops.layer_norm with its weight (dim,), which starts as 1, and its bias (dim,), which starts as 0.

    x (..., dim) -> y like x; with a residual like x, (y, x + residual).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if x.dtype == torch.float64:  # the op accumulates in fp32
            total = x if residual is None else x + residual
            y = F.layer_norm(total, (self.dim,), self.weight, self.bias, self.eps)
            return y if residual is None else (y, total)
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, bias={self.bias is not None}"


@dataclass(frozen=True)
class RMSNormConfig:
    eps: float = 1e-5
    kind: Literal["rms_norm"] = "rms_norm"

    def __post_init__(self):
        check_positive(eps=self.eps)

    def build(self, dim: int, *, device=None, dtype=None) -> RMSNorm:
        return RMSNorm(dim, self.eps, device=device, dtype=dtype)

    def num_parameters(self, dim: int) -> int:
        return dim

    def activation_bytes(self, dim: int, width: int) -> int:
        """Kept for the backward, a row: what is normalised, `width` bytes an element, and its float32 rstd."""
        return width * dim + 4


@dataclass(frozen=True)
class LayerNormConfig:
    eps: float = 1e-5
    bias: bool = True
    kind: Literal["layer_norm"] = "layer_norm"

    def __post_init__(self):
        check_positive(eps=self.eps)

    def build(self, dim: int, *, device=None, dtype=None) -> LayerNorm:
        return LayerNorm(dim, self.eps, bias=self.bias, device=device, dtype=dtype)

    def num_parameters(self, dim: int) -> int:
        return 2 * dim if self.bias else dim

    def activation_bytes(self, dim: int, width: int) -> int:
        """Kept for the backward, a row: what is normalised, `width` bytes an element, and its float32 mean and rstd."""
        return width * dim + 8
