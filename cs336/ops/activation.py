"""Activations of an MLP, gated or not.

    swiglu = silu(gate) * up        geglu = gelu(gate) * up        Shazeer 2020, arXiv:2002.05202
    relu2  = max(x, 0)^2                                           So et al. 2021, arXiv:2109.08668

The backward computes the activation again: it keeps the inputs alone. Bytes that must move, in elements of a tensor:
gated 3 forward and 5 backward, relu2 2 and 3; 5 to 30 FLOPs an element: memory-bound on every device.
"""

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import like, no_float64
from cs336.ops.dispatch import has_kernel
from cs336.ops.norm import rows
from cs336.ops.ref import activation as ref


class Kind(IntEnum):
    """As csrc/kernels/activation.h and ops/triton/activation.py number them."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU2 = 3


def _check(x: Tensor, up: Tensor | None, kind: int, **others: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point() or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be (M, N), floating point, its last dim contiguous, got {like(x)} {x.stride()}")
    for name, t in {"up": up, **others}.items():
        if t is None:
            continue
        if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device) or (t.shape[1] > 1 and t.stride(1) != 1):
            raise ValueError(f"{name} must be like x, {like(x)}, its last dim contiguous, got {like(t)} {t.stride()}")
    if kind not in tuple(Kind):
        raise ValueError(f"kind must be one of {', '.join(f'{k.value} ({k.name})' for k in Kind)}, got {kind}")


def _check_both(both: Tensor, dy: Tensor, kind: int) -> None:
    """both: x and up side by side."""
    if both.dim() != 2 or both.shape[1] % 2 or (both.shape[1] > 1 and both.stride(1) != 1):
        raise ValueError(f"both must be (M, 2 N), its last dim contiguous, got {like(both)} {both.stride()}")
    x, up = both.chunk(2, -1)
    _check(x, up, kind, dy=dy)


GELUS = {Kind.GELU: "none", Kind.GELU_TANH: "tanh"}  # by geglu's `approximate`
KERNELS = {"native": no_float64, "triton": no_float64}

registry.define(
    "activation_fwd(Tensor x, Tensor? up, int kind) -> Tensor",
    fake=lambda x, up, kind: x.new_empty(x.shape),
    ref=ref.fwd,
    triton="activation.fwd",
    check=_check,
    supports=KERNELS,
)
registry.define(
    "activation_bwd(Tensor x, Tensor? up, Tensor dy, int kind) -> (Tensor dx, Tensor dup)",
    fake=lambda x, up, dy, kind: (x.new_empty(x.shape), x.new_empty(0 if up is None else x.shape)),
    ref=ref.bwd,
    triton="activation.bwd",
    check=lambda x, up, dy, kind: _check(x, up, kind, dy=dy),
    supports=KERNELS,
)
registry.define(
    "gated_bwd(Tensor both, Tensor dy, int kind) -> Tensor",
    fake=lambda both, dy, kind: both.new_empty(both.shape),
    ref=ref.gated_bwd,
    triton="activation.gated_bwd",
    check=lambda both, dy, kind: _check_both(both, dy, kind),
    supports=KERNELS,
)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MN, up_MN, kind):
        ctx.save_for_backward(x_MN, up_MN)
        ctx.kind = kind
        return registry.call("activation_fwd", x_MN, up_MN, kind)

    @staticmethod
    def backward(ctx, dy_MN):
        x_MN, up_MN = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: differentiable again
            dx_MN, dup_MN = ref.bwd(x_MN, up_MN, dy_MN, ctx.kind)
        else:
            dx_MN, dup_MN = registry.call("activation_bwd", x_MN, up_MN, rows(dy_MN), ctx.kind)
        return dx_MN, None if up_MN is None else dup_MN, None


def activate(x: Tensor, up: Tensor | None, kind: Kind) -> Tensor | None:
    """act(x), or act(x) * up, by a kernel; by the reference if that is forced; None if neither is to run."""
    if registry.forced() == "ref":
        return ref.fwd(x, up, int(kind))
    if x.dim() == 0 or x.shape[-1] == 0 or not has_kernel("activation_fwd", x, up, int(kind)):
        return None
    return _Activation.apply(rows(x), None if up is None else rows(up), int(kind)).view(x.shape)


class _Gated(torch.autograd.Function):
    """Of x and up side by side, so that their gradients are one tensor, as one product of matrices takes them."""

    @staticmethod
    def forward(ctx, both_MN2, kind):
        ctx.save_for_backward(both_MN2)
        ctx.kind = kind
        return registry.call("activation_fwd", *both_MN2.chunk(2, -1), kind)

    @staticmethod
    def backward(ctx, dy_MN):
        (both_MN2,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: differentiable again
            return ref.gated_bwd(both_MN2, dy_MN, ctx.kind), None
        return registry.call("gated_bwd", both_MN2, rows(dy_MN), ctx.kind), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element.

    gate, up: one shape (any), one floating-point dtype; rows may be strided, as halves of one matmul's result are.
    Returns a tensor like them. Raises ValueError for shapes or dtypes that do not fit.
    """
    _check_gated(gate, up)
    y = activate(gate, up, Kind.SILU)
    return F.silu(gate) * up if y is None else y


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up, element by element; approximate "tanh" as torch's gelu has it. Otherwise as swiglu."""
    _check_gated(gate, up)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    y = activate(gate, up, Kind.GELU if approximate == "none" else Kind.GELU_TANH)
    return F.gelu(gate, approximate=approximate) * up if y is None else y


def gated(both: Tensor, kind: Kind) -> Tensor:
    """act(gate) * up of both (..., 2 N), gate and then up, as one linear layer gives them: (..., N).

    Raises ValueError for an odd number of features, a kind without a gate, and as swiglu does.
    """
    if both.dim() == 0 or both.shape[-1] % 2:
        raise ValueError(f"both must be (..., 2 N), gate and then up, got {like(both)}")
    if kind != Kind.SILU and kind not in GELUS:
        raise ValueError(f"kind must be that of a gated activation, got {kind!r}")
    gate, up = both.chunk(2, -1)
    _check_gated(gate, up)
    if gate.numel() == 0 or not has_kernel("activation_fwd", gate, up, int(kind)):
        return swiglu(gate, up) if kind == Kind.SILU else geglu(gate, up, GELUS[kind])
    y_MN = _Gated.apply(rows(both), int(kind))
    return y_MN.view(gate.shape)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, element by element. x: any shape, floating point; else ValueError."""
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    y = activate(x, None, Kind.RELU2)
    return F.relu(x).square() if y is None else y


def _check_gated(gate: Tensor, up: Tensor) -> None:
    if not gate.is_floating_point():
        raise ValueError(f"gate must be floating point, got {gate.dtype}")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(f"up must be like gate, {like(gate)}, got {like(up)}")
