"""GPTQ's, as AutoGPTQ began it and GPTQModel, vLLM and transformers read it: of a layer (N, K) in G groups

    qweight  (K / 8, N) int32     q + 8, 8 rows of w^T a word; of 8 bits q + 128, 4 a word
    qzeros   (G, N / 8) int32     zero + 8 - 1 of each group and feature ("gptq_v2": without the - 1)
    scales   (G, N)
    g_idx    (K,) int32           the group of each feature

so that w[n, k] = scales[g_idx[k], n] * (q - zero).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cs336.models.huggingface.quantized.packing import pack, unpack
from cs336.models.huggingface.quantized.scheme import BITS, Scheme, refuse
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import QuantizedWeight


@dataclass(frozen=True)
class GPTQ:
    scheme: Scheme
    shift: int = 1
    """How much less than its zero a group keeps."""
    mark: ClassVar[str] = "qweight"

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "GPTQ":
        bits, group, kind = said.get("bits"), said.get("group_size"), said.get("checkpoint_format", "gptq")
        if type(bits) is not int or bits not in BITS:
            raise refuse("bits", bits, "4 or 8")
        if type(group) is not int or group == 0 or group < -1:
            raise refuse("group_size", group, "a positive integer, or -1 for the whole row")
        if kind not in ("gptq", "gptq_v2"):
            raise refuse("checkpoint_format", kind, "'gptq' or 'gptq_v2'")
        if said.get("dynamic"):
            raise refuse("dynamic", said["dynamic"], "one way for all layers")
        return cls(Scheme(BITS[bits], None if group == -1 else group), 1 if kind == "gptq" else 0)

    @classmethod
    def like(cls, scheme: Scheme) -> "GPTQ":
        if scheme.method == "fp8":
            raise ValueError("GPTQ's format holds int4 and int8 weights, got fp8: choose cs336 or compressed-tensors")
        return cls(scheme)

    def config(self, unquantized: list[str]) -> dict[str, Any]:
        group = -1 if self.scheme.group is None else self.scheme.group
        kinds = {"sym": not self.scheme.zeros, "desc_act": self.scheme.order, "lm_head": False}
        said = {"quant_method": "gptq", "bits": self.scheme.bits, "group_size": group, "checkpoint_format": "gptq"}
        return said | kinds | {"true_sequential": False, "damp_percent": 0.01}

    def read(self, tensors: Tensors, out_features: int, in_features: int) -> QuantizedWeight:
        N, K, G, bits = out_features, in_features, self.scheme.groups(in_features), self.scheme.bits
        many, half = 32 // bits, 2 ** (bits - 1)
        q_KN = unpack(tensors.take("qweight", (-(-K // many), N), torch.int32), bits, 0, K) - half
        zeros_GN = unpack(tensors.take("qzeros", (G, -(-N // many)), torch.int32), bits, 1, N) + self.shift - half
        scales_GN = tensors.scales("scales", (G, N))
        order, group = None, self.scheme.group or K
        if "g_idx" in tensors:
            group_K = tensors.take("g_idx", (K,), torch.int32)
            order = group_K.argsort(stable=True)
            if not torch.equal(group_K[order].long(), torch.arange(K, device=order.device) // group):
                raise ValueError(f"{tensors.stem}.g_idx must give each group {group} features: the file is damaged")
            if torch.equal(order, torch.arange(K, device=order.device)):
                order = None
        q_NK = (q_KN if order is None else q_KN[order]).t().to(torch.int8).contiguous()
        zeros = zeros_GN.t().contiguous() if zeros_GN.any() else None
        return QuantizedWeight(q_NK, scales_GN.t().contiguous(), zeros, order)

    def write(self, weight: QuantizedWeight, group: int) -> dict[str, Tensor]:
        (N, K), bits = weight.q.shape, self.scheme.bits
        many, half = 32 // bits, 2 ** (bits - 1)
        if N % many or K % many:
            raise ValueError(f"GPTQ packs {many} features in a word: {N} by {K} features do not fit")
        zeros = torch.zeros_like(weight.scales, dtype=torch.int16) if weight.zeros is None else weight.zeros
        if self.shift and weight.zeros is not None and (zeros == -half).any():
            raise ValueError("GPTQ's first format has no zero below 1, and a group has 0: choose another format")
        group_K, q_NK = torch.arange(K, device=weight.q.device) // group, weight.q
        if weight.order is not None:
            place = weight.order.argsort()
            group_K, q_NK = group_K[place], q_NK[:, place]
        return {
            "qweight": pack(q_NK.t().to(torch.int16) + half, bits, 0),
            "qzeros": pack(zeros.t() + half - self.shift, bits, 1),
            "scales": weight.scales.t().contiguous(),
            "g_idx": group_K.to(torch.int32),
        }
