"""rope_theta, rope_scaling and, since transformers 5, rope_parameters: there and back."""

import dataclasses
import math
from typing import Any

from cs336.models.config import TransformerConfig
from cs336.models.huggingface.fields import Fields
from cs336.nn import (
    AttentionConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    RopeConfig,
    YarnScaling,
)
from cs336.nn.rope_scaling import RopeScaling

WINDOW, FULL = "sliding_attention", "full_attention"  # layer_types
FACTORS = ("short_factors", "long_factors")  # of LongRoPE, which transformers names in the singular


def read_rope(
    fields: Fields, default_theta: float = 10000.0, *, original: int | None = None, **options: Any
) -> RopeConfig:
    """Raises ValueError for a kind of scaling, or a field of it, that is not known. options: of RopeConfig.

    original: the context that LongRoPE stretched, of a family that says it outside of the table.
    """
    theta = fields.number("rope_theta", default_theta)
    fields.only("partial_rotary_factor", options.get("fraction", 1.0))
    table: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.take(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"config.json has {name} = {value!r}: expected a table")
        table |= value
    return rope_of(table, fields, theta, original=original, **options)


def read_fraction(fields: Fields, default: float = 1.0) -> Any:
    """Of a head that is rotated, which files say by itself or in rope_parameters."""
    table, said = fields.table.get("rope_parameters"), fields.take("partial_rotary_factor", default)
    return table.get("partial_rotary_factor", said) if isinstance(table, dict) else said


def read_ropes(fields: Fields, local: float, theta: float) -> tuple[RopeConfig, RopeConfig]:
    """Of layers with a window, and of those without: a table each in rope_parameters; rope_scaling is of the latter.

    local, theta: their bases where the tables have none.
    """
    both = [fields.take(name, {}) for name in ("rope_parameters", "rope_scaling")]
    tables, scaling = both
    if not all(isinstance(table, dict) for table in both) or not tables.keys() <= {WINDOW, FULL}:
        fields.refuse("rope_parameters" if "rope_parameters" in fields.table else "rope_scaling")
    sliding, full = (tables.get(kind) or {} for kind in (WINDOW, FULL))
    if not isinstance(sliding, dict) or not isinstance(full, dict):
        fields.refuse("rope_parameters")
    return rope_of(sliding, fields, local), rope_of(full | scaling, fields, theta)


def ropes_of(config: TransformerConfig, local: float, theta: float) -> tuple[RopeConfig, RopeConfig]:
    """Of a model's layers with a window, and of those without; of the bases given where there is none."""
    kinds = {True: RopeConfig(local), False: RopeConfig(theta)}
    for block in config.blocks:
        if isinstance(block.mixer, AttentionConfig) and isinstance(block.positions, RopeConfig):
            kinds[block.mixer.window is not None] = block.positions
    return kinds[True], kinds[False]


def write_ropes(local: RopeConfig, full: RopeConfig) -> dict[str, Any] | None:
    """As `read_ropes` reads them, and beside it as transformers 4 does; None for what transformers has not."""
    written = [write_rope(rope) for rope in (local, full)]
    if written[0] is None or written[1] is None:
        return None
    tables = [
        {"rope_type": "default", "rope_theta": rope["rope_theta"]} | rope.get("rope_scaling", {})
        for rope in written
        if rope is not None
    ]
    return written[1] | {"rope_parameters": dict(zip((WINDOW, FULL), tables, strict=True))}


def rope_of(
    table: dict[str, Any], fields: Fields, theta: float, *, original: int | None = None, **options: Any
) -> RopeConfig:
    """Of a table like rope_parameters, whose model has these fields; theta where it has none."""
    rope = Fields(table, above="rope_parameters.")
    theta = rope.number("rope_theta", theta)
    rope.only("partial_rotary_factor", options.get("fraction", 1.0))
    scaling = _read_scaling(rope, fields, original)
    rope.finish()
    return RopeConfig(theta, scaling=scaling, **options)


def write_rope(rope: RopeConfig, *, partial: bool = False) -> dict[str, Any] | None:
    """None for what transformers has not. partial: the family says by itself how much of a head is rotated."""
    if (rope.fraction != 1 and not partial) or isinstance(rope.scaling, NtkScaling):
        return None
    written: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling is None:
        return written
    table = {k: v for k, v in dataclasses.asdict(rope.scaling).items() if v is not None}
    table["rope_type"] = table.pop("kind")
    if "original_context_length" in table:
        table["original_max_position_embeddings"] = table.pop("original_context_length")
    for name in FACTORS:
        if name in table:
            table[name.removesuffix("s")] = list(table.pop(name))
    return written | {"rope_scaling": table}


def _read_scaling(rope: Fields, fields: Fields, original: int | None) -> RopeScaling | None:
    kind = rope.take("rope_type", rope.take("type", "default"))
    if kind == "default":
        return None
    if kind in ("longrope", "su"):
        return _read_longrope(rope, fields, original)
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


def _read_longrope(rope: Fields, fields: Fields, original: int | None) -> LongRopeScaling:
    """original: see `read_rope`."""
    rope.require("short_factor", "long_factor")
    fields.require("max_position_embeddings")
    length = fields.count("max_position_embeddings")
    said = rope.count("original_max_position_embeddings", length)
    original = said if original is None else original
    factor = rope.number("factor")
    if factor is None:
        factor = max(1.0, length / original)
    short, long = (_numbers(rope, name) for name in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, original, factor, rope.number("attention_factor"))


def _numbers(rope: Fields, name: str) -> tuple[float, ...]:
    values = rope.take(name)
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{rope.source} has {rope.above}{name} = {values!r:.80}: expected a list of numbers")
    return tuple(map(float, values))


def _attention_factor(rope: Fields, factor: float) -> float | None:
    """DeepSeek's mscale, which says it as a ratio; None for YaRN's own."""
    given, scale, scale_all = (rope.number(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not (scale and scale_all):
        return given
    above, below = (0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0 for m in (scale, scale_all))
    return above / below
