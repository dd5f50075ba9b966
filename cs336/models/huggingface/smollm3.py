"""SmolLM3: Llama, some of whose layers know no positions: each fourth, or as no_rope_layers says."""

import dataclasses
from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig, NoPositionsConfig, RopeConfig

THETA, EVERY = 2e6, 4


def read(fields: Fields) -> TransformerConfig:
    decoder.no_window(fields)
    bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    mixer = AttentionConfig(**decoder.heads(fields, num_kv_heads=4), qkv_bias=bias, out_bias=bias)
    config = decoder.decoder(fields, mixer, decoder.gated_mlp(fields, mlp_bias), theta=THETA)
    turned = config.blocks[0]
    straight = dataclasses.replace(turned, positions=NoPositionsConfig())
    layers = tuple(turned if rotated else straight for rotated in _rotated(fields, config.num_layers))
    return dataclasses.replace(config, layers=layers, tie_embeddings=fields.flag("tie_word_embeddings", True))


def _rotated(fields: Fields, depth: int) -> list[bool]:
    """Of each layer whether it has rotary positions."""
    every = fields.count("no_rope_layer_interval", EVERY)
    said = fields.take("no_rope_layers", [int(i % every != 0) for i in range(1, depth + 1)])
    if not isinstance(said, list) or len(said) < depth or any(rotated not in (0, 1) for rotated in said):
        fields.refuse("no_rope_layers")  # whose 1 is a layer with them
    return [bool(rotated) for rotated in said[:depth]]


def write(config: TransformerConfig) -> dict[str, Any] | None:
    straight = dataclasses.replace(config.blocks[0], positions=RopeConfig(THETA))  # if no layer is turned
    turned = next((block for block in config.blocks if isinstance(block.positions, RopeConfig)), straight)
    if config.position_embedding is not None:
        return None
    fields = decoder.written(config.with_blocks((turned,) * config.num_layers))
    if fields is None:
        return None
    return fields | {
        "pad_token_id": None,  # left out it is 128004, which a smaller vocabulary lacks
        "mlp_bias": getattr(turned.mlp, "bias", False),
        "no_rope_layers": [int(isinstance(block.positions, RopeConfig)) for block in config.blocks],
    }


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", read, write, decoder.rules)
