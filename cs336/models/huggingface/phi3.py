"""Phi-3 and Phi-4: Llama with one matrix for q, k and v, one for gate and up, and a part of each head rotated.

Their longer contexts are LongRoPE's, as which transformers takes several names: see LongRopeScaling for its two sets of
factors. Phi-3's original length stands outside of rope_scaling.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import decoder
from cs336.models.huggingface.family import Family, Rule, layer_names, renamed
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_fraction, read_rope
from cs336.nn import AttentionConfig, LongRopeScaling, RopeConfig

# What releases say of themselves and transformers does not read.
PLAIN = {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}
ORIGINAL, ORIGINAL_LENGTH = "original_max_position_embeddings", 4096  # where it is left out
FUSED = {
    "self_attn.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def read(fields: Fields) -> TransformerConfig:
    for name, value in PLAIN.items():
        fields.only(name, value)
    heads = decoder.heads(fields, num_kv_heads=fields.count("num_attention_heads"))
    mixer = AttentionConfig(**heads, window=fields.take("sliding_window"))
    _check_scaling(fields)
    rope = read_rope(fields, original=fields.count(ORIGINAL, ORIGINAL_LENGTH), fraction=read_fraction(fields))
    dropout = fields.number("resid_pdrop", 0.0)
    config = decoder.decoder(fields, mixer, decoder.gated_mlp(fields), eps=1e-5, positions=rope, dropout=dropout)
    return dataclasses.replace(config, embedding_dropout=fields.number("embd_pdrop", 0.0))


def _check_scaling(fields: Fields) -> None:
    """Raises ValueError, naming its kind, for what is not LongRoPE: "yarn" of old files was computed otherwise than
    transformers now does."""
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(table := fields.table.get(name), dict):
            for kind in ("rope_type", "type"):
                Fields(table, above=f"{name}.").only(kind, "default", "longrope", "su")


def write(config: TransformerConfig) -> dict[str, Any] | None:
    block = config.blocks[0]
    fields = decoder.written(config, partial=True)
    if fields is None or fields.pop("attention_bias") or not isinstance(block.positions, RopeConfig):
        return None
    if isinstance(scaling := block.positions.scaling, LongRopeScaling):
        fields[ORIGINAL] = scaling.original_context_length
    return fields | {
        "pad_token_id": None,  # left out it is 32000, which a smaller vocabulary lacks
        "partial_rotary_factor": block.positions.fraction,
        "sliding_window": getattr(block.mixer, "window", None),
        "resid_pdrop": block.dropout,
        "embd_pdrop": config.embedding_dropout,
    }


def rules(shapes: Mapping[str, torch.Size]) -> list[Rule]:
    return one_above_the_other(shapes, FUSED, "model.layers.{layer}.{name}.weight", decoder.NAMES)


def one_above_the_other(
    shapes: Mapping[str, torch.Size], fused: Mapping[str, tuple[str, ...]], place: str, names: Mapping[str, str]
) -> list[Rule]:
    """fused: their name of a matrix, and ours of those whose rows it holds; place: how it is named; names: of the rest,
    as in `renamed`."""
    found, parts = [], {part for several in fused.values() for part in several}
    for layer, of_layer in layer_names(shapes).items():
        own = [name for name in of_layer if name.removeprefix(f"layers.{layer}.").removesuffix(".weight") not in parts]
        found += renamed(own, names)
        for name, several in fused.items() if layer else ():
            ours = tuple(f"layers.{layer}.{part}.weight" for part in several)
            if not shapes.keys() & set(ours):
                continue  # of quantised layers
            found.append(_joined(ours, place.format(layer=layer, name=name), [shapes[each][0] for each in ours]))
    return found


def _joined(ours: tuple[str, ...], theirs: str, rows: list[int]) -> Rule:
    def read(tensors: list[Tensor]) -> list[Tensor]:
        return list(tensors[0].split(rows))

    return Rule(ours, (theirs,), read, lambda tensors: [torch.cat(tensors)], stacked=True)


PHI3 = Family("phi3", "Phi3ForCausalLM", read, write, rules)
