"""Linear layers whose weights are whole numbers in groups that share a scale, or eight-bit floats, in the places of
others.

N = out_features, K = in_features, G = groups of a row.
"""

from collections.abc import Collection, Hashable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_counts
from cs336.nn.expert_list import unstack_experts
from cs336.nn.linear import Linear, is_bare
from cs336.ops import registry
from cs336.ops.dispatch import transformed
from cs336.ops.linear_few_rows import keeps_weights
from cs336.ops.linear_scaled import MULTIPLE
from cs336.ops.ref.linear_quantized import dequantize_int8, pack_int4, unpack_int4
from cs336.ops.ref.wide import narrow

QuantMethod = Literal["int8", "int4", "fp8"]
METHODS = ("int8", "int4", "fp8")
BITS = {"int8": 8, "int4": 4}  # of whole numbers
FP8 = torch.float8_e4m3fn
TOKEN = -1  # x_group of tokens with a scale each
FP8_FEATURES = 128  # of a layer's sides, from which on a training step's products may be in floats of 8 bits
KEPT = ("router", "shared_gate", "kv_b_proj")
# A wrong expert costs more than bytes; latent attention takes this weight apart.


class QuantizedWeight(NamedTuple):
    """w[n, order[k]] = (q[n, k] - zeros[n, k // group]) * scales[n, k // group]."""

    q: Tensor
    """(N, K) int8, or float8_e4m3fn."""
    scales: Tensor
    """(N, G) floating point."""
    zeros: Tensor | None = None
    """(N, G) int16; None: 0."""
    order: Tensor | None = None
    """(K,) int64: which feature each column reads; None: its own."""

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """So many rows each, in memory of their own."""
        zeros = [None] * len(rows) if self.zeros is None else self.zeros.split(rows)
        return [
            QuantizedWeight(
                q.clone(),
                scales.clone(),
                None if zero is None else zero.clone(),
                None if self.order is None else self.order.clone(),
            )
            for q, scales, zero in zip(self.q.split(rows), self.scales.split(rows), zeros, strict=True)
        ]

    @staticmethod
    def stack(parts: list["QuantizedWeight"]) -> "QuantizedWeight":
        """One above the other. Raises ValueError for other orders of features, unless they are on meta."""
        orders = [torch.arange(part.q.shape[1]) if part.order is None else part.order for part in parts]
        has_values = not any(order.is_meta for order in orders)
        if has_values and not all(torch.equal(order.cpu(), orders[0].cpu()) for order in orders):
            raise ValueError(
                "they are one matrix in the file, and their features are in other orders: quantise without act_order"
            )
        zeros = None
        if any(part.zeros is not None for part in parts):
            zeros = torch.cat(
                [torch.zeros_like(p.scales, dtype=torch.int16) if p.zeros is None else p.zeros for p in parts]
            )
        return QuantizedWeight(
            torch.cat([p.q for p in parts]), torch.cat([p.scales for p in parts]), zeros, parts[0].order
        )

    def dequantized(self, group: int) -> Tensor:
        """(N, K), float32 or as wide as the scales."""
        return _in_place(dequantize_int8(self.q, self.scales, group, self.zeros), self.order)


class _Rounded(torch.autograd.Function):
    """Gradients pass as if nothing were rounded (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: int) -> Tensor:
        return _rounded(x, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dx, None


class _RoundedInTransforms(torch.autograd.Function):
    """The same for torch.func and forward mode. torch.compile knows no such function, and they no other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, group: int) -> Tensor:
        return _rounded(x, group).contiguous()  # forward mode wants the memory order of its tangent

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dx, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return dx.clone(memory_format=torch.contiguous_format)


def rounded(x: Tensor, group: int) -> Tensor:
    """x (..., K) with each number the nearest float8_e4m3fn times the scale of its group of features, which brings the
    group's largest to 448; group TOKEN: all K. Each token by itself, so that it does not depend on the batch."""
    if transformed():
        return _RoundedInTransforms.apply(x, group)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rounded.apply(x, group)
    return _rounded(x, group)


