"""Linear layers of few rows, y = x w^T + b, as decoding has them: they take as long as their weights take to be read.

FLOPs 2 M N K; bytes that must move: x, w and y once, which is w where M is small. The native kernel streams w through
shared memory, the first of them while the kernel before it still runs if it may, and multiplies on tensor cores.

M = rows, K = in_features, N = out_features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import no_float64
from cs336.ops.dispatch import matrix, rows, run, transformed
from cs336.ops.linear_invariant import check_linear
from cs336.ops.ref import linear_few_rows as ref

MOST_ROWS, MOST_FEATURES = 64, 57344  # of the native kernels
HOPPER = ((9, 0), (9, 0))  # whose shared memory they count on
FASTEST_ROWS, FASTEST_WEIGHTS = 8, 2**24  # beyond them cuBLAS is faster, on an H200: 18.3 us for 19.1 with 2^25
HALVES = (torch.float16, torch.bfloat16)


def linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constant: bool = False) -> Tensor:
    """torch.nn.functional.linear for inference, made for up to 64 rows.

    Args:
        x: (..., K) floating point.
        weight: (N, K) like x; bias: (N,) like x, or None.
        constant: a promise that none of the kernels just before this one on the stream writes weight, which is then
            read while they still run: not the last one, whatever made it, nor those that it may overlap itself.

    Returns y (..., N) like x, summed in float32. Where a gradient is wanted, and under transforms, torch's own function
    runs. The native kernel gives a row the same bits whatever the others are.
    Raises ValueError for arguments that do not fit.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., K), got no dims")
    flat, weight = rows(matrix(x)), rows(weight)
    check_linear(flat, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return F.linear(x, weight, bias)
    return run("linear_few_rows", flat, weight, bias, constant).view(*x.shape[:-1], weight.shape[0])


def pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the native kernel takes these arguments, in inference, and was measured to be faster than torch's."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cuda or x.dtype not in HALVES:
        return False
    if (
        x.dim() == 0
        or x.shape[-1] == 0
        or weight.dim() != 2
        or weight.dtype != x.dtype
        or torch.is_autocast_enabled("cuda")
    ):
        return False
    if registry.forced() not in (None, "native") or transformed():
        return False
    K = x.shape[-1]
    M = x.numel() // K
    if not 0 < M <= FASTEST_ROWS or M * K > MOST_FEATURES or weight.numel() > FASTEST_WEIGHTS:
        return False  # rows beyond MOST_FEATURES would read the weights a second time
    return registry.why_not("linear_few_rows", "native", rows(x.reshape(M, -1)), rows(weight), bias) is None


def keeps_weights(x: Tensor) -> bool:
    """Whether a layer may promise `constant` of its parameters: in a graph that is captured, where what stands before
    it is the model. Called on its own, the kernel before may be an optimizer's, or a copy into the parameter."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def native_refuses(x: Tensor, weight: Tensor, *_) -> str | None:
    if x.shape[0] > MOST_ROWS:
        return f"the native kernel takes up to {MOST_ROWS} rows, not {x.shape[0]}"
    return native_refuses_rows(x, weight, MOST_FEATURES)


def native_refuses_rows(x: Tensor, weight: Tensor, most_features: int) -> str | None:
    """Why the native kernels, of weights of any kind, do not take such rows, however many."""
    if x.dtype not in HALVES:
        return f"the native kernel takes float16 and bfloat16, not {x.dtype}"
    if not 0 < x.shape[1] <= most_features:
        return f"the native kernel takes from 1 up to {most_features} features, not {x.shape[1]}"
    for name, t in (("x", x), ("weight", weight)):
        if not _is_aligned(t):
            return f"the native kernel takes rows of {name} that start at multiples of 16 bytes, not {_where(t)}"
    return None


def _is_aligned(t: Tensor) -> bool:
    """As far as its storage is, as all that torch allocates: the kernel looks at the address itself."""
    steps = [_offset(t), t.shape[1]] if t.shape[0] <= 1 else [_offset(t), t.shape[1], t.stride(0)]
    return not any(step * t.itemsize % 16 for step in steps)


def _offset(t: Tensor) -> int:
    """Where in its storage it begins: not seen while torch.compile traces, and taken for 0."""
    return 0 if torch.compiler.is_compiling() else int(t.storage_offset())


def _where(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} with strides {t.stride()} from element {_offset(t)} on"


registry.define(
    "linear_few_rows(Tensor x, Tensor weight, Tensor? bias, bool constant=False) -> Tensor",
    fake=lambda x, weight, bias, constant: x.new_empty(x.shape[0], weight.shape[0]),
    ref=ref.linear_few_rows,
    triton="linear_invariant.linear_few_rows",
    check=lambda x, weight, bias, constant: check_linear(x, weight, bias),
    supports={"native": native_refuses, "triton": no_float64},
    capabilities={"native": HOPPER},
)
