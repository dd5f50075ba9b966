"""The first half of a mixture's experts: h_r = silu(W_e x_t) * (U_e x_t), for rows r that stand by expert, t = token_r.

One pass gathers the tokens, multiplies them by both matrices of their expert and gates the products, which plain torch
writes and reads in between: 3 R F and R M numbers less. FLOPs 4 R M F; bytes that must move: x, h and the matrices of
the experts that are chosen, once. No gradient: training keeps the products.

N = tokens, R = rows (choices of experts), E = experts, M = d_model, F = features of an expert.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.dispatch import has_kernel, rows, run
from cs336.ops.ref import expert_swiglu as ref

MOST_ROWS = 256  # of an expert, on average, for which the kernel has been the faster on an H200


def expert_swiglu(x: Tensor, token: Tensor, load: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gather rows of x and put each through its expert's gated unit.

    Args:
        x: (N, M) floating point.
        token: (R,) int64, the row of x that each row takes; rows of an expert stand side by side, in its order.
        load: (E,) int64, how many rows are each expert's; they add up to R.
        gate, up: (E, F, M) like x, contiguous.

    Returns h (R, F) like x, without a gradient; the sums are in float32. Nothing is read beyond x, whatever token says:
    on a GPU a row whose token is none of x's is NaN. Raises ValueError for arguments that do not fit.

    On a GPU by Triton, which does not wait for load; elsewhere plain torch.
    """
    x = rows(x)
    _check(x, token, load, gate, up)
    with torch.no_grad():
        return run("expert_swiglu", x, token, load, gate, up)


def pays(x: Tensor, token: Tensor, load: Tensor, gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel is there, nothing asks for a gradient, and it takes less than torch's grouped products: see
    docs/log.md."""
    if (
        gate is None
        or gate.dtype != x.dtype
        or x.dtype.itemsize != 2
        or not (gate.is_contiguous() and up.is_contiguous())
    ):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up)):
        return False
    few = 0 < len(token) <= MOST_ROWS * len(load)
    return few and registry.forced() != "native" and has_kernel("expert_swiglu", x, token, load, gate, up)


def _check(x: Tensor, token: Tensor, load: Tensor, gate: Tensor, up: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point() or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be (N, M), floating point, its last dim contiguous, got {tuple(x.shape)} {x.dtype}")
    for name, w in (("gate", gate), ("up", up)):
        if w.dim() != 3 or w.shape != gate.shape or w.shape[2] != x.shape[1] or not w.is_contiguous():
            expected = f"contiguous (E, F, {x.shape[1]}), gate and up of one shape"
            raise ValueError(f"{name} must be {expected}, got {tuple(w.shape)}, strides {w.stride()}")
        if (w.dtype, w.device) != (x.dtype, x.device):
            raise ValueError(f"{name} must be {x.dtype} on {x.device}, as x is, got {w.dtype} on {w.device}")
    for name, t, dims in (("token", token, 1), ("load", load, 1)):
        if t.dim() != dims or t.dtype != torch.int64 or t.device != x.device or not t.is_contiguous():
            raise ValueError(f"{name} must be 1-d int64 on {x.device}, contiguous, got {tuple(t.shape)} {t.dtype}")
    if load.shape[0] != gate.shape[0]:
        raise ValueError(f"load must be ({gate.shape[0]},), a number an expert, got {tuple(load.shape)}")


def _triton_refuses(x: Tensor, token: Tensor, load: Tensor, *_) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float16 and bfloat16, not {x.dtype}"
    if load.shape[0] > 1024:
        return f"the Triton kernel takes up to 1024 experts, not {load.shape[0]}"
    return None


registry.define(
    "expert_swiglu(Tensor x, Tensor token, Tensor load, Tensor gate, Tensor up) -> Tensor",
    fake=lambda x, token, load, gate, up: x.new_empty(token.shape[0], gate.shape[1]),
    ref=ref.expert_swiglu,
    triton="expert_swiglu.expert_swiglu",
    check=_check,
    supports={"triton": _triton_refuses},
)
