"""Llama 2 and 3."""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    mixer = AttentionConfig(**decoder.heads(fields), qkv_bias=bias, out_bias=bias)
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields, mlp_bias))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields = decoder.written(config)
    return None if fields is None else fields | {"mlp_bias": getattr(config.blocks[0].mlp, "bias", False)}


LLAMA = Family("llama", "LlamaForCausalLM", read, write, decoder.rules)