def _rounded(x: Tensor, group: int) -> Tensor:
    K, most = x.shape[-1], torch.finfo(FP8).max
    group = K if group == TOKEN else min(group, K)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    groups = F.pad(wide, (0, -K % group)).unflatten(-1, (-1, group))
    scales = (groups.abs().amax(-1, keepdim=True) / most).clamp(torch.finfo(torch.float32).tiny)
    q = (groups / scales).clamp(-most, most).to(FP8)
    return narrow((q.to(wide.dtype) * scales).flatten(-2)[..., :K], x)


class QuantizedLinear(nn.Module):
    """y = x w^T + b with w in int8, int4 or fp8: buffers `packed` and `scales`, see ops.linear_int8, linear_int4 and
    linear_fp8, and `zeros` and `order` where they are asked for, see QuantizedWeight. group None: a row shares one
    scale. Floats of eight bits are kept as uint8, which `.to(dtype)` leaves alone. x_group: beside fp8, x is rounded to
    it too, see `rounded`; None: it is not.

    x (..., in_features) -> (..., out_features) like x. `weight` is made anew each time that it is asked for.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        method: QuantMethod,
        group: int | None,
        *,
        zeros: bool = False,
        order: bool = False,
        bias: bool = False,
        x_group: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if x_group is not None and method != "fp8":
            raise ValueError(f"x is rounded to fp8 beside weights in fp8, and these are {method}: leave out x_group")
        if x_group is not None and x_group != TOKEN:
            check_counts(x_group=x_group)
        self.x_group = x_group
        self.in_features, self.out_features, self.method = in_features, out_features, method
        self.group = in_features if group is None else group
        columns = in_features // 2 if method == "int4" else in_features
        kind = torch.int8 if method == "int8" else torch.uint8
        groups = out_features, -(-in_features // self.group)
        self.register_buffer("packed", torch.zeros(out_features, columns, dtype=kind, device=device))
        self.register_buffer("scales", torch.ones(groups, dtype=dtype, device=device))
        self.register_buffer("zeros", torch.zeros(groups, dtype=torch.int16, device=device) if zeros else None)
        self.register_buffer("order", torch.arange(in_features, device=device) if order else None)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def like(
        cls,
        layer: nn.Linear,
        method: QuantMethod,
        group: int | None,
        *,
        zeros: bool = False,
        order: bool = False,
        x_group: int | None = None,
    ) -> "QuantizedLinear":
        """With the shape of a layer, and no values yet."""
        place: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype, "zeros": zeros}
        place |= {"order": order, "bias": layer.bias is not None, "x_group": x_group}
        return cls(layer.in_features, layer.out_features, method, group, **place)

    def fill(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Take the values of a weight, and those of a bias."""
        q_NK = weight.q.contiguous()
        self.packed = pack_int4(q_NK) if self.method == "int4" else q_NK.view(self.packed.dtype)
        self.scales, self.zeros, self.order = weight.scales, weight.zeros, weight.order
        if bias is not None:
            self.bias = bias.detach().clone()

    @property
    def quantized(self) -> QuantizedWeight:
        q_NK = unpack_int4(self.packed) if self.method == "int4" else self._kept
        return QuantizedWeight(q_NK, self.scales, self.zeros, self.order)

    @property
    def _kept(self) -> Tensor:
        """`packed` as the ops take it."""
        return self.packed.view(FP8) if self.method == "fp8" else self.packed

    @property
    def weight(self) -> Tensor:
        """(N, K) in the dtype of the scales."""
        return self.quantized.dequantized(self.group).to(self.scales.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        x = x if self.order is None else x.index_select(-1, self.order)
        return self.product(x, self.packed, self.scales, self.zeros, bias)

    def parts(self) -> tuple[Hashable, list[Tensor]] | None:
        """See nn.Linear."""
        if self.order is not None or not is_bare(self):
            return None
        parts = [self.packed, self.scales] if self.zeros is None else [self.packed, self.scales, self.zeros]
        return (self.method, self.group, self.scales.dtype, self.x_group, len(parts)), parts

    def product(
        self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """As forward, of these parts."""
        if registry.is_invariant():
            raise ValueError("quantised weights have no sums in one order: cs336.invariant() takes the model before")
        constant = keeps_weights(x)
        if self.x_group is not None:
            x = rounded(x, self.x_group)
        if self.method == "fp8":
            return ops.linear_fp8(x, packed.view(FP8), scales, bias, group=self.group, constant=constant)
        op = ops.linear_int8 if self.method == "int8" else ops.linear_int4
        return op(x, packed, scales, bias, group=self.group, zeros=zeros, constant=constant)

    def extra_repr(self) -> str:
        more = "" if self.x_group is None else f", x_group={self.x_group}"
        return f"{self.in_features}, {self.out_features}, {self.method}, group={self.group}{more}"


def is_quantized(module: nn.Module) -> bool:
    """Whether some of its layers are quantised, whose weights do not learn."""
    return any(isinstance(layer, QuantizedLinear) for layer in module.modules())


def _in_place(w_NK: Tensor, order_K: Tensor | None) -> Tensor:
    return w_NK if order_K is None else w_NK[:, order_K.argsort()]


def quantizable(layers: nn.Module, names: Collection[str] | None = None) -> dict[str, Linear]:
    """The linear layers below a module that are to be quantised, by name: all but the KEPT and those that make Hyena's
    filter, or those of these names."""
    found = {name: module for name, module in layers.named_modules() if type(module) is Linear}
    if names is not None:
        return {name: module for name, module in found.items() if name in names}
    return {n: m for n, m in found.items() if n.rpartition(".")[2] not in KEPT and "filter" not in n.split(".")}


def train_in_fp8(layers: nn.Module) -> int:
    """Let training steps multiply in floats of 8 bits in the linear layers below a module that may be quantised and
    are as large as pays: FP8_FEATURES and more on both sides, in multiples of 16. How many there are."""
    found = [layer for layer in quantizable(layers).values() if _pays_in_fp8(layer)]
    for layer in found:
        layer.fp8 = True
    return len(found)


def _pays_in_fp8(layer: Linear) -> bool:
    return all(size >= FP8_FEATURES and size % MULTIPLE == 0 for size in layer.weight.shape)


def replace_linears(
    layers: nn.Module,
    method: QuantMethod,
    group: int | None,
    *,
    zeros: bool = False,
    order: bool = False,
    x_group: int | None = None,
    names: Collection[str] | None = None,
) -> dict[str, tuple[Linear, QuantizedLinear]]:
    """Put a QuantizedLinear, without values, in the place of each layer that may be quantised; (old, new) by name.

    Stacks of experts become lists of them first. names: of the layers, if not all of them.
    Raises ValueError for an unknown method, a group below 1 or above the features of every layer, and quantised layers.
    """
    if method not in METHODS:
        raise ValueError(f"method must be {' or '.join(METHODS)}, got {method!r}")
    if method == "fp8" and zeros:
        raise ValueError("fp8 has signs and no zeros: quantise without asymmetric, or in int8 or int4")
    check_counts(optional=True, group=group)
    unstack_experts(layers)
    found = quantizable(layers, names)
    most = max((module.in_features for module in found.values()), default=0)
    if not found and is_quantized(layers):
        raise ValueError("the layers are quantised already: quantise the model that they were made of")
    if not found or (group is not None and group > most):
        raise ValueError(f"there is nothing to quantise in groups of {group}: layers have at most {most} features")
    pairs = {}
    for name, old in found.items():
        wide = old.in_features if group is None else group
        if method == "int4" and (old.in_features % 2 or wide % 2):
            raise ValueError(f"{name}: int4 wants even in_features and group, got {old.in_features} and {wide}")
        parent, _, last = name.rpartition(".")
        pairs[name] = old, QuantizedLinear.like(old, method, group, zeros=zeros, order=order, x_group=x_group)
        setattr(layers.get_submodule(parent), last, pairs[name][1])
    return pairs
