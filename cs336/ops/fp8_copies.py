"""A matrix in floats of 8 bits, as it is and transposed, with the scale that takes its largest magnitude to theirs.

Tensor cores want both sides of such a product to run along what is added up, so what a training step multiplies once
along its rows and once along its columns is wanted both ways. Bytes that must move: x twice, since all of it is read
before the first element can be rounded, and a byte an element for each copy.
"""

import torch
from torch import Tensor

from cs336.ops import dispatch, registry
from cs336.ops.checks import check_last_dims
from cs336.ops.ref import fp8_copies as ref

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp8_copies(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor, Tensor]:
    """(x / scale, its transpose, scale) rounded to float8_e4m3fn or float8_e5m2, to nearest even.

    x (N, K) bfloat16, float16 or float32 -> (N, K) and (K, N), contiguous, and float32 (): max |x| over the largest
    number of the format, 448 or 57344. A NaN or infinity in x makes what is multiplied by these NaN. There is no gradient.
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    x = dispatch.rows(x.detach())
    _check(x, dtype)
    return dispatch.run("fp8_copies", x, dtype)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (N, K), got {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if dtype not in FORMATS:
        raise TypeError(f"dtype must be float8_e4m3fn or float8_e5m2, got {dtype}")


def _check_raw(x: Tensor, dtype: torch.dtype) -> None:
    _check(x, dtype)
    check_last_dims(x=x)


def _fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    N, K = x.shape
    return x.new_empty(N, K, dtype=dtype), x.new_empty(K, N, dtype=dtype), x.new_empty((), dtype=torch.float32)


registry.define(
    "fp8_copies(Tensor x, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    ref=ref.fp8_copies,
    triton="fp8_copies.fp8_copies",
    check=_check_raw,
)
