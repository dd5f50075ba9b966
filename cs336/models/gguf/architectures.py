"""Models that GGUF files hold, by general.architecture: how their metadata are read, and how their weights are named.

llama.cpp rotates neighbouring features in a Llama, whose query and key rows are in that order, and the halves of a head
in the others, as Hugging Face does. It adds the 1 to Gemma's norms that Hugging Face's files leave out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cs336.models.block import BlockConfig, Placement
from cs336.models.config import MOST_LAYERS, TransformerConfig
from cs336.models.huggingface import phi3
from cs336.models.huggingface.family import Rule, renamed
from cs336.models.huggingface.fields import Fields
from cs336.nn import AttentionConfig, LinearScaling, MLPConfig, RMSNormConfig, RopeConfig, SwiGLUConfig

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
PHI3_FUSED = dict(zip(("attn_qkv", "ffn_up"), phi3.FUSED.values(), strict=True))


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return renamed(shapes, NAMES)


def phi3_rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return phi3.one_above_the_other(shapes, PHI3_FUSED, "blk.{layer}.{name}.weight", NAMES)


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


def rope(fields: Fields, head_dim: int, theta: float = 10000.0, *, scales: bool = False, **options: Any) -> RopeConfig:
    """theta: where it is left out; scales: linear scaling is known."""
    fields.only("rope.dimension_count", head_dim)
    fields.only("rope.scaling.type", "none", *(["linear"] if scales else []))
    if fields.table.get("rope.scaling.type") == "linear":
        fields.require("rope.scaling.factor")
        options["scaling"] = LinearScaling(fields.number("rope.scaling.factor"))
    return RopeConfig(fields.number("rope.freq_base", theta), **options)


def read_llama(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields), interleaved=True)


def read_qwen2(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields, qkv_bias=True))


def read_qwen3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _like_llama(fields, sizes, attention(fields, qk_norm=True))


def read_phi3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    fields.take("rope.scaling.original_context_length")  # of longrope, whose factors would be weights
    mixer = attention(fields, window=fields.take("attention.sliding_window") or None)
    D = mixer.head_size(sizes["d_model"])
    turned = fields.count("rope.dimension_count", D)
    if turned > D or int(D * (turned / D)) != turned:
        fields.refuse("rope.dimension_count")
    return _like_llama(fields, sizes, mixer, turned, fraction=turned / D)


def _like_llama(
    fields: Fields, sizes: dict[str, Any], mixer: AttentionConfig, turned: int | None = None, **options: Any
) -> TransformerConfig:
    """turned: features of a head that are rotated; all if None. options: of RopeConfig."""
    positions = rope(fields, mixer.head_size(sizes["d_model"]) if turned is None else turned, **options)
    block = BlockConfig(mixer, SwiGLUConfig(fields.take("feed_forward_length")), norm(fields), positions)
    return TransformerConfig(**sizes, layers=(block,))


def read_gemma(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    return _gemma(fields, sizes, attention(fields), rope(fields, _head_dim(fields, sizes)))


def read_gemma2(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    mixer = attention(fields, scale=_scale(fields, sizes, 46), softcap=fields.number("attn_logit_softcapping", 50.0))
    everywhere, cap = rope(fields, _head_dim(fields, sizes)), fields.number("final_logit_softcapping", 30.0)
    window = fields.count("attention.sliding_window", 4096)
    return _gemma(fields, sizes, mixer, everywhere, (window, everywhere, 2), placement="sandwich", cap=cap)


def read_gemma3(fields: Fields, sizes: dict[str, Any]) -> TransformerConfig:
    mixer = attention(fields, scale=_scale(fields, sizes, 62), qk_norm=True)
    everywhere = rope(fields, _head_dim(fields, sizes), 1e6, scales=True)
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
    "gemma": Architecture(read_gemma),
    "gemma2": Architecture(read_gemma2),
    "gemma3": Architecture(read_gemma3),
}
