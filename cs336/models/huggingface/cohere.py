"""Command R and R7B: parallel blocks behind one LayerNorm without bias, neighbouring rotary pairs, scaled logits.

Cohere 2 is Cohere with windows in three layers of four; the others see all that is before, and know no positions.
"""

import dataclasses
from typing import Any

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, gemma2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import FULL, WINDOW, read_rope
from cs336.nn import AttentionConfig, LayerNormConfig, NoPositionsConfig, RopeConfig

# What releases say of themselves and transformers does not read.
PLAIN = {"use_qk_norm": False, "rotary_pct": 1.0, "position_embedding_type": "rope_gptj"}
PLAIN |= dict.fromkeys(("use_embedding_sharing", "use_gated_activation", "use_parallel_block"), True)
PLAIN |= {"order_of_interleaved_layers": "local_attn_first"}
THETA, THETA_2, EVERY, SCALE = 500000.0, 10000.0, 4, 0.0625


def read(fields: Fields) -> TransformerConfig:
    return _model(fields, (_block(fields, THETA),))


def read_2(fields: Fields) -> TransformerConfig:
    fields.require("num_hidden_layers")
    turned = _block(fields, THETA_2)
    windowed = dataclasses.replace(turned.mixer, window=fields.count("sliding_window", 4096))
    sliding = dataclasses.replace(turned, mixer=windowed)
    full = dataclasses.replace(turned, positions=NoPositionsConfig())
    every = fields.count("sliding_window_pattern", fields.count("layer_switch", EVERY))
    return _model(fields, gemma2.in_turns(fields, fields.count("num_hidden_layers"), sliding, full, every))


def _block(fields: Fields, theta: float) -> BlockConfig:
    fields.require("hidden_size", "num_attention_heads")
    for name, value in PLAIN.items():
        fields.only(name, value)
    for name in ("model_max_length", "use_parallel_embedding"):  # of the tokenizer, of how it was trained
        fields.take(name)
    bias, heads = fields.flag("attention_bias"), fields.count("num_attention_heads")
    size = fields.count("hidden_size") // heads
    fields.only("head_dim", size)
    options = decoder.heads(fields, heads) | {"head_dim": size or None}
    return BlockConfig(
        AttentionConfig(**options, qkv_bias=bias, out_bias=bias),
        decoder.gated_mlp(fields),
        LayerNormConfig(fields.number("layer_norm_eps", 1e-5), bias=False),
        read_rope(fields, theta, interleaved=True),
        parallel=True,
    )


def _model(fields: Fields, layers: tuple[BlockConfig, ...]) -> TransformerConfig:
    sizes = decoder.sizes(fields) | {"tie_embeddings": fields.flag("tie_word_embeddings", True)}
    scale = fields.number("logit_scale", SCALE)
    return TransformerConfig(**sizes, logit_scale=None if scale == 1 else scale, layers=layers)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    return _written(config) if len(set(config.blocks)) == 1 else None


def write_2(config: TransformerConfig) -> dict[str, Any] | None:
    windows = [getattr(block.mixer, "window", None) for block in config.blocks]
    if len(found := set(windows) - {None}) != 1:
        return None
    fields = _written(config)
    if fields is None:
        return None
    kinds = [FULL if window is None else WINDOW for window in windows]
    return fields | {"sliding_window": found.pop(), "layer_types": kinds}


def _written(config: TransformerConfig) -> dict[str, Any] | None:
    """Of the first block that turns its heads."""
    turned = next((b for b in config.blocks if isinstance(b.positions, RopeConfig) and b.positions.interleaved), None)
    if turned is None:  # files hold neighbouring pairs, which are not reordered
        return None
    fields = decoder.written(config.with_blocks((turned,) * config.num_layers))
    if fields is None:
        return None
    return fields | {"layer_norm_eps": fields.pop("rms_norm_eps"), "logit_scale": config.logit_scale or 1.0}


COHERE = Family("cohere", "CohereForCausalLM", read, write, decoder.rules, keeps_pairs=True)
COHERE2 = Family("cohere2", "Cohere2ForCausalLM", read_2, write_2, decoder.rules, keeps_pairs=True)
