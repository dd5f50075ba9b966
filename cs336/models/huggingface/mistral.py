"""Mistral: Llama, whose tokens see the last `sliding_window` alone."""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig


def read(fields: Fields) -> TransformerConfig:
    window = fields.take("sliding_window", 4096 if "sliding_window" not in fields.given else None)
    fields.require("max_position_embeddings")
    if window is not None and window < fields.take("max_position_embeddings"):
        fields.refuse("sliding_window", window)
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=8))
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    """Without a window it is a Llama."""
    return None


MISTRAL = Family("mistral", "MistralForCausalLM", read, write, decoder.rules)
