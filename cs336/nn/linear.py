import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.ops import registry


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; inside cs336.invariant() ops.linear_invariant."""
    return ops.linear_invariant(x, weight, bias) if registry.is_invariant() else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch.nn.Linear, y = x W^T + b, that begins as the field does today: without a bias, from a cut normal.

    x (..., in_features) -> (..., out_features); weight (out_features, in_features). Weights start as a normal of
    variance 2 / (in + out) (Glorot & Bengio 2010) cut at 3 standard deviations, bias as 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        std = (2 / (self.in_features + self.out_features)) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
