"""The arms of an ablation: configurations that differ in one thing, and are of one size.

A layer's part (mixer, mlp, norm, positions, placement) is replaced in every layer, and the MLPs' hidden width d_ff is
then solved for, in whole features, so that parameters or FLOPs a token are as near to the first arm's as they can be.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cs336.experiments import space
from cs336.models import BlockConfig, TransformerConfig
from cs336.training import TrainConfig
from cs336.utils import config as configs

Match = Literal["params", "flops", "none"]
PARTS = ("mixer", "mlp", "norm", "positions")
MOST_WIDTH = 1024  # times d_model: a d_ff that is looked for
FAR = 0.05  # of the reference: an arm that stays further off is refused


@dataclass(frozen=True)
class Arm:
    name: str
    config: TrainConfig
    residual: float
    """Of what is matched: this arm's over the first one's, less one; 0 where nothing is."""
    d_ff: int | None = None
    """The width that was solved for."""


def split_values(text: str) -> list[str]:
    """The parts between commas that no bracket or quote holds: 'a,{kind="b",n=1}' -> ['a', '{kind="b",n=1}']."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def make_arms(base: TrainConfig, key: str, values: Sequence[str], match: Match) -> list[Arm]:
    """An arm a value, the first the reference.

    Args:
        key: a part of every layer (mixer, mlp, norm, positions, placement), or a dotted key of the configuration.
        values: kinds, TOML tables that have one, or other TOML values; ["all"] is every kind of a part there is.

    Raises ValueError for a value that does not fit the base, and for one that cannot be brought to the size asked for.
    """
    if list(values) == ["all"] and key in PARTS:
        values = kinds(key)
    if len(values) < 2:
        raise ValueError(f"an ablation takes two values or more, got {key} = {', '.join(values) or 'nothing'}")
    if len(set(values)) < len(values):
        raise ValueError(f"values must differ, got {', '.join(values)}")
    in_layers = key in PARTS or key == "placement"
    made = [(_layered if in_layers else _dotted)(base, key, value) for value in values]
    reference = made[0]
    arms = [Arm(values[0], reference, 0.0)]
    for name, config in zip(values[1:], made[1:], strict=True):
        arms.append(Arm(name, config, 0.0) if match == "none" else _matched(name, config, reference, match))
    return arms


def kinds(part: str) -> list[str]:
    """Every kind of a layer's part, that of the plain block first; but for no MLP, which has no width to match by."""
    return [kind for kind in _union(part) if (part, kind) != ("mlp", "none")]


def _union(part: str) -> dict[str, type]:
    hint = typing.get_type_hints(BlockConfig)[part]
    return {member.kind: member for member in typing.get_args(hint)}


def _layered(base: TrainConfig, part: str, value: str) -> TrainConfig:
    """The base with a part of every layer replaced."""
    model = base.model
    new = value if part == "placement" else _part(model, part, value)
    blocks = []
    for block in model.blocks:
        table = configs.to_table(block)
        old = table.get(part)
        table[part] = old if isinstance(new, dict) and set(new) == {"kind"} and old["kind"] == new["kind"] else new
        if isinstance(table[part], dict) and part != "positions":
            table[part] = _filled(part, table[part], model)
            if part == "mixer" and not _takes(table[part]["kind"], table["positions"]["kind"], block):
                del table["positions"]
        blocks.append(table)
    unique = [blocks[0]] if all(block == blocks[0] for block in blocks) else blocks
    plain = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}
    whole = {name: item for name, item in configs.to_table(model).items() if name not in SHORT_FORM}
    changed = {"model": {n: v for n, v in whole.items() if n in plain} | {"layers": unique}}
    try:
        return TrainConfig.from_table(configs.to_table(base) | changed)
    except ValueError as error:
        raise ValueError(f"{part}={value}: {error}") from None


SHORT_FORM = {"num_heads", "num_kv_heads", "head_dim", "qk_norm", "qkv_bias", "d_ff", "norm_eps"}
SHORT_FORM |= {"rope_theta", "rope_interleaved", "pattern"}


