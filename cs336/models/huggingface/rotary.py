"""rope_theta, rope_scaling and, since transformers 5, rope_parameters: there and back."""

import dataclasses
import math
from typing import Any

from cs336.models.huggingface.fields import Fields
from cs336.nn import LinearScaling, Llama3Scaling, NtkScaling, RopeConfig, YarnScaling
from cs336.nn.rope_scaling import RopeScaling


def read_rope(fields: Fields, default_theta: float = 10000.0) -> RopeConfig:
    """Raises ValueError for a kind of scaling, or a field of it, that is not known."""
    theta = fields.number("rope_theta", default_theta)
    fields.only("partial_rotary_factor", 1.0)
    table: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.take(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"config.json has {name} = {value!r}: expected a table")
        table |= value
    return rope_of(table, fields, theta)


def rope_of(table: dict[str, Any], fields: Fields, theta: float, **options: Any) -> RopeConfig:
    """Of a table like rope_parameters, whose model has these fields; theta where it has none."""
    rope = Fields(table, above="rope_parameters.")
    theta = rope.number("rope_theta", theta)
    rope.only("partial_rotary_factor", 1.0)
    scaling = _read_scaling(rope, fields)
    rope.finish()
    return RopeConfig(theta, scaling=scaling, **options)


def write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    """None for what transformers has not."""
    if rope.fraction != 1 or isinstance(rope.scaling, NtkScaling):
        return None
    written: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling is None:
        return written
    table = {k: v for k, v in dataclasses.asdict(rope.scaling).items() if v is not None}
    table["rope_type"] = table.pop("kind")
    if "original_context_length" in table:
        table["original_max_position_embeddings"] = table.pop("original_context_length")
    return written | {"rope_scaling": table}


def _read_scaling(rope: Fields, fields: Fields) -> RopeScaling | None:
    kind = rope.take("rope_type", rope.take("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        rope.refuse("rope_type" if "rope_type" in rope.table else "type")
    if kind != "yarn":
        rope.require("factor")
    factor = rope.number("factor")
    if kind == "linear":
        return LinearScaling(factor)
    if kind == "llama3":
        rope.require("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return Llama3Scaling(factor, rope.take("original_max_position_embeddings"), low, high)
    length = fields.number("max_position_embeddings")
    original = rope.take("original_max_position_embeddings", length)
    factor = length / original if factor is None else factor
    return YarnScaling(
        factor,
        original,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        rope.flag("truncate", True),
        _attention_factor(rope, factor),
    )


def _attention_factor(rope: Fields, factor: float) -> float | None:
    """DeepSeek's mscale, which says it as a ratio; None for YaRN's own."""
    given, scale, scale_all = (rope.number(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (scale and scale_all):
        return given
    above, below = (0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0 for m in (scale, scale_all))
    return above / below
