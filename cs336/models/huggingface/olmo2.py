"""OLMo 2: norms after the mixer and the MLP, within the residual, and queries and keys normalised over all heads."""

from collections.abc import Mapping

import torch

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family, Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig

NAMES = {
    ".attention_norm.": "model.layers.{layer}.post_attention_layernorm.",
    ".mlp_norm.": "model.layers.{layer}.post_feedforward_layernorm.",
}


def read(fields: Fields) -> TransformerConfig:
    bias = fields.flag("attention_bias")
    mixer = AttentionConfig(**decoder.heads(fields), qkv_bias=bias, out_bias=bias, qk_norm="all")
    return decoder.decoder(fields, mixer, decoder.gated_mlp(fields), eps=1e-5, placement="reordered")


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return renamed(shapes, NAMES | {k: v for k, v in decoder.NAMES.items() if k not in NAMES})


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", read, decoder.written, rules)
