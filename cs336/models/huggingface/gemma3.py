"""Gemma 3, text: Gemma 2 with normed queries and keys instead of soft-capped scores, and two rotary bases.

One is of the layers with a window, one, which may be scaled, of the others.
"""

from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface import gemma2
from cs336.models.huggingface.family import Family
from cs336.models.huggingface.fields import Fields
from cs336.models.huggingface.rotary import rope_of, write_rope
from cs336.nn import AttentionConfig, RopeConfig

THETA, LOCAL_THETA, EVERY = 1e6, 1e4, 6


def read(fields: Fields) -> TransformerConfig:
    fields.only("attn_logit_softcapping")
    local, everywhere = _ropes(fields)
    sliding, full = gemma2.blocks(fields, {"qk_norm": True}, local, everywhere)
    every = fields.count("sliding_window_pattern", fields.count("_sliding_window_pattern", EVERY))
    return gemma2.model(fields, sliding, full, every, fields.number("final_logit_softcapping"))


def _ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """Of layers with a window, and of those without: a table each in new files, fields by themselves in old ones."""
    theta, local = fields.number("rope_theta", THETA), fields.number("rope_local_base_freq", LOCAL_THETA)
    both = [fields.take(name, {}) for name in ("rope_parameters", "rope_scaling")]
    tables, scaling = both
    known = {gemma2.WINDOW, gemma2.FULL}
    if not all(isinstance(table, dict) for table in both) or not tables.keys() <= known:
        fields.refuse("rope_parameters" if "rope_parameters" in fields.table else "rope_scaling")
    sliding, full = (tables.get(kind) or {} for kind in (gemma2.WINDOW, gemma2.FULL))
    if not isinstance(sliding, dict) or not isinstance(full, dict):
        fields.refuse("rope_parameters")
    return rope_of(sliding, fields, local), rope_of(full | scaling, fields, theta)


def write(config: TransformerConfig) -> dict[str, Any] | None:
    kinds: dict[bool, RopeConfig] = {}
    for block in config.blocks:
        if isinstance(block.mixer, AttentionConfig) and isinstance(block.positions, RopeConfig):
            kinds[block.mixer.window is not None] = block.positions
    full, local = (kinds.get(windowed, RopeConfig(theta)) for windowed, theta in ((False, THETA), (True, LOCAL_THETA)))
    fields, rope = gemma2.write(config), write_rope(full)
    if fields is None or rope is None:
        return None
    for name in ("rope_theta", "rope_scaling", "attn_logit_softcapping"):
        fields.pop(name, None)
    return fields | rope | {"rope_local_base_freq": local.theta}


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", read, write, gemma2.rules)
