"""Linear layers whose weights are whole numbers in groups that share a scale, in the places of others.

N = out_features, K = in_features.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts
from cs336.nn.linear import Linear
from cs336.ops import registry
from cs336.ops.ref.linear_quantized import dequantize_int4, dequantize_int8

QuantMethod = Literal["int8", "int4"]
METHODS = ("int8", "int4")
KEPT = ("router", "kv_b_proj")  # a wrong expert costs more than bytes; latent attention takes this weight apart


class QuantizedLinear(nn.Module):
    """y = x w^T + b with w in int8 or int4: buffers `packed` and `scales`, see ops.linear_int8 and ops.linear_int4.

    x (..., in_features) -> (..., out_features) like x. `weight` is made anew each time that it is asked for.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        method: QuantMethod,
        group: int,
        *,
        bias=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.method, self.group = in_features, out_features, method, group
        columns, kind = (in_features, torch.int8) if method == "int8" else (in_features // 2, torch.uint8)
        self.register_buffer("packed", torch.zeros(out_features, columns, dtype=kind, device=device))
        self.register_buffer("scales", torch.ones(out_features, -(-in_features // group), dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def like(cls, layer: nn.Linear, method: QuantMethod, group: int) -> "QuantizedLinear":
        """With the shape of a layer, and no values yet."""
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return cls(layer.in_features, layer.out_features, method, group, bias=layer.bias is not None, **place)

    @property
    def weight(self) -> Tensor:
        """(N, K) in the dtype of the scales."""
        dequantize = dequantize_int8 if self.method == "int8" else dequantize_int4
        return dequantize(self.packed, self.scales, self.group).to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if registry.is_invariant():
            raise ValueError("quantised weights have no sums in one order: cs336.invariant() takes the model before")
        op = ops.linear_int8 if self.method == "int8" else ops.linear_int4
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return op(x, self.packed, self.scales, bias, group=self.group)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.method}, group={self.group}"


def replace_linears(layers: nn.Module, method: QuantMethod, group: int) -> dict[str, tuple[Linear, QuantizedLinear]]:
    """Put a QuantizedLinear, without values, in the place of each Linear but the KEPT; (old, new) by name.

    Raises ValueError for an unknown method, a group below 1 or above the features of every layer.
    """
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    check_counts(group=group)
    found = {name: module for name, module in layers.named_modules() if type(module) is Linear}
    found = {name: module for name, module in found.items() if name.rpartition(".")[2] not in KEPT}
    most = max((module.in_features for module in found.values()), default=0)
    if group > most:
        raise ValueError(f"there is nothing to quantise in groups of {group}: layers have at most {most} features")
    pairs = {}
    for name, old in found.items():
        if method == "int4" and (old.in_features % 2 or group % 2):
            raise ValueError(f"{name}: int4 wants even in_features and group, got {old.in_features} and {group}")
        parent, _, last = name.rpartition(".")
        pairs[name] = old, QuantizedLinear.like(old, method, group)
        setattr(layers.get_submodule(parent), last, pairs[name][1])
    return pairs
