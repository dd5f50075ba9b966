"""Linear layers of few rows that make their x themselves, where a launch of its own would cost as much as it moves:

    linear_normed   s = x + residual,  y = (s / rms(s) * norm_weight) w^T      of a pre-norm block's stream
    linear_swiglu   y = (silu(gate) * up) w^T                                 of a gated MLP's last layer

FLOPs and bytes as ops.linear_few_rows has them: w once. Alone at the end of a chain such a launch takes as long as the
plain layer's; what it saves is a kernel that reads and writes next to nothing and that the layer would wait for.

M = rows, K = in_features, N = out_features.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.dispatch import matrix, rows, run
from cs336.ops.linear_few_rows import HOPPER, native_refuses, pays
from cs336.ops.linear_invariant import check_linear
from cs336.ops.ref import linear_fused as ref

MOST_ROWS = 8  # of the native kernel, whose blocks each make all of x
FASTEST_MADE = 2**14  # numbers of x: on an H200 a step of Llama-1B with 8 rows, 2^16 behind a gate, took 5 % longer


def linear_normed(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5, *, constant: bool = False
) -> tuple[Tensor, Tensor]:
    """F.linear(rms_norm(x + residual) * norm_weight, weight), and x + residual, for inference: without gradients.

    Args:
        x, residual: (..., K) floating point, alike.
        norm_weight: (K,) like x; weight: (N, K) like x.
        eps: added to the mean square.
        constant: of weight, as ops.linear_few_rows has it.

    Returns y (..., N) and x + residual (..., K), like x. Sums are float32; x + residual and what is multiplied are
    rounded as launches of their own would round them. Raises ValueError for arguments that do not fit.
    """
    if x.dim() == 0 or x.shape != residual.shape:
        raise ValueError(f"x and residual must be (..., K) of one shape, got {tuple(x.shape)}, {tuple(residual.shape)}")
    flat = rows(matrix(x)), rows(matrix(residual))
    with torch.no_grad():
        _check_normed(*flat, norm_weight, eps, rows(weight), constant)
        y, total = run("linear_normed", *flat, norm_weight, float(eps), rows(weight), constant)
    return y.view(*x.shape[:-1], weight.shape[0]), total.view(x.shape)


def linear_swiglu(gate: Tensor, up: Tensor, weight: Tensor, *, constant: bool = False) -> Tensor:
    """F.linear(silu(gate) * up, weight) for inference: without gradients.

    gate, up: (..., K) floating point, alike; weight: (N, K) like them; constant as ops.linear_few_rows has it. Returns
    (..., N) like gate. Raises ValueError for arguments that do not fit.
    """
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(f"gate and up must be (..., K) of one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    flat = rows(matrix(gate)), rows(matrix(up))
    with torch.no_grad():
        _check_swiglu(*flat, rows(weight), constant)
        y = run("linear_swiglu", *flat, rows(weight), constant)
    return y.view(*gate.shape[:-1], weight.shape[0])


def pays_fused(x: Tensor, other: Tensor, weight: Tensor) -> bool:
    """Whether the native kernels take rows of x and other and this weight, and pay as plain ones do: see pays()."""
    if not pays(x, weight, None) or registry.is_invariant() or x.shape != other.shape or x.dtype != other.dtype:
        return False
    K = x.shape[-1]
    if x.numel() > FASTEST_MADE:
        return False
    return _other_refused(rows(x.reshape(-1, K)), rows(other.reshape(-1, K)), rows(weight)) is None


def _check_normed(x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, constant: bool) -> None:
    check_linear(x, weight, None)
    _check_alike("residual", residual, x)
    if norm_weight.shape != x.shape[1:] or (norm_weight.dtype, norm_weight.device) != (x.dtype, x.device):
        raise ValueError(f"norm_weight must be ({x.shape[1]},) {x.dtype} on {x.device}, got {_like(norm_weight)}")
    if not norm_weight.is_contiguous():
        raise ValueError(f"norm_weight must be contiguous, got stride {norm_weight.stride()}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _check_swiglu(gate: Tensor, up: Tensor, weight: Tensor, constant: bool) -> None:
    check_linear(gate, weight, None)
    _check_alike("up", up, gate)


def _check_alike(name: str, t: Tensor, x: Tensor) -> None:
    if (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device) or (t.shape[1] > 1 and t.stride(1) != 1):
        raise ValueError(f"{name} must be like x, {_like(x)}, its last dim contiguous, got {_like(t)} {t.stride()}")


def _like(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _other_refused(x: Tensor, other: Tensor, weight: Tensor) -> str | None:
    if x.shape[0] > MOST_ROWS:
        return f"the native kernel takes up to {MOST_ROWS} rows, not {x.shape[0]}"
    return native_refuses(x, weight) or native_refuses(other, weight)


registry.define(
    "linear_normed(Tensor x, Tensor residual, Tensor norm_weight, float eps, Tensor weight, bool constant=False) "
    "-> (Tensor y, Tensor total)",
    fake=lambda x, residual, norm_weight, eps, weight, constant: (
        x.new_empty(x.shape[0], weight.shape[0]),
        x.new_empty(x.shape),
    ),
    ref=ref.normed,
    check=_check_normed,
    supports={"native": lambda x, residual, norm_weight, eps, weight, *_: _other_refused(x, residual, weight)},
    capabilities={"native": HOPPER},
)
registry.define(
    "linear_swiglu(Tensor gate, Tensor up, Tensor weight, bool constant=False) -> Tensor",
    fake=lambda gate, up, weight, constant: gate.new_empty(gate.shape[0], weight.shape[0]),
    ref=ref.swiglu,
    check=_check_swiglu,
    supports={"native": lambda gate, up, weight, *_: _other_refused(gate, up, weight)},
    capabilities={"native": HOPPER},
)
