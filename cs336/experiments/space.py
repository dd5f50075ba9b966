"""What varies between the runs of a study: dotted keys of a configuration, and the values they take.

"optimizer.lr" = {low = 1e-4, high = 1e-2, log = true}      a range, for random search
"model.d_model" = [64, 128, 256]                            a choice
"model" = [{d_model = 64, num_layers = 2}, {d_model = 128, num_layers = 4}]     keys that go together
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cs336.utils import config as configs

Options = dict[str, Any]
"""Of one run: dotted key -> its value."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False
    """Evenly in the logarithm."""
    integer: bool = False
    """Whole numbers only."""

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range goes from low up to high, got {self.low:g} to {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range begins above zero, got {self.low:g}")

    def at(self, place: float) -> float | int:
        """The value at a place from 0 to 1."""
        low, high = (self.low, self.high + 1) if self.integer else (self.low, self.high)
        value = low * (high / low) ** place if self.log else low + (high - low) * place
        return min(int(value), int(self.high)) if self.integer else float(f"{value:.6g}")  # short in file and table


Axis = tuple[Any, ...] | Range


def axes(vary: Mapping[str, Any]) -> dict[str, Axis]:
    """The values of a [vary] table. Raises ValueError, naming the key, for what is neither a list nor a range."""
    found: dict[str, Axis] = {}
    for key, value in vary.items():
        if isinstance(value, list | tuple) and value:
            found[key] = tuple(value)
        elif isinstance(value, Mapping) and {"low", "high"} <= set(value):
            try:
                found[key] = configs.parse(Range, value)
            except ValueError as error:
                raise ValueError(f"vary.{key}: {error}") from None
        else:
            raise ValueError(f"vary.{key} must be a list of values, or a range {{low = 1, high = 2}}; got {value!r}")
    return found


def grid(space: Mapping[str, Axis]) -> list[Options]:
    """Every combination, the last key fastest. Raises ValueError for a range, which has no end of values."""
    for key, axis in space.items():
        if isinstance(axis, Range):
            raise ValueError(f"vary.{key} is a range: list its values for a grid, or search = {{kind = 'random'}}")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]  # type: ignore[arg-type]


def sample(space: Mapping[str, Axis], count: int, seed: int) -> list[Options]:
    """`count` points at random. Each follows from its number and the seed alone, so that more keep the first ones."""
    drawn = []
    for number in range(count):
        places = np.random.default_rng([seed, number]).random(len(space))
        drawn.append({key: _at(axis, place) for (key, axis), place in zip(space.items(), places, strict=True)})
    return drawn


def _at(axis: Axis, place: float) -> Any:
    return axis.at(place) if isinstance(axis, Range) else axis[min(int(place * len(axis)), len(axis) - 1)]


def apply(table: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's table with options applied: a copy.

    A table among them goes into the one that is there, key by key; one with a kind takes its place, and a kind alone
    begins from that kind's defaults. Raises ValueError for a key that leads nowhere.
    """
    changed = copy.deepcopy(dict(table))
    for key, value in options.items():
        _put(changed, key.split("."), copy.deepcopy(value), key)
    return changed


def _put(place: Any, path: Sequence[str], value: Any, key: str) -> None:
    name, *rest = path
    if isinstance(place, list):
        if not (name.isdecimal() and int(name) < len(place)):
            raise ValueError(f"{key}: expected a place in a list of {len(place)}, got {name!r}")
        index: Any = int(name)
    elif isinstance(place, dict):
        index = name
    else:
        raise ValueError(f"{key}: there is no table above {name!r}")
    if rest:
        if isinstance(place, dict):
            place.setdefault(index, {})
        _put(place[index], rest, value, key)
        return
    there = place[index] if isinstance(place, list) else place.get(index)
    if isinstance(value, dict) and isinstance(there, dict) and configs.TAG not in value:
        for inner, of in value.items():
            _put(there, inner.split("."), of, f"{key}.{inner}")
        return
    if index == configs.TAG and there != value:
        place.clear()
    place[index] = value


def label(options: Mapping[str, Any]) -> str:
    """Options as people read them: "lr 0.003, mlp gelu"."""
    ends = {key: key.removesuffix(f".{configs.TAG}").rpartition(".")[2] for key in options}
    return ", ".join(f"{ends[key]} {shown(value)}" for key, value in options.items()) or "as it is"


def shown(value: Any) -> str:
    """A value in a few characters; of a table its kind, or its keys."""
    if isinstance(value, Mapping):
        return str(value[configs.TAG]) if configs.TAG in value else " ".join(_pairs(value))
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    return (f"{key} {shown(value)}" for key, value in table.items())
