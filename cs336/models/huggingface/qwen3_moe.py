"""Qwen3-MoE: Qwen3 with a mixture of experts for every MLP."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts, qwen3
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.nn import MoEConfig

NAMES = {name: name for name in ("gate_proj", "down_proj", "up_proj")}


def read(fields: Fields) -> TransformerConfig:
    fields.require("moe_intermediate_size", "num_hidden_layers")
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    fields.take("intermediate_size")  # of layers without experts
    top_k, num_experts = fields.count("num_experts_per_tok", 8), fields.take("num_experts", 128)
    if fields.take("num_local_experts", num_experts) != num_experts and "num_experts" in fields.table:
        fields.refuse("num_experts")  # two names of one number
    mlp = MoEConfig(
        fields.take("num_local_experts", num_experts),
        top_k,
        fields.take("moe_intermediate_size"),
        activation=decoder.activation(fields),
        normalize=fields.flag("norm_topk_prob"),
        balance_loss=experts.balance_loss(fields, top_k),
    )
    return decoder.decoder(fields, qwen3.attention(fields, 4, None), mlp)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields, mlp = decoder.written(config), config.blocks[0].mlp
    if fields is None or not isinstance(mlp, MoEConfig):
        return None
    return fields | {
        "moe_intermediate_size": mlp.width(config.d_model),
        "hidden_act": decoder.THEIR_ACTIVATIONS[mlp.activation],
        "num_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "norm_topk_prob": mlp.normalize,
        "router_aux_loss_coef": experts.coefficient(config, mlp),
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return experts.rules(shapes, "mlp", NAMES)


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", read, write, rules)
