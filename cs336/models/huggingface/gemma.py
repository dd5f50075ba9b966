"""Gemma: Llama with GeGLU, norms stored less 1, and an embedding that is scaled by the root of its features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family, Rule
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_rope
from cs336.nn import AttentionConfig, MLPConfig, RMSNormConfig


def read(fields: Fields) -> TransformerConfig:
    fields.require("intermediate_size")
    fields.only("use_bidirectional_attention", False)
    bias, heads = fields.flag("attention_bias"), decoder.heads(fields, num_kv_heads=16, head_dim=256)
    block = BlockConfig(
        AttentionConfig(**heads, qkv_bias=bias, out_bias=bias),
        MLPConfig(_activation(fields), gated=True, d_ff=fields.take("intermediate_size")),
        RMSNormConfig(fields.number("rms_norm_eps", 1e-6)),
        read_rope(fields),
    )
    sizes = decoder.sizes(fields) | {"tie_embeddings": fields.flag("tie_word_embeddings", True)}
    return TransformerConfig(**sizes, embedding_scale=sizes["d_model"] ** 0.5, float32_norms=True, layers=(block,))


def _activation(fields: Fields) -> Any:
    """The first files said "gelu" and meant its approximation; later ones say so beside it, under a second name."""
    first = decoder.activation(fields, default="gelu_pytorch_tanh")
    meant = "gelu_tanh" if first == "gelu" else first
    if fields.take("hidden_activation") is not None and decoder.activation(fields, "hidden_activation") != meant:
        fields.refuse("hidden_activation")
    return meant


def stored_less_one(rules: list[Rule]) -> list[Rule]:
    """The same rules, but the norms' weights are stored less 1.

    1 + w of 16 bits would lose the low ones of w: it is float32, as transformers adds them, and there and back w is the
    same bits from 2^-16 on.
    """
    return [
        Rule(rule.ours, rule.theirs, _one_more, lambda t: [t[0] - 1]) if rule.ours[0].endswith("norm.weight") else rule
        for rule in rules
    ]


def _one_more(tensors: list[Tensor]) -> list[Tensor]:
    return [1 + t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return stored_less_one(decoder.rules(shapes))


GEMMA = Family("gemma", "GemmaForCausalLM", read, decoder.written, rules)
