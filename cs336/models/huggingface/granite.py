"""Granite 3: Llama whose embedding, scores, residual updates and logits are each scaled by a number of their own."""

import dataclasses
from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    embedding, scores, residual, divisor = (
        fields.number(name, 1.0)
        for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    )
    if not divisor > 0:
        fields.refuse("logits_scaling")
    heads = decoder.heads(fields, num_kv_heads=fields.count("num_attention_heads"))
    mixer = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, scale=scores)
    config = decoder.decoder(fields, mixer, decoder.gated_mlp(fields, mlp_bias), residual_scale=residual)
    return dataclasses.replace(config, embedding_scale=_unless_one(embedding), logit_scale=_unless_one(1 / divisor))


def _unless_one(scale: float) -> float | None:
    return None if scale == 1 else scale


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields, block = decoder.written(config), config.blocks[0]
    if fields is None or not isinstance(block.mixer, AttentionConfig):
        return None
    scale = fields["head_dim"] ** -0.5 if block.mixer.scale is None else block.mixer.scale
    return fields | {
        "mlp_bias": getattr(block.mlp, "bias", False),
        "embedding_multiplier": config.embedding_scale or 1.0,
        "attention_multiplier": scale,
        "residual_multiplier": block.residual_scale,
        "logits_scaling": _divisor(config.logit_scale or 1.0),
    }


def _divisor(scale: float) -> float:
    """Which is read as this scale: 1.3 rather than 1.2999999999999998."""
    short = round(1 / scale, 12)
    return short if short and 1 / short == scale else 1 / scale


GRANITE = Family("granite", "GraniteForCausalLM", read, write, decoder.rules)
