import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.ops import registry
from cs336.ops.dispatch import transformed
from cs336.ops.linear_few_rows import keeps_weights, pays


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; inside cs336.invariant() ops.linear_invariant, and ops.linear_few_rows where that is faster."""
    if registry.is_invariant():
        return ops.linear_invariant(x, weight, bias)
    if pays(x, weight, bias):
        return ops.linear_few_rows(x, weight, bias, constant=keeps_weights(x))
    return F.linear(x, weight, bias)


class Joinable(Protocol):
    """A layer whose product may be one with others': see `join`."""

    def parts(self) -> tuple[Hashable, list[Tensor]] | None: ...

    def product(self, x: Tensor, *parts: Tensor) -> Tensor: ...


class Linear(nn.Linear):
    """torch.nn.Linear, y = x W^T + b, that begins as the field does today: without a bias, from a cut normal.

    x (..., in_features) -> (..., out_features); weight (out_features, in_features). Weights start as a normal of
    variance 2 / (in + out) (Glorot & Bengio 2010) cut at 3 standard deviations, bias as 0.
    """

    fp8 = False
    """Whether a training step multiplies in floats of 8 bits, by ops.linear_scaled: quantized.train_in_fp8 sets it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)

    def reset_parameters(self) -> None:
        std = (2 / (self.in_features + self.out_features)) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp8():
            return ops.linear_scaled(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def in_fp8(self) -> bool:
        """Whether the next product is of floats of 8 bits."""
        return self.fp8 and torch.is_grad_enabled() and not (registry.is_invariant() or transformed())

    def parts(self) -> tuple[Hashable, list[Tensor]] | None:
        """What one product with several layers reads, row by row, and what these must have in common; None if this
        layer is more than a product."""
        return (Linear, [self.weight]) if type(self) is Linear and is_bare(self) else None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """As forward, of these parts."""
        return linear(x, weight)


@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> None:
    """Put the weights of layers that read the same x one behind the other in memory, where `joined` multiplies x with
    all of them at once: few rows are read at the speed of launches. Each stays the parameter that it was, with
    memory of its own no more shared with any other tensor.

    Layers of different kinds, with biases or hooks, and those that lie so already, are left as they are.
    """
    for parts in _alike(layers) or ():
        if not _lie_together(parts):
            with torch.inference_mode(parts[0].is_inference()):  # else those made in it could not be viewed any more
                for part, data in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                    part.data = data


def joined(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """What each layer makes of x; with one product where their weights lie as `join` puts them and no gradient is
    wanted, and by ops.linears in a training step that torch.compile makes. On a GPU ops.linear_invariant gives a
    feature the same bits whatever features stand beside it."""
    found = _one_product(x, layers) or _one_fp8_product(x, layers)
    if found is not None:
        return found[0].split(found[1], -1)
    if _trained_together(layers):
        return ops.linears(x, [layer.weight for layer in layers])  # type: ignore[misc]
    return [layer(x) for layer in layers]


def in_a_row(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """What the layers make of x, (..., the sum of their features), as `joined` does."""
    found = _one_product(x, layers)
    return torch.cat([layer(x) for layer in layers], -1) if found is None else found[0]


def _one_product(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, list[int]] | None:
    """Of all layers, and the features of each; None where they do not lie together or a gradient is wanted."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or (registry.is_invariant() and not x.is_cuda):
        return None
    alike = _alike(layers)
    if alike is None or not all(parts[0].device == x.device and _lie_together(parts) for parts in alike):
        return None
    rows = [len(part) for part in alike[0]]
    wholes = [parts[0].as_strided((sum(rows), parts[0].shape[1]), parts[0].stride()) for parts in alike]
    return layers[0].product(x, *wholes), rows  # type: ignore[operator]


def side_by_side(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor | None:
    """What the layers make of x, (..., the sum of their features), by one product; None where that would cost copies.

    In a training step that torch.compile makes, weights are copied anyway, to be cast, and the gradient of x is one
    product as well, where layers called one by one leave their gradients to be added up.
    """
    if (found := _one_fp8_product(x, layers)) is not None:
        return found[0]
    if not _trained_together(layers):
        return None
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


def _one_fp8_product(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, list[int]] | None:
    """Of all layers, so that x is rounded once, and the features of each; None unless all multiply in 8 bits."""
    if not all(type(layer) is Linear and layer.in_fp8() and is_bare(layer) for layer in layers):
        return None
    weights = [layer.weight for layer in layers]
    return ops.linear_scaled(x, torch.cat(weights)), [len(weight) for weight in weights]  # type: ignore[arg-type]


def _trained_together(layers: Sequence[nn.Module]) -> bool:
    """Whether a step that torch.compile makes trains them all, and they are products and nothing else."""
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()) or registry.is_invariant():
        return False
    if _alike(layers) is None:
        return False
    return all(type(layer) is Linear and not layer.fp8 and layer.weight.requires_grad for layer in layers)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling it is a product and nothing else."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return layer.bias is None and not hooks


def _joinable(layer: Any) -> TypeGuard[Joinable]:
    """Asked of the class: isinstance of a protocol takes 9 us for three layers, all the rest of `_alike` 4."""
    return hasattr(type(layer), "parts")


def _alike(layers: Sequence[nn.Module]) -> list[list[Tensor]] | None:
    """The first parts of all layers, their second ones, and so on; None if no product has them all."""
    found = [layer.parts() if _joinable(layer) else None for layer in layers]
    if any(each is None or each[0] != found[0][0] for each in found):  # type: ignore[index]
        return None
    return [list(parts) for parts in zip(*(each[1] for each in found), strict=True)]  # type: ignore[index]


def _lie_together(weights: Sequence[Tensor]) -> bool:
    """One behind the other in one allocation: neighbours by chance have one each."""
    if not all(weight.is_contiguous() for weight in weights):
        return False
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in itertools.pairwise(weights)):
        return False
    first = weights[0]
    end = first.storage_offset() * first.itemsize + sum(weight.nbytes for weight in weights)
    return end <= first.untyped_storage().nbytes()
