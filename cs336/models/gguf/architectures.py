"""Models that GGUF files hold, by general.architecture: how their metadata are read, and how their weights are named.

llama.cpp rotates neighbouring features in a Llama, whose query and key rows are in that order, and in GLM-4; and the
halves of a head in the others, as Hugging Face does. It adds the 1 to Gemma's norms that their files leave out there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cs336.models.block import BlockConfig, Placement
from cs336.models.config import MOST_LAYERS, TransformerConfig
from cs336.models.huggingface import phi3
from cs336.models.huggingface.family import Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import (
    AttentionConfig,
    LinearScaling,
    LongRopeScaling,
    MLPConfig,
    RMSNormConfig,
    RopeConfig,
    SwiGLUConfig,
    YarnScaling,
)
from cs336.nn.rope_scaling import RopeScaling

NAMES = {
    ".attention_norm.": "blk.{layer}.attn_norm.",
    ".attention.q_proj.": "blk.{layer}.attn_q.",
    ".attention.k_proj.": "blk.{layer}.attn_k.",
    ".attention.v_proj.": "blk.{layer}.attn_v.",
    ".attention.o_proj.": "blk.{layer}.attn_output.",
    ".attention.q_norm.": "blk.{layer}.attn_q_norm.",
    ".attention.k_norm.": "blk.{layer}.attn_k_norm.",
    ".attention_post_norm.": "blk.{layer}.post_attention_norm.",
    ".mlp_norm.": "blk.{layer}.ffn_norm.",
    ".mlp.gate_proj.": "blk.{layer}.ffn_gate.",
    ".mlp.up_proj.": "blk.{layer}.ffn_up.",
    ".mlp.down_proj.": "blk.{layer}.ffn_down.",
    ".mlp_post_norm.": "blk.{layer}.post_ffw_norm.",
    "embedding.": "token_embd.",
    "norm.": "output_norm.",
    "head.": "output.",
}
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # LongRoPE's, weights that are read as metadata
PHI3_FUSED = dict(zip(("attn_qkv", "ffn_up"), phi3.FUSED.values(), strict=True))
GLM4_FUSED = {"ffn_up": PHI3_FUSED["ffn_up"]}


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return renamed(shapes, NAMES)


def phi3_rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return phi3.one_above_the_other(shapes, PHI3_FUSED, "blk.{layer}.{name}.weight", NAMES)


def glm4_rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return phi3.one_above_the_other(shapes, GLM4_FUSED, "blk.{layer}.{name}.weight", NAMES)


@dataclass(frozen=True)
class Architecture:
    read: Callable[[Fields, dict[str, Any]], TransformerConfig]
    """Of its own fields, and of the arguments of TransformerConfig that all have."""
    rules: Callable[[Mapping[str, torch.Size]], list[Rule]] = rules


def sizes(fields: Fields, rows: int, tied: bool) -> dict[str, Any]:
    """Arguments of TransformerConfig."""
    fields.require("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    fields.require("attention.layer_norm_rms_epsilon")
    fields.only("vocab_size", rows)
    if (depth := fields.count("block_count")) > MOST_LAYERS:
        fields.refuse("block_count")
    return {
        "vocab_size": rows,
        "context_length": fields.take("context_length"),
        "num_layers": depth,
        "d_model": fields.count("embedding_length"),
        "tie_embeddings": tied,
    }


def attention(fields: Fields, **options: Any) -> AttentionConfig:
    heads, size = fields.count("attention.head_count"), fields.count("attention.key_length")
    fields.only("attention.value_length", size)
    return AttentionConfig(heads, fields.take("attention.head_count_kv", heads), size, **options)


def norm(fields: Fields) -> RMSNormConfig:
    return RMSNormConfig(fields.number("attention.layer_norm_rms_epsilon"))


def rope(
    fields: Fields, head_dim: int, theta: float = 10000.0, *, kinds: tuple[str, ...] = (), **options: Any
) -> RopeConfig:
    """theta: where it is left out; kinds: of scaling that llama.cpp does, and this reads."""
    fields.only("rope.dimension_count", head_dim)
    fields.only("rope.scaling.type", "none", *kinds)
    fields.take("rope.scaling.finetuned")
    kind = fields.table.get("rope.scaling.type", "none")
    if "longrope" in kinds and SHORT in fields.table:
        kind = "longrope"  # which Phi-3's files do not say
    if kind != "none":
        options["scaling"] = SCALINGS[kind](fields)
    return RopeConfig(fields.number("rope.freq_base", theta), **options)


def _linear(fields: Fields) -> LinearScaling:
    fields.require("rope.scaling.factor")
    return LinearScaling(fields.number("rope.scaling.factor"))


def _yarn(fields: Fields) -> YarnScaling:
    """llama.cpp multiplies the attention factor of the paper by a file's own."""
    fields.require("rope.scaling.factor")
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    fields.only("rope.scaling.yarn_attn_factor", 1.0)
    fields.only("rope.scaling.yarn_log_multiplier", 0.0)
    factor, share = fields.number("rope.scaling.factor"), fields.number("rope.scaling.attn_factor", 1.0)
    betas = fields.number("rope.scaling.yarn_beta_fast", 32.0), fields.number("rope.scaling.yarn_beta_slow", 1.0)
    plain = YarnScaling(factor, _original(fields), *betas)
    return plain if share == 1 else dataclasses.replace(plain, attention_factor=share * (0.1 * math.log(factor) + 1))


def _longrope(fields: Fields) -> LongRopeScaling:
    """The factors are weights, and how many times longer the context becomes is not said: the attention factor is."""
    fields.require(SHORT, LONG)
    original, short, long = _original(fields), fields.take(SHORT), fields.take(LONG)
    factor, scale = max(1.0, fields.count("context_length") / original), fields.number("rope.scaling.attn_factor", 1.0)
    return LongRopeScaling(short, long, original, factor, scale)


