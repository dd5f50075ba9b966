"""GPT-2: LayerNorm, learned positions, biases everywhere, one matrix for queries, keys and values, stored (in, out)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface.decoder import THEIR_ACTIVATIONS, activation, mlp
from cs336.models.huggingface.family import Family, Rule, layer_names, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig, GELUConfig, LayerNormConfig, MLPConfig, NoPositionsConfig, SwiGLUConfig

NAMES = {
    ".attention_norm.": "transformer.h.{layer}.ln_1.",
    ".mlp_norm.": "transformer.h.{layer}.ln_2.",
    ".attention.o_proj.": "transformer.h.{layer}.attn.c_proj.",
    ".mlp.up_proj.": "transformer.h.{layer}.mlp.c_fc.",
    ".mlp.down_proj.": "transformer.h.{layer}.mlp.c_proj.",
    "embedding.": "transformer.wte.",
    "position_embedding.": "transformer.wpe.",
    "norm.": "transformer.ln_f.",
    "head.": "lm_head.",
}


def read(fields: Fields) -> TransformerConfig:
    fields.require("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    fields.only("scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.only(name, False)
    fields.only("n_ctx", fields.take("n_positions"))
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        fields.take(f"summary_{name}")  # of a head for classification
    mixer = AttentionConfig(
        fields.take("n_head"), qkv_bias=True, out_bias=True, dropout=fields.number("attn_pdrop", 0.1)
    )
    hidden = mlp(activation(fields, "activation_function", "gelu_new"), False, fields.take("n_inner"), True)
    norm, dropout = LayerNormConfig(fields.number("layer_norm_epsilon", 1e-5)), fields.number("resid_pdrop", 0.1)
    return TransformerConfig(
        vocab_size=fields.take("vocab_size"),
        context_length=fields.take("n_positions"),
        num_layers=fields.take("n_layer"),
        d_model=fields.take("n_embd"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        init_std=fields.number("initializer_range", 0.02),
        position_embedding="learned",
        embedding_dropout=fields.number("embd_pdrop", 0.1),
        layers=(BlockConfig(mixer, hidden, norm, NoPositionsConfig(), dropout=dropout),),
    )


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block = config.blocks[0]
    if len(set(config.blocks)) > 1 or not isinstance(block.mixer, AttentionConfig):
        return None
    if not isinstance(block.mlp, SwiGLUConfig | GELUConfig | MLPConfig):
        return None
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": block.mixer.num_heads,
        "n_inner": block.mlp.width(config.d_model),
        "activation_function": THEIR_ACTIVATIONS.get(block.mlp.activation),
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attn_pdrop": block.mixer.dropout,
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.embedding_dropout,
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    found: list[Rule] = []
    for layer, of_layer in layer_names(shapes).items():
        qkv = [name for name in of_layer if name.startswith(f"layers.{layer}.attention.") and "o_proj" not in name]
        for rule in renamed((name for name in of_layer if name not in qkv), NAMES):
            stored = layer and rule.ours[0].endswith("_proj.weight")
            found.append(Rule(rule.ours, rule.theirs, _transposed, _transposed) if stored else rule)
        for kind in ("weight", "bias") if qkv else ():
            ours = tuple(f"layers.{layer}.attention.{n}_proj.{kind}" for n in "qkv")
            found.append(Rule(ours, (f"transformer.h.{layer}.attn.c_attn.{kind}",), _parted, _joined))
    return found


def _transposed(tensors: list[Tensor]) -> list[Tensor]:
    return [t.T for t in tensors]


def _parted(tensors: list[Tensor]) -> list[Tensor]:
    """(M, 3 M) -> three of (M, M), or (3 M,) -> three of (M,)."""
    return [part.T if part.dim() == 2 else part for part in tensors[0].chunk(3, -1)]


def _joined(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat([t.T if t.dim() == 2 else t for t in tensors], -1)]


GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", read, write, rules, prefix="transformer.", ignored=(".attn.bias", ".attn.masked_bias")
)
