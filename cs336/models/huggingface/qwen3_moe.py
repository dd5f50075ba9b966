"""Qwen3-MoE: Qwen3 with a mixture of experts for every MLP."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts, qwen3
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields


def read(fields: Fields) -> TransformerConfig:
    fields.require("moe_intermediate_size", "num_hidden_layers")
    experts.in_every_layer(fields)
    top_k, num_experts = fields.count("num_experts_per_tok", 8), fields.take("num_experts", 128)
    if fields.take("num_local_experts", num_experts) != num_experts and "num_experts" in fields.table:
        fields.refuse("num_experts")  # two names of one number
    mlp = experts.mixture(
        fields, fields.take("moe_intermediate_size"), fields.take("num_local_experts", num_experts), top_k
    )
    decoder.no_window(fields)
    return decoder.decoder(fields, qwen3.attention(fields, 4, None), mlp)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    return experts.written(config, "moe_intermediate_size")


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return experts.rules(shapes, "mlp", experts.NAMES)


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, rules)