def _original(fields: Fields) -> int:
    return fields.count("rope.scaling.original_context_length", fields.count("context_length"))


SCALINGS: dict[str, Callable[[Fields], RopeScaling]] = {"linear": _linear, "yarn": _yarn, "longrope": _longrope}


def read_llama(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields), interleaved=True, kinds=("linear", "yarn", "longrope"))


def read_qwen2(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields, qkv_bias=True), kinds=("linear", "yarn"))


def read_qwen3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields, qk_norm=True), kinds=("linear", "yarn"))


def read_phi3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    fields.take("rope.scaling.original_context_length")  # which files without LongRoPE have as well
    mixer = attention(fields, window=fields.take("attention.sliding_window") or None)
    return _like_llama(fields, sizes, mixer, partial=True, kinds=("longrope",))


def read_glm4(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    options: dict[str, Any] = {"interleaved": True, "kinds": ("linear", "yarn"), "placement": "sandwich"}
    return _like_llama(fields, sizes, attention(fields, qkv_bias=True), partial=True, **options)


def _like_llama(
    fields: Fields,
    sizes: dict[str, Any],
    mixer: AttentionConfig,
    *,
    partial: bool = False,
    placement: Placement = "pre",
    **options: Any,
) -> TransformerConfig:
    """partial: a part of each head may be rotated. options: of `rope`."""
    turned = D = mixer.head_size(sizes["d_model"])
    if partial:
        turned = fields.count("rope.dimension_count", D)
        if turned > D or int(D * (turned / D)) != turned:
            fields.refuse("rope.dimension_count")
        options["fraction"] = turned / D
    mlp, positions = SwiGLUConfig(fields.take("feed_forward_length")), rope(fields, turned, **options)
    return TransformerConfig(**sizes, layers=(BlockConfig(mixer, mlp, norm(fields), positions, placement),))


def read_gemma(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _gemma(fields, sizes, attention(fields), rope(fields, _head_dim(fields, sizes)))


def read_gemma2(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    mixer = attention(fields, scale=_scale(fields, sizes, 46), softcap=fields.number("attn_logit_softcapping", 50.0))
    everywhere, cap = rope(fields, _head_dim(fields, sizes)), fields.number("final_logit_softcapping", 30.0)
    window = fields.count("attention.sliding_window", 4096)
    return _gemma(fields, sizes, mixer, everywhere, (window, everywhere, 2), placement="sandwich", cap=cap)


def read_gemma3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    mixer = attention(fields, scale=_scale(fields, sizes, 62), qk_norm=True)
    everywhere = rope(fields, _head_dim(fields, sizes), 1e6, kinds=("linear",))
    local, cap = RopeConfig(fields.number("rope.freq_base_swa", 10000.0)), fields.number("final_logit_softcapping")
    window = fields.count("attention.sliding_window")
    turns = None if window is None else (window, local, _pattern(fields, sizes["num_layers"]))
    return _gemma(fields, sizes, mixer, everywhere, turns, placement="sandwich", cap=cap)


def _gemma(
    fields: Fields,
    sizes: dict[str, Any],
    mixer: AttentionConfig,
    everywhere: RopeConfig,
    turns: tuple[int, RopeConfig, int | list[bool]] | None = None,
    *,
    placement: Placement = "pre",
    cap: float | None = None,
) -> TransformerConfig:
    """turns: the window and the positions of all layers but each so-many-th, or of those that a list says."""
    mlp = MLPConfig("gelu_tanh", gated=True, d_ff=fields.take("feed_forward_length"))
    full = BlockConfig(mixer, mlp, norm(fields), everywhere, placement)
    layers: tuple[BlockConfig, ...] = (full,)
    if turns is not None:
        window, local, every = turns
        sliding = dataclasses.replace(full, mixer=dataclasses.replace(mixer, window=window), positions=local)
        if isinstance(every, int):
            every = [i % every != 0 for i in range(1, sizes["num_layers"] + 1)]
        layers = tuple(sliding if windowed else full for windowed in every)
    sizes = sizes | {"embedding_scale": sizes["d_model"] ** 0.5, "float32_norms": True}
    return TransformerConfig(**sizes, logit_softcap=cap, layers=layers)


def _pattern(fields: Fields, depth: int) -> int | list[bool]:
    """Of Gemma 3's windows: every how many layers there is none, or of each layer whether there is one."""
    name = "attention.sliding_window_pattern"
    said = fields.take(name)
    if not isinstance(said, list):
        return fields.count(name, 6)
    if len(said) != depth or not all(isinstance(windowed, bool) for windowed in said):
        fields.refuse(name)
    return said


def _head_dim(fields: Fields, sizes: dict[str, Any]) -> int:
    return attention(fields).head_size(sizes["d_model"])


def _scale(fields: Fields, sizes: dict[str, Any], layers_of_27b: int) -> float | None:
    """Of the scores, which no key says: llama.cpp knows the one model that is scaled otherwise by its layers."""
    other = sizes["num_layers"] == layers_of_27b
    return (sizes["d_model"] / fields.count("attention.head_count")) ** -0.5 if other else None


ARCHITECTURES = {
    "llama": Architecture(read_llama),
    "qwen2": Architecture(read_qwen2),
    "qwen3": Architecture(read_qwen3),
    "phi3": Architecture(read_phi3, phi3_rules),
    "glm4": Architecture(read_glm4, glm4_rules),
    "gemma": Architecture(read_gemma),
    "gemma2": Architecture(read_gemma2),
    "gemma3": Architecture(read_gemma3),
}
