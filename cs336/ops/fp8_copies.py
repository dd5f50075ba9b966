"""A matrix in floats of 8 bits, as it is and transposed, with the scale that takes its largest magnitude to theirs.

Tensor cores want both sides of such a product to run along what is added up, so what a training step multiplies once
along its rows and once along its columns is wanted both ways. Bytes that must move: x twice, since all of it is read
before the first element can be rounded, and a byte an element for each copy.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.ref import fp8_copies as ref

NATIVE_SIDE = 16  # that the native kernel's rows and columns are multiples of
NATIVE_ROWS = 65535 * 128  # at most: csrc/kernels/fp8_copies.h


def fp8_copies(x: Tensor, *, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale, its transpose, scale), rounded to nearest even to float8_e4m3fn; a gradient to float8_e5m2, which has
    a bit less of mantissa and reaches further down.

    x (N, K) floating point -> (N, K) and (K, N), contiguous, and float32 (): max |x| over the largest number of the
    format, 448 or 57344. A NaN or infinity in x makes what is multiplied by these NaN. There is no gradient.
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    x = x.detach().contiguous()
    _check(x, gradient)
    return registry.call("fp8_copies", x, gradient)


def _check(x: Tensor, gradient: bool) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (N, K), got {tuple(x.shape)}")
    if not x.is_floating_point() or x.itemsize == 1:
        raise TypeError(f"x must be floating point, of more than 8 bits, got {x.dtype}")


def _check_raw(x: Tensor, gradient: bool) -> None:
    _check(x, gradient)
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {x.stride()}")


def _fake(x: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    (N, K), dtype = x.shape, torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    return x.new_empty(N, K, dtype=dtype), x.new_empty(K, N, dtype=dtype), x.new_empty((), dtype=torch.float32)


def _native_refuses(x: Tensor, gradient: bool) -> str | None:
    N, K = x.shape
    if x.dtype == torch.float64:
        return "the native kernel takes bfloat16, float16 and float32, not float64"
    if not N or not K or N % NATIVE_SIDE or K % NATIVE_SIDE or N > NATIVE_ROWS:
        return f"the native kernel takes up to {NATIVE_ROWS:,} rows, and both sides in {NATIVE_SIDE}s, got {N} x {K}"
    return None


registry.define(
    "fp8_copies(Tensor x, bool gradient) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    ref=ref.fp8_copies,
    check=_check_raw,
    supports={"native": _native_refuses},
)
