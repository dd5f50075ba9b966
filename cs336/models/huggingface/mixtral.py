"""Mixtral: Mistral with a mixture of experts for an MLP."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig, MoEConfig

NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def read(fields: Fields) -> TransformerConfig:
    fields.require("intermediate_size", "num_hidden_layers")
    fields.only("router_jitter_noise", 0.0)
    top_k = fields.count("num_experts_per_tok", 2)
    mlp = MoEConfig(
        fields.take("num_local_experts", 8),
        top_k,
        fields.take("intermediate_size"),
        activation=decoder.activation(fields),
        balance_loss=experts.balance_loss(fields, top_k),
    )
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=8), window=fields.take("sliding_window"))
    return decoder.decoder(fields, mixer, mlp, eps=1e-5, theta=1e6)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields, mlp = decoder.written(config), config.blocks[0].mlp
    if fields is None or not isinstance(mlp, MoEConfig) or fields.pop("attention_bias"):
        return None
    return fields | {
        "intermediate_size": mlp.width(config.d_model),
        "hidden_act": decoder.THEIR_ACTIVATIONS.get(mlp.activation),
        "num_local_experts": mlp.num_experts,
        "num_experts_per_tok": mlp.top_k,
        "router_aux_loss_coef": experts.coefficient(config, mlp),
        "sliding_window": getattr(config.blocks[0].mixer, "window", None),
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return experts.rules(shapes, "block_sparse_moe", NAMES)


MIXTRAL = Family("mixtral", "MixtralForCausalLM", read, write, rules)
