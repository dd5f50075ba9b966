"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with a mixture of experts for every MLP, and shared ones behind a gate."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig, MoEConfig

NAMES = {
    ".mlp.shared_gate.": "model.layers.{layer}.mlp.shared_expert_gate.",
    ".mlp.shared.": "model.layers.{layer}.mlp.shared_expert.",
}


def read(fields: Fields) -> TransformerConfig:
    fields.require("moe_intermediate_size", "shared_expert_intermediate_size", "num_hidden_layers")
    experts.in_every_layer(fields)
    decoder.no_window(fields)
    width, shared = fields.count("moe_intermediate_size"), fields.count("shared_expert_intermediate_size")
    if shared % width:  # it is so many experts in one
        fields.refuse("shared_expert_intermediate_size")
    count, top_k = fields.take("num_experts", 60), fields.count("num_experts_per_tok", 4)
    mlp = experts.mixture(fields, width, count, top_k, num_shared=shared // width, shared_gate=True)
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=16), qkv_bias=fields.flag("qkv_bias", True))
    return decoder.decoder(fields, mixer, mlp)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields, mlp = experts.written(config, "moe_intermediate_size"), config.blocks[0].mlp
    if fields is None or not isinstance(mlp, MoEConfig):
        return None
    width = mlp.num_shared * mlp.width(config.d_model)
    return fields | {"qkv_bias": fields.pop("attention_bias"), "shared_expert_intermediate_size": width}


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return experts.rules(shapes, "mlp", experts.NAMES, NAMES)


QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", read, write, rules)