def _part(model: TransformerConfig, part: str, value: str) -> dict[str, Any]:
    known = _union(part)
    table = _toml(value) if value.startswith("{") else {"kind": value}
    if not isinstance(table, dict) or table.get("kind") not in known:
        raise ValueError(f'{part}={value}: expected {", ".join(known)}, or a table {{kind = "...", ...}}')
    return table


def _takes(kind: str, positions: str, before: BlockConfig) -> bool:
    """Whether a mixer's positions may stay as they are: not where the old one had none for want of rotary ones."""
    known = _union("mixer")[kind].takes_positions  # type: ignore[attr-defined]
    return positions in known and ("rope" in before.mixer.takes_positions or "rope" not in known)


def _filled(part: str, table: Mapping[str, Any], model: TransformerConfig) -> dict[str, Any]:
    """A table with the fields that a kind must be told and a name alone leaves out, as the base's size suggests."""
    counts = (getattr(block.mixer, "num_heads", None) for block in model.blocks)  # Mamba-2's is a method
    heads = next((count for count in counts if isinstance(count, int)), max(1, model.d_model // 64))
    per_head = model.d_model // heads
    suggested: dict[str, dict[str, Any]] = {
        "attention": {"num_heads": heads},
        "latent_attention": {
            "num_heads": heads,
            "kv_rank": max(1, model.d_model // 4),
            "head_dim": per_head,
            "rope_head_dim": max(2, per_head // 4 * 2),
        },
        "linear_attention": {"num_heads": heads},
        "mamba2": {"head_dim": math.gcd(2 * model.d_model, 64), "state_dim": min(128, model.d_model)},
        "hyena": {"filter_length": model.context_length},
        "moe": {"num_experts": 8, "top_k": 2},
    }
    return suggested.get(str(table["kind"]), {}) | dict(table)


def _dotted(base: TrainConfig, key: str, value: str) -> TrainConfig:
    try:
        return TrainConfig.from_table(space.apply(configs.to_table(base), {key: _toml(value)}))
    except ValueError as error:
        raise ValueError(f"{key}={value}: {error}") from None


def _toml(value: str) -> Any:
    """A TOML value; a bare word is a string."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if value.startswith(("{", "[", '"')):
            raise ValueError(f"{value} is no TOML value") from None
        return value


# ---- of one size ----


def size(config: TrainConfig, match: Match) -> int:
    """Parameters, or training FLOPs a token."""
    return config.model.num_parameters() if match == "params" else config.model.flops_per_token()


def _matched(name: str, config: TrainConfig, reference: TrainConfig, match: Match) -> Arm:
    target = size(reference, match)

    def at(width: int) -> TrainConfig:
        return _with_width(name, config, width)

    low = _largest_within(lambda width: size(at(width), match) <= target, MOST_WIDTH * config.model.d_model)
    width = min((w for w in (low, low + 1) if w), key=lambda w: abs(size(at(w), match) - target))
    residual = size(at(width), match) / target - 1
    if abs(residual) > FAR:
        what = "parameters" if match == "params" else "FLOPs a token"
        raise ValueError(
            f"{name} cannot be matched: with d_ff {width} it has {size(at(width), match):,} {what}, the first arm has "
            f"{target:,}; give the base's MLPs a larger d_ff, this arm a smaller table, or --match none"
        )
    return Arm(name, at(width), residual, width)


def _largest_within(fits: Callable[[int], bool], most: int) -> int:
    """The largest width from 1 to `most` that fits, of a size that grows with it; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _with_width(name: str, config: TrainConfig, d_ff: int) -> TrainConfig:
    model = config.model
    if model.layers is None:
        return dataclasses.replace(config, model=dataclasses.replace(model, d_ff=d_ff))
    layers = []
    for block in model.layers:
        if not hasattr(block.mlp, "d_ff"):
            raise ValueError(f"{name} cannot be matched: an MLP of kind {block.mlp.kind!r} has no d_ff to solve for")
        mlp = dataclasses.replace(block.mlp, d_ff=d_ff)  # type: ignore[arg-type]
        layers.append(dataclasses.replace(block, mlp=mlp))
    return dataclasses.replace(config, model=dataclasses.replace(model, layers=tuple(layers)))
