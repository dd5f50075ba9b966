"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    decoder.no_window(fields)
    fields.flag("attention_bias")  # which Qwen2 does not read: exports of ours said false
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=32), qkv_bias=True)
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields = decoder.written(config)
    return None if fields is None or not fields.pop("attention_bias") else fields


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", read, write, decoder.rules)
