"""GLM-4: Llama whose neighbouring pairs of a part of each head are rotated, with one matrix for gate and up.

glm4, of the releases of 2025 (9B and 32B 0414, Z1), has norms behind mixer and MLP as well.
"""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.block import Placement
from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder, phi3
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_fraction, read_rope
from cs336.nn import AttentionConfig, RopeConfig

FUSED = {"mlp.gate_up_proj": phi3.FUSED["mlp.gate_up_proj"]}
SANDWICHED = {
    ".attention_post_norm.": "model.layers.{layer}.post_self_attn_layernorm.",
    ".mlp_post_norm.": "model.layers.{layer}.post_mlp_layernorm.",
} | decoder.NAMES
KV_HEADS, HEAD_DIM, EPS, FRACTION = 2, 128, 1.5625e-7, 0.5  # where they are left out


def read(fields: Fields) -> TransformerConfig:
    return _read(fields, "pre")


def read_4(fields: Fields) -> TransformerConfig:
    return _read(fields, "sandwich")


def _read(fields: Fields, placement: Placement) -> TransformerConfig:
    heads = decoder.heads(fields, KV_HEADS, HEAD_DIM)
    mixer = AttentionConfig(**heads, qkv_bias=fields.flag("attention_bias", True))
    rope = read_rope(fields, fraction=read_fraction(fields, FRACTION), interleaved=True)
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields), eps=EPS, positions=rope, placement=placement)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    positions = config.blocks[0].positions
    if not (isinstance(positions, RopeConfig) and positions.interleaved):
        return None  # files hold neighbouring pairs, which are not reordered
    fields = decoder.written(config, partial=True)
    if fields is None:
        return None
    return fields | {
        "pad_token_id": None,  # left out it is 151329, which a smaller vocabulary lacks
        "partial_rotary_factor": positions.fraction,
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return phi3.one_above_the_other(shapes, FUSED, "model.layers.{layer}.{name}.weight", SANDWICHED)


GLM = Family("glm", "GlmForCausalLM", read, write, rules, keeps_pairs=True)
GLM4 = Family("glm4", "Glm4ForCausalLM", read_4, write, rules, keeps_pairs=True)
