"""Mistral: Llama, whose tokens see the last `sliding_window` alone."""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    window = fields.take("sliding_window", None if "sliding_window" in fields.given else 4096)
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=8), window=window)
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    fields = decoder.written(config)
    if fields is None or fields.pop("attention_bias"):
        return None
    return fields | {"sliding_window": getattr(config.blocks[0].mixer, "window", None)}


MISTRAL = Family("mistral", "MistralForCausalLM", read, write, decoder.rules)
