"""How a model's layers are quantised, whatever the format says it in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from cs336.models.huggingface.quantized.tensors import Tensors
from cs336.nn import QuantizedLinear, QuantizedWeight, QuantMethod
from cs336.nn.checks import check_counts
from cs336.nn.quantized import TOKEN

BITS: dict[Any, QuantMethod] = {4: "int4", 8: "int8"}


@dataclass(frozen=True)
class Scheme:
    """Raises ValueError for a group below 1."""

    method: QuantMethod
    group: int | None
    """None: the whole row."""
    zeros: bool = False
    order: bool = False
    x_group: int | None = None
    """Of fp8: features of x that share a scale as it is rounded too, TOKEN for all; None: it is not."""

    def __post_init__(self):
        check_counts(optional=True, group=self.group)
        if self.x_group is not None and self.method != "fp8":
            raise ValueError(f"x_group is of fp8, got it with {self.method}")
        if self.x_group != TOKEN:
            check_counts(optional=True, x_group=self.x_group)

    @property
    def bits(self) -> int:
        return 4 if self.method == "int4" else 8

    def groups(self, in_features: int) -> int:
        return 1 if self.group is None else -(-in_features // self.group)


def scheme_of(layers: Mapping[str, QuantizedLinear]) -> Scheme:
    """What the layers have in common. Raises ValueError where they differ."""
    found = {Scheme(m.method, m.group, m.zeros is not None, m.order is not None, m.x_group) for m in layers.values()}
    if all(m.group == m.in_features for m in layers.values()):
        found = {replace(scheme, group=None) for scheme in found}
    if len({(scheme.method, scheme.group, scheme.x_group) for scheme in found}) > 1:
        shown = ", ".join(sorted(f"{scheme.method} in groups of {scheme.group}" for scheme in found))
        raise ValueError(f"one directory holds layers of one kind, got {shown}")
    first = found.pop()
    return replace(
        first, zeros=first.zeros or any(s.zeros for s in found), order=first.order or any(s.order for s in found)
    )


class Format(Protocol):
    @property
    def mark(self) -> str:
        """The last part of the name of a tensor that only quantised layers have."""

    @property
    def scheme(self) -> Scheme: ...

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Format":
        """Of a quantization_config. Raises ValueError, naming the field, for what is not read."""

    @classmethod
    def like(cls, scheme: Scheme) -> "Format":
        """Raises ValueError for what the format cannot say."""

    def config(self, unquantized: list[str]) -> dict[str, Any]:
        """The quantization_config. unquantized: names of the linear layers that are not."""

    def read(self, tensors: Tensors, out_features: int, in_features: int) -> QuantizedWeight:
        """Raises ValueError by the name of a tensor."""

    def write(self, weight: QuantizedWeight, group: int) -> dict[str, Tensor]:
        """By the last part of their names. Raises ValueError for a shape that the format does not have."""


def refuse(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"quantization_config has {name} = {value!r}: expected {expected}")
