"""Gemma 3, text: Gemma 2 with normed queries and keys instead of soft-capped scores, and two rotary bases.

One is of the layers with a window, one, which may be scaled, of the others.
"""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import gemma2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import read_ropes, ropes_of, write_rope

THETA, LOCAL_THETA, EVERY = 1e6, 1e4, 6


def read(fields: Fields) -> TransformerConfig:
    fields.only("attn_logit_softcapping")
    theta, near = fields.number("rope_theta", THETA), fields.number("rope_local_base_freq", LOCAL_THETA)
    local, everywhere = read_ropes(fields, near, theta)
    sliding, full = gemma2.blocks(fields, {"qk_norm": True}, local, everywhere)
    every = fields.count("sliding_window_pattern", fields.count("_sliding_window_pattern", EVERY))
    return gemma2.model(fields, sliding, full, every, fields.number("final_logit_softcapping"))


def write(config: TransformerConfig) -> dict[str, Any] | None:
    local, full = ropes_of(config, LOCAL_THETA, THETA)
    fields, rope = gemma2.write(config), write_rope(full)
    if fields is None or rope is None:
        return None
    for name in ("rope_theta", "rope_scaling", "attn_logit_softcapping"):
        fields.pop(name, None)
    return fields | rope | {"rope_local_base_freq": local.theta}


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", read, write, gemma2.rules)
