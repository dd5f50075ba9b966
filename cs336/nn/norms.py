from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_flags, check_positive
from cs336.nn.derived import Derived


class _Norm(Derived):
    """A weight (dim,) that starts as 1 and is learned; or, without one, a buffer of ones that is no part of the state.

    weight, bias: whether they are learned.
    """

    weight: Tensor
    float32 = False
    """Whether no cast makes what is learned narrower: see `keep_float32`."""

    def __init__(self, dim: int, eps: float, weight: bool, bias: bool, device, dtype):
        super().__init__()
        self.dim, self.eps = dim, eps
        if weight:
            self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        else:
            self.register_buffer("weight", torch.empty(dim, device=device, dtype=torch.float32), persistent=False)
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def reset_buffers(self) -> None:
        nn.init.ones_(self.weight)

    def keep_float32(self) -> None:
        """Have weights of float32 at least from now on, whatever the model is cast to."""
        self.float32 = True
        self.float()

    def _apply(self, fn, recurse=True):
        def kept(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 else moved

        return super()._apply(kept if self.float32 else fn, recurse)

    @property
    def learned(self) -> bool:
        return isinstance(self.weight, nn.Parameter)


class RMSNorm(_Norm):
    """ops.rms_norm with its weight (dim,), which starts as 1; without `weight` it scales by nothing.

    x (..., dim) -> y like x; with a residual like x, (y, x + residual).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, weight, False, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, weight={self.learned}"


class LayerNorm(_Norm):
    """ops.layer_norm with its weight (dim,), which starts as 1, and its bias (dim,), which starts as 0; without either
    it is OLMo's parameter-free one (arXiv:2402.00838).

    x (..., dim) -> y like x; with a residual like x, (y, x + residual).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, eps, weight, bias, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, weight={self.learned}, bias={self.bias is not None}"


@dataclass(frozen=True)
class RMSNormConfig:
    eps: float = 1e-5
    """Added to the mean square before its root is taken."""
    weight: bool = True
    """Scale each feature by a learned weight."""
    kind: Literal["rms_norm"] = "rms_norm"

    def __post_init__(self):
        check_positive(eps=self.eps)
        check_flags(weight=self.weight)

    def build(self, dim: int, *, device=None, dtype=None) -> RMSNorm:
        return RMSNorm(dim, self.eps, weight=self.weight, device=device, dtype=dtype)

    def num_parameters(self, dim: int) -> int:
        return dim if self.weight else 0

    def activation_bytes(self, dim: int, width: int) -> int:
        """Kept for the backward, a row: what is normalised, `width` bytes an element, and its float32 rstd."""
        return width * dim + 4


@dataclass(frozen=True)
class LayerNormConfig:
    eps: float = 1e-5
    """Added to the variance before its root is taken."""
    bias: bool = True
    """Add a learned bias to each feature."""
    weight: bool = True
    """Scale each feature by a learned weight. With neither there are no parameters, as in OLMo (arXiv:2402.00838)."""
    kind: Literal["layer_norm"] = "layer_norm"

    def __post_init__(self):
        check_positive(eps=self.eps)
        check_flags(bias=self.bias, weight=self.weight)
        if self.bias and not self.weight:
            raise ValueError("a layer_norm with a bias and no weight is not known: set bias to false too")

    def build(self, dim: int, *, device=None, dtype=None) -> LayerNorm:
        return LayerNorm(dim, self.eps, bias=self.bias, weight=self.weight, device=device, dtype=dtype)

    def num_parameters(self, dim: int) -> int:
        return (int(self.bias) + int(self.weight)) * dim

    def activation_bytes(self, dim: int, width: int) -> int:
        """Kept for the backward, a row: what is normalised, `width` bytes an element, and its float32 mean and rstd."""
        return width * dim + 8
