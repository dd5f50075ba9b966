"""What Llama and its many relatives share: RMSNorm, rotary grouped-query attention, a gated MLP in every block."""

from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.block import MLP, BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface.family import Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_rope, write_rope
from cs336.nn import AttentionConfig, GELUConfig, MLPConfig, RMSNormConfig, RopeConfig, SwiGLUConfig

# their name of an activation -> ours
SAME = {name: name for name in ("silu", "gelu", "relu", "relu2", "sigmoid")}
ACTIVATIONS = SAME | {"swish": "silu"} | dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
THEIR_ACTIVATIONS = SAME | {"gelu_tanh": "gelu_pytorch_tanh"}
# the start of a name of ours -> theirs
NAMES = {
    ".attention_norm.": "model.layers.{layer}.input_layernorm.",
    ".attention.": "model.layers.{layer}.self_attn.",
    ".mlp_norm.": "model.layers.{layer}.post_attention_layernorm.",
    ".mlp.": "model.layers.{layer}.mlp.",
    "embedding.": "model.embed_tokens.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
}


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return renamed(shapes, NAMES)


def sizes(fields: Fields) -> dict[str, Any]:
    """Arguments of TransformerConfig."""
    fields.require("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    return {
        "vocab_size": fields.take("vocab_size"),
        "context_length": fields.take("max_position_embeddings"),
        "num_layers": fields.count("num_hidden_layers"),
        "d_model": fields.count("hidden_size"),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "init_std": fields.number("initializer_range", 0.02),
    }


def heads(fields: Fields, num_kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """Arguments of AttentionConfig; what the family takes for those that are left out."""
    return {
        "num_heads": fields.take("num_attention_heads"),
        "num_kv_heads": fields.take("num_key_value_heads", num_kv_heads),
        "head_dim": fields.take("head_dim", head_dim),
        "dropout": fields.number("attention_dropout", 0.0),
    }


def activation(fields: Fields, name: str = "hidden_act", default: str = "silu") -> Any:
    theirs = fields.take(name, default)
    if not isinstance(theirs, str) or theirs not in ACTIVATIONS:
        fields.refuse(name)
    return ACTIVATIONS[theirs]


def mlp(activation: Any, gated: bool, d_ff: int | None, bias: bool) -> MLP:
    """By its short name where it has one."""
    if not bias and (activation, gated) == ("silu", True):
        return SwiGLUConfig(d_ff)
    if not bias and (activation, gated) == ("gelu", False):
        return GELUConfig(d_ff)
    return MLPConfig(activation, gated, d_ff, bias)


def gated_mlp(fields: Fields, bias: bool = False) -> MLP:
    fields.require("intermediate_size")
    return mlp(activation(fields), True, fields.take("intermediate_size"), bias)


def decoder(
    fields: Fields, mixer: AttentionConfig, mlp: MLP, *, eps: float = 1e-6, theta: float = 10000.0, **block: Any
) -> TransformerConfig:
    """eps, theta: where they are left out."""
    norm = RMSNormConfig(fields.number("rms_norm_eps", eps))
    positions = block.pop("positions", None) or read_rope(fields, theta)
    return TransformerConfig(**sizes(fields), layers=(BlockConfig(mixer, mlp, norm, positions, **block),))


def no_window(fields: Fields) -> None:
    """Raises ValueError where Qwen's layers do not see all that is before."""
    fields.only("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):
        fields.take(name)
    kinds = fields.take("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        fields.refuse("layer_types")


def written(config: TransformerConfig, *, partial: bool = False) -> dict[str, Any] | None:
    """The fields that they share; None for a model whose blocks differ or are of other kinds.

    partial: see `write_rope`.
    """
    block = config.blocks[0]
    mixer, positions, eps = block.mixer, block.positions, block.norm.eps
    if len(set(config.blocks)) > 1 or not (isinstance(mixer, AttentionConfig) and isinstance(positions, RopeConfig)):
        return None
    rope = write_rope(positions, partial=partial)
    if rope is None:
        return None
    fields = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_size(config.d_model),
        "rms_norm_eps": eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": mixer.dropout,
        "attention_bias": mixer.qkv_bias,
    } | rope
    if isinstance(block.mlp, SwiGLUConfig | GELUConfig | MLPConfig):
        fields["intermediate_size"] = block.mlp.width(config.d_model)
        fields["hidden_act"] = THEIR_ACTIVATIONS.get(block.mlp.activation)  # None: theirs have none like it
    return fields
