"""Ours: `packed` and `scales` as ops.linear_int8, linear_int4 and linear_fp8 take them; `zeros` and `order`, if any."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cs336.models.huggingface.quantized.scheme import Scheme
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import QuantizedWeight
from cs336.nn.quantized import METHODS
from cs336.ops.ref.linear_quantized import pack_int4, unpack_int4


@dataclass(frozen=True)
class Own:
    scheme: Scheme
    mark: ClassVar[str] = "packed"

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Own":
        if said.keys() - {"x_group"} != {"quant_method", "method", "group"}:
            shown = ", ".join(sorted(said))
            raise ValueError(f"quantization_config must have quant_method, method and group, got {shown}")
        if said["method"] not in METHODS:
            raise ValueError(f"quantization_config: method must be {' or '.join(METHODS)}, got {said['method']!r}")
        try:
            return cls(Scheme(said["method"], said["group"], x_group=said.get("x_group")))
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from None

    @classmethod
    def like(cls, scheme: Scheme) -> "Own":
        return cls(scheme)

    def config(self, unquantized: list[str]) -> dict[str, Any]:
        said = {"quant_method": "cs336", "method": self.scheme.method, "group": self.scheme.group}
        return said if self.scheme.x_group is None else said | {"x_group": self.scheme.x_group}

    def read(self, tensors: Tensors, out_features: int, in_features: int) -> QuantizedWeight:
        N, K, G, int4 = out_features, in_features, self.scheme.groups(in_features), self.scheme.method == "int4"
        if self.scheme.method == "fp8":
            return QuantizedWeight(tensors.floats("packed", (N, K)), tensors.scales("scales", (N, G)))
        packed = tensors.take("packed", (N, K // 2 if int4 else K), torch.uint8 if int4 else torch.int8)
        scales = tensors.scales("scales", (N, G))
        zeros = tensors.take("zeros", (N, G), torch.int16) if "zeros" in tensors else None
        order = tensors.take("order", (K,), torch.int64) if "order" in tensors else None
        if order is not None and not torch.equal(order.sort().values, torch.arange(K, device=order.device)):
            raise ValueError(f"{tensors.stem}.order must name each of {K} features once: the file is damaged")
        return QuantizedWeight(unpack_int4(packed) if int4 else packed, scales, zeros, order)

    def write(self, weight: QuantizedWeight, group: int) -> dict[str, Tensor]:
        packed = pack_int4(weight.q) if self.scheme.method == "int4" else weight.q
        others = {"zeros": weight.zeros, "order": weight.order}
        return {"packed": packed, "scales": weight.scales} | {n: t for n, t in others.items() if t is not None}
