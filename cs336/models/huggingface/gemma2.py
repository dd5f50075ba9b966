"""Gemma 2: sandwiched norms whose weights are stored less 1, soft-caps, a scaled embedding, windows in turns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.block import BlockConfig
from cs336.models.config import MOST_LAYERS, TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family, Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_rope
from cs336.nn import AttentionConfig, MLPConfig, RMSNormConfig

NAMES = {
    ".attention_post_norm.": "model.layers.{layer}.post_attention_layernorm.",
    ".mlp_norm.": "model.layers.{layer}.pre_feedforward_layernorm.",
    ".mlp_post_norm.": "model.layers.{layer}.post_feedforward_layernorm.",
}
WINDOW, FULL = "sliding_attention", "full_attention"


def read(fields: Fields) -> TransformerConfig:
    fields.require("intermediate_size")
    fields.only("use_bidirectional_attention", False)
    sizes = decoder.sizes(fields) | {"tie_embeddings": fields.flag("tie_word_embeddings", True)}
    bias, depth = fields.flag("attention_bias"), sizes["num_layers"]
    if depth > MOST_LAYERS:
        fields.refuse("num_hidden_layers")
    window, kinds = fields.take("sliding_window", 4096), fields.take("layer_types", [WINDOW, FULL] * depth)
    if not isinstance(kinds, list) or len(kinds) < depth or any(kind not in (WINDOW, FULL) for kind in kinds):
        fields.refuse("layer_types")
    scale = fields.number("query_pre_attn_scalar", 256)
    if not scale > 0:
        fields.refuse("query_pre_attn_scalar")
    mixer = AttentionConfig(
        **decoder.heads(fields, num_kv_heads=4, head_dim=256),
        qkv_bias=bias,
        out_bias=bias,
        softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        scale=scale**-0.5,
    )
    full = BlockConfig(
        mixer,
        MLPConfig(_activation(fields), gated=True, d_ff=fields.take("intermediate_size")),
        RMSNormConfig(fields.number("rms_norm_eps", 1e-6)),
        read_rope(fields),
        placement="sandwich",
    )
    sliding = dataclasses.replace(full, mixer=dataclasses.replace(mixer, window=window))
    return TransformerConfig(
        **sizes,
        embedding_scale=sizes["d_model"] ** 0.5,
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        layers=tuple(sliding if kind == WINDOW else full for kind in kinds[:depth]),
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
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
    plain = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, window=None))
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
    found = renamed(shapes, NAMES | {k: v for k, v in decoder.NAMES.items() if k not in NAMES})
    return [
        Rule(rule.ours, rule.theirs, lambda t: [t[0] + 1], lambda t: [t[0] - 1])
        if rule.ours[0].endswith("norm.weight")
        else rule
        for rule in found
    ]


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", read, write, rules)
