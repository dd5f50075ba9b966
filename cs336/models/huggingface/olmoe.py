"""OLMoE: a mixture of experts for every MLP, and queries and keys normalised over all heads."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, experts
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    fields.require("intermediate_size", "num_hidden_layers")
    fields.only("clip_qkv")
    width, count, top_k = fields.take("intermediate_size"), fields.take("num_experts", 64), "num_experts_per_tok"
    mlp = experts.mixture(fields, width, count, fields.count(top_k, 8), loss=0.01)
    bias, heads = fields.flag("attention_bias"), decoder.heads(fields, fields.count("num_attention_heads"))
    mixer = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, qk_norm="all")
    return decoder.decoder(fields, mixer, mlp, eps=1e-5)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    return experts.written(config, "intermediate_size")


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return experts.rules(shapes, "mlp", experts.NAMES)


OLMOE = Family("olmoe", "OlmoeForCausalLM", read, write, rules)
