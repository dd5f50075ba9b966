"""AWQ's, the "gemm" version that AutoAWQ began and vLLM and transformers read: of a layer (N, K) in G groups

    qweight  (K, N / 8) int32     q + 8, 8 columns of w^T a word, in the order ORDER
    qzeros   (G, N / 8) int32     zero + 8, packed as they are
    scales   (G, N)

so that w[n, k] = scales[k // group, n] * (q - zero).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cs336.models.huggingface.quantized.packing import pack, unpack
from cs336.models.huggingface.quantized.scheme import Scheme, refuse
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import QuantizedWeight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's columns, from its lowest bits up


@dataclass(frozen=True)
class AWQ:
    scheme: Scheme
    mark: ClassVar[str] = "qweight"

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "AWQ":
        bits, group, version = said.get("bits"), said.get("group_size"), said.get("version", "gemm")
        if type(bits) is not int or bits != 4:
            raise refuse("bits", bits, "4")
        if type(group) is not int or group == 0 or group < -1:
            raise refuse("group_size", group, "a positive integer, or -1 for the whole row")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise refuse("version", version, "'gemm'")
        return cls(Scheme("int4", None if group == -1 else group))

    @classmethod
    def like(cls, scheme: Scheme) -> "AWQ":
        if scheme.method != "int4":
            raise ValueError(f"AWQ's format holds int4 weights, got {scheme.method}")
        if scheme.order:
            raise ValueError("AWQ's format has no order of features: quantise without act_order")
        return cls(scheme)

    def config(self, unquantized: list[str]) -> dict[str, Any]:
        group = -1 if self.scheme.group is None else self.scheme.group
        said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
        return said | {"modules_to_not_convert": unquantized}

    def read(self, tensors: Tensors, out_features: int, in_features: int) -> QuantizedWeight:
        N, K, G = out_features, in_features, self.scheme.groups(in_features)
        q_KN = unpack(tensors.take("qweight", (K, -(-N // 8)), torch.int32), 4, 1, N, ORDER) - 8
        zeros_GN = unpack(tensors.take("qzeros", (G, -(-N // 8)), torch.int32), 4, 1, N, ORDER) - 8
        scales = tensors.scales("scales", (G, N)).t().contiguous()
        zeros = zeros_GN.t().contiguous() if zeros_GN.any() else None
        return QuantizedWeight(q_KN.t().to(torch.int8).contiguous(), scales, zeros)

    def write(self, weight: QuantizedWeight, group: int) -> dict[str, Tensor]:
        N, K = weight.q.shape
        if N % 8 or K % group:
            raise ValueError(f"AWQ packs 8 features in a word and has whole groups: {N} by {K} in {group} do not fit")
        zeros = torch.zeros_like(weight.scales, dtype=torch.int16) if weight.zeros is None else weight.zeros
        return {
            "qweight": pack(weight.q.t().to(torch.int16) + 8, 4, 1, ORDER),
            "qzeros": pack(zeros.t() + 8, 4, 1, ORDER),
            "scales": weight.scales.t().contiguous(),
        }
