"""Mamba-2: blocks of a mixer alone. It has no longest text: CONTEXT where the file says none."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from cs336.models.block import BlockConfig
from cs336.models.config import TransformerConfig
from cs336.models.huggingface.family import Family, Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import Mamba2Config, NoMLPConfig, RMSNormConfig

CONTEXT = 1 << 20
INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it
NAMES = {
    ".attention_norm.": "backbone.layers.{layer}.norm.",
    ".attention.": "backbone.layers.{layer}.mixer.",
    "embedding.": "backbone.embeddings.",
    "norm.": "backbone.norm_f.",
    "head.": "lm_head.",
}
OF_TRAINING = ("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual")
OF_ROUNDING = ("chunk_size", "residual_in_fp32")


def read(fields: Fields) -> TransformerConfig:
    fields.require("vocab_size", "hidden_size", "num_hidden_layers")
    fields.only("hidden_act", "silu", "swish")
    fields.only("use_bias", False)
    fields.only("use_conv_bias", True)
    fields.only("rms_norm", True)  # of older files, in which it is always there
    fields.only("time_step_limit", [0.0, math.inf], (0.0, math.inf), [0.0, INFINITY])
    for name in OF_TRAINING + OF_ROUNDING:
        fields.take(name)
    mixer = Mamba2Config(
        state_dim=fields.take("state_size", 128),
        head_dim=fields.count("head_dim", 64),
        expand=fields.count("expand", 2),
        num_groups=fields.take("n_groups", 8),
        conv_size=fields.take("conv_kernel", 4),
    )
    d_model = fields.count("hidden_size")
    if fields.count("num_heads", 128) != mixer.num_heads(d_model):
        fields.refuse("num_heads", 128)
    return TransformerConfig(
        vocab_size=fields.take("vocab_size"),
        context_length=fields.take("max_position_embeddings", CONTEXT),
        num_layers=fields.count("num_hidden_layers"),
        d_model=d_model,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range", 0.1),
        layers=(BlockConfig(mixer, NoMLPConfig(), RMSNormConfig(fields.number("layer_norm_epsilon", 1e-5))),),
    )


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block = config.blocks[0]
    if len(set(config.blocks)) > 1 or not isinstance(block.mixer, Mamba2Config):
        return None
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_heads": block.mixer.num_heads(config.d_model),
        "head_dim": block.mixer.head_dim,
        "state_size": block.mixer.state_dim,
        "expand": block.mixer.expand,
        "n_groups": block.mixer.num_groups,
        "conv_kernel": block.mixer.conv_size,
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return renamed(shapes, NAMES)


MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", read, write, rules, prefix="backbone.")
