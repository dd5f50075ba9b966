"""Gemma 2, and what Gemma 3 shares: sandwiched norms, stored less 1, a scaled embedding, windows in turns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.block import BlockConfig
from cs336.models.config import MOST_LAYERS, TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family, Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.gemma import stored_less_one
from cs336.models.huggingface.rotary import FULL, WINDOW, read_rope
from cs336.nn import AttentionConfig, MLPConfig, RMSNormConfig, RopeConfig

NAMES = {
    ".attention_post_norm.": "model.layers.{layer}.post_attention_layernorm.",
    ".mlp_norm.": "model.layers.{layer}.pre_feedforward_layernorm.",
    ".mlp_post_norm.": "model.layers.{layer}.post_feedforward_layernorm.",
}


def read(fields: Fields) -> TransformerConfig:
    rope, softcap = read_rope(fields), given_or(fields, "attn_logit_softcapping", 50.0)
    sliding, full = blocks(fields, {"softcap": softcap}, rope, rope)
    return model(fields, sliding, full, 2, given_or(fields, "final_logit_softcapping", 30.0))


def blocks(
    fields: Fields, attention: dict[str, Any], local: RopeConfig, everywhere: RopeConfig
) -> tuple[BlockConfig, BlockConfig]:
    """A layer with a window, and one without."""
    fields.require("intermediate_size")
    fields.only("use_bidirectional_attention", False)
    scale, bias = fields.number("query_pre_attn_scalar", 256), fields.flag("attention_bias")
    if not scale > 0:
        fields.refuse("query_pre_attn_scalar")
    heads = decoder.heads(fields, num_kv_heads=4, head_dim=256)
    mixer = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, scale=scale**-0.5, **attention)
    full = BlockConfig(
        mixer,
        MLPConfig(_activation(fields), gated=True, d_ff=fields.take("intermediate_size")),
        RMSNormConfig(fields.number("rms_norm_eps", 1e-6)),
        everywhere,
        placement="sandwich",
    )
    windowed = dataclasses.replace(mixer, window=fields.take("sliding_window", 4096))
    return dataclasses.replace(full, mixer=windowed, positions=local), full


def model(
    fields: Fields, sliding: BlockConfig, full: BlockConfig, every: int, softcap: float | None
) -> TransformerConfig:
    """every: how often a layer is full, where layer_types does not say it."""
    sizes = decoder.sizes(fields) | {"tie_embeddings": fields.flag("tie_word_embeddings", True)}
    layers = in_turns(fields, sizes["num_layers"], sliding, full, every)
    sizes |= {"embedding_scale": sizes["d_model"] ** 0.5, "float32_norms": True}
    return TransformerConfig(**sizes, logit_softcap=softcap, layers=layers)


def in_turns(
    fields: Fields, depth: int, sliding: BlockConfig, full: BlockConfig, every: int
) -> tuple[BlockConfig, ...]:
    """So many layers, of which layer_types says which are full; where it is left out, each `every`-th is."""
    if depth > MOST_LAYERS:
        fields.refuse("num_hidden_layers")
    return by_kinds(fields, sliding, full, [WINDOW if i % every else FULL for i in range(1, depth + 1)])


def by_kinds(fields: Fields, sliding: BlockConfig, full: BlockConfig, default: list[str]) -> tuple[BlockConfig, ...]:
    """A layer for each of the default's kinds, which layer_types overrules."""
    depth, kinds = len(default), fields.take("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) < depth or any(kind not in (WINDOW, FULL) for kind in kinds):
        fields.refuse("layer_types")
    return tuple(sliding if kind == WINDOW else full for kind in kinds[:depth])


def given_or(fields: Fields, name: str, default: float) -> Any:
    """null is none, and not the default."""
    return fields.number(name, None if name in fields.given else default)


def _activation(fields: Fields) -> Any:
    """Files have two names for it, of which transformers reads the newer."""
    fields.take("hidden_act")
    return decoder.activation(fields, "hidden_activation", "gelu_pytorch_tanh")


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block, mixers = config.blocks[0], [block.mixer for block in config.blocks]
    windows = {mixer.window for mixer in mixers if isinstance(mixer, AttentionConfig)} - {None}
    if not isinstance(block.mixer, AttentionConfig) or not isinstance(block.mlp, MLPConfig) or len(windows) > 1:
        return None
    plain = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=None))  # reading compares the rest
    fields = decoder.written(dataclasses.replace(config, layers=(plain,), pattern=None))
    if fields is None:
        return None
    scale = fields["head_dim"] ** -0.5 if block.mixer.scale is None else block.mixer.scale
    return fields | {
        "hidden_activation": fields.pop("hidden_act"),
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": block.mixer.softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": next(iter(windows), 4096),
        "layer_types": [FULL if getattr(mixer, "window", None) is None else WINDOW for mixer in mixers],
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return stored_less_one(renamed(shapes, NAMES | {k: v for k, v in decoder.NAMES.items() if k not in NAMES}))


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read, write, rules)
