"""compressed-tensors', as llm-compressor writes it and vLLM and transformers read it: of a layer (N, K) in G groups

    weight_packed      (N, ceil(K / 8)) int32    q + 8, 8 features a word; of 8 bits q + 128, 4 a word
    weight_scale       (N, G)
    weight_zero_point  (ceil(N / 8), G) int32    zero + 8, packed down the rows, of asymmetric grids
    weight_shape       (2,) int64                N, K

so that w[n, k] = weight_scale[n, g] * (q - zero): the format "pack-quantized". Of fp8, the format "float-quantized",

    weight             (N, K) float8_e4m3fn
    weight_scale       (N, 1), or (1,) for all rows, or (ceil(N / n), ceil(K / k)) for blocks of n x k

which is written with a scale a row. Beside it x may be rounded to fp8 as the model runs, "dynamic": each token with a
scale, or a group of its features. Where a file wants one scale for all tokens of a batch, each token has its own here:
a text would depend on the others otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cs336.models.huggingface.quantized.packing import pack, unpack
from cs336.models.huggingface.quantized.scheme import BITS, Scheme, refuse
from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import QuantizedWeight
from cs336.nn.quantized import TOKEN

PACKED, FLOATS = "pack-quantized", "float-quantized"


@dataclass(frozen=True)
class CompressedTensors:
    scheme: Scheme
    rows: int | None = 1
    """That share the scales of fp8; None: all."""

    @property
    def mark(self) -> str:
        return "weight_scale" if self.scheme.method == "fp8" else "weight_packed"

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "CompressedTensors":
        groups = said.get("config_groups")
        if (
            not isinstance(groups, dict)
            or len(groups) != 1
            or not isinstance(only := next(iter(groups.values())), dict)
        ):
            raise refuse("config_groups", groups, "one group of layers")
        if (kind := only.get("format") or said.get("format")) not in (PACKED, FLOATS):
            raise refuse("format", kind, f"{PACKED!r} or {FLOATS!r}")
        for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if said.get(name):
                raise refuse(name, said[name], "none")
        weights, read, made = (only.get(name) for name in ("weights", "input_activations", "output_activations"))
        if made or (read and (kind == PACKED or not isinstance(read, dict) or read.get("dynamic") is not True)):
            raise refuse("input_activations", read or made, f"none, or dynamic ones with {FLOATS!r}")
        x_group = cls._x_group(read) if read else None
        if not isinstance(weights, dict):
            raise refuse("weights", weights, "a table")
        if weights.get("dynamic"):
            raise refuse("weights.dynamic", weights["dynamic"], "false")
        return cls._of_floats(weights, x_group) if kind == FLOATS else cls._of_numbers(weights)

    @classmethod
    def _x_group(cls, read: Mapping[str, Any]) -> int:
        """Features of x that share a scale."""
        if (read.get("num_bits"), read.get("type"), read.get("symmetric", True)) != (8, "float", True):
            raise refuse("input_activations", read, "symmetric floats of 8 bits")
        strategy, group = read.get("strategy"), read.get("group_size")
        if strategy in ("token", "tensor"):
            return TOKEN
        if strategy != "group" or type(group) is not int or group < 1:
            raise refuse(
                "input_activations.strategy", (strategy, group), "'token', or 'group' with a positive group_size"
            )
        return group

    @classmethod
    def _of_numbers(cls, weights: Mapping[str, Any]) -> "CompressedTensors":
        bits, strategy, group = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        if type(bits) is not int or bits not in BITS:
            raise refuse("weights.num_bits", bits, "4 or 8")
        if weights.get("type", "int") != "int":
            raise refuse("weights.type", weights["type"], "'int'")
        if strategy == "channel" or (strategy == "group" and group == -1):
            group = None
        elif strategy != "group" or type(group) is not int or group < 1:
            raise refuse("weights.strategy", (strategy, group), "'channel', or 'group' with a positive group_size")
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise refuse("weights.symmetric", symmetric, "true or false")
        return cls(Scheme(BITS[bits], group, zeros=not symmetric))

    @classmethod
    def _of_floats(cls, weights: Mapping[str, Any], x_group: int | None) -> "CompressedTensors":
        if (weights.get("num_bits"), weights.get("type"), weights.get("symmetric", True)) != (8, "float", True):
            raise refuse("weights", weights, "symmetric floats of 8 bits")
        strategy, block = weights.get("strategy"), weights.get("block_structure")
        if strategy in ("channel", "tensor"):
            return cls(Scheme("fp8", None, x_group=x_group), 1 if strategy == "channel" else None)
        if (
            strategy != "block"
            or not isinstance(block, list)
            or [type(n) for n in block] != [int, int]
            or min(block) < 1
        ):
            raise refuse(
                "weights.strategy", (strategy, block), "'channel', 'tensor', or 'block' with a block_structure"
            )
        return cls(Scheme("fp8", block[1], x_group=x_group), block[0])

    @classmethod
    def like(cls, scheme: Scheme) -> "CompressedTensors":
        if scheme.order:
            raise ValueError("compressed-tensors has no order of features: choose gptq, or quantise without act_order")
        if scheme.method == "fp8" and scheme.group is not None:
            raise ValueError(f"fp8 is written with a scale a row, not {scheme.group} features: choose the group -1")
        return cls(scheme)

    def config(self, unquantized: list[str]) -> dict[str, Any]:
        scheme = self.scheme
        kind, form = ("float", FLOATS) if scheme.method == "fp8" else ("int", PACKED)
        weights: dict[str, Any] = {"num_bits": scheme.bits, "type": kind, "symmetric": not scheme.zeros}
        weights |= {"strategy": "channel" if scheme.group is None else "group", "group_size": scheme.group}
        weights |= {"actorder": None, "dynamic": False, "block_structure": None}
        read = None
        if (group := scheme.x_group) is not None:
            read = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "block_structure": None}
            read |= (
                {"strategy": "token", "group_size": None}
                if group == TOKEN
                else {"strategy": "group", "group_size": group}
            )
        only = {"targets": ["Linear"], "weights": weights, "input_activations": read, "output_activations": None}
        said = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
        return said | {"config_groups": {"group_0": only}, "ignore": unquantized, "kv_cache_scheme": None}

    def read(self, tensors: Tensors, out_features: int, in_features: int) -> QuantizedWeight:
        N, K, G, bits = out_features, in_features, self.scheme.groups(in_features), self.scheme.bits
        if self.scheme.method == "fp8":
            scales = tensors.scales("weight_scale", (1,) if self.rows is None else (-(-N // self.rows), G)).view(-1, G)
            scales = scales.repeat_interleave(min(self.rows or N, N), 0)[:N].contiguous()
            return QuantizedWeight(tensors.floats("weight", (N, K)), scales)
        many, half = 32 // bits, 2 ** (bits - 1)
        shape = tensors.take("weight_shape", (2,), torch.int64, torch.int32)
        if shape.tolist() != [N, K]:
            raise ValueError(f"{tensors.stem}.weight_shape is {shape.tolist()}, config.json means {[N, K]}")
        q_NK = unpack(tensors.take("weight_packed", (N, -(-K // many)), torch.int32), bits, 1, K) - half
        scales = tensors.scales("weight_scale", (N, G))
        zeros = None
        if self.scheme.zeros:
            words = tensors.take("weight_zero_point", (-(-N // many), G), torch.int32)
            zeros = (unpack(words, bits, 0, N) - half).contiguous()
        return QuantizedWeight(q_NK.to(torch.int8).contiguous(), scales, zeros)

    def write(self, weight: QuantizedWeight, group: int) -> dict[str, Tensor]:
        (N, K), bits = weight.q.shape, self.scheme.bits
        if self.scheme.method == "fp8":
            return {"weight": weight.q, "weight_scale": weight.scales}
        if K % group:
            raise ValueError(f"compressed-tensors has whole groups: {K} features in groups of {group} do not fit")
        half = 2 ** (bits - 1)
        tensors = {"weight_packed": pack(weight.q.to(torch.int16) + half, bits, 1)}
        if self.scheme.zeros:
            zeros = torch.zeros_like(weight.scales, dtype=torch.int16) if weight.zeros is None else weight.zeros
            tensors["weight_zero_point"] = pack(zeros + half, bits, 0)
        return tensors | {"weight_scale": weight.scales, "weight_shape": torch.tensor([N, K])}
