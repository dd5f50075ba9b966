"""Linear layers of few rows, y = x w^T + b, as decoding has them: they take as long as their weights take to be read.

FLOPs 2 M N K; bytes that must move: x, w and y once, which is w where M is small. The native kernel streams w through
shared memory, starts to while the kernel before it still runs, and multiplies on tensor cores.

M = rows, K = in_features, N = out_features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.dispatch import has_kernel, rows, run
from cs336.ops.linear_invariant import check_linear
from cs336.ops.ref import linear_few_rows as ref

MOST_ROWS = 64  # of the native kernel
HALVES = (torch.float16, torch.bfloat16)


def linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for inference, made for up to 64 rows.

    Args:
        x: (..., K) floating point.
        weight: (N, K) like x; bias: (N,) like x, or None.

    Returns y (..., N) like x, summed in float32. Without gradients: where one is wanted torch's own function runs. The
    native kernel gives a row bits that depend on how many rows there are, up to 8, 16, 32 or 64, and not on the others.
    Raises ValueError for arguments that do not fit.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., K), got no dims")
    flat, weight = rows(x.reshape(-1, x.shape[-1])), rows(weight)
    check_linear(flat, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return F.linear(x, weight, bias)
    return run("linear_few_rows", flat, weight, bias).view(*x.shape[:-1], weight.shape[0])


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_few_rows` has a kernel for these arguments that is faster than torch's."""
    if torch.is_grad_enabled() or not x.is_cuda or x.dim() == 0 or x.dtype not in HALVES or x.shape[-1] == 0:
        return False
    if registry.forced() not in (None, "native") or torch.is_autocast_enabled("cuda"):
        return False
    M, N = x.numel() // x.shape[-1], weight.shape[0]
    return 0 < M <= fastest_up_to(N) and has_kernel("linear_few_rows", x.view(-1, x.shape[-1]), weight, bias)


def fastest_up_to(N: int) -> int:
    """Rows up to which the native kernel was measured to be faster than cuBLAS on an H200."""
    return 16


def native_refuses(x: Tensor, weight: Tensor, *_) -> str | None:
    """Why the native kernels, of weights of any kind, do not take these rows."""
    if x.dtype not in HALVES:
        return f"the native kernel takes float16 and bfloat16, not {x.dtype}"
    if x.shape[0] > MOST_ROWS:
        return f"the native kernel takes up to {MOST_ROWS} rows, not {x.shape[0]}"
    for name, t in (("x", x), ("weight", weight)):
        if not _is_aligned(t):
            return f"the native kernel takes rows of {name} that start at multiples of 16 bytes, not {_where(t)}"
    return None


def _is_aligned(t: Tensor) -> bool:
    steps = [t.shape[1]] if t.shape[0] <= 1 else [t.shape[1], t.stride(0)]
    return t.data_ptr() % 16 == 0 and not any(step * t.itemsize % 16 for step in steps)


def _where(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} with strides {t.stride()} at {t.data_ptr() % 16} bytes past one"


def _triton_refuses(x: Tensor, *_) -> str | None:
    if x.dtype not in (torch.float32, *HALVES):
        return f"the Triton kernel takes float32, float16 and bfloat16, not {x.dtype}"
    return None


registry.define(
    "linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    ref=ref.linear_few_rows,
    triton="linear_invariant.linear_invariant",  # whose tiles for up to 64 rows are as good for any
    check=check_linear,
    supports={"native": native_refuses, "triton": _triton_refuses},
)
