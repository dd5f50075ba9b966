"""out = x * scale, a number on the device: what is left of a backward whose gradients the forward has made.

In place where x is None; then nothing is read or written if scale is 1, as it is where a loss's own backward is called.
Bytes that must move: x once, out once.
"""

import torch
from torch import Tensor

from cs336.ops import dispatch, registry
from cs336.ops.checks import like, no_float64
from cs336.ops.ref import scale as ref


def _check(out: Tensor, x: Tensor | None, scale: Tensor) -> None:
    if not out.is_floating_point() or not out.is_contiguous():
        raise ValueError(f"out must be floating point and contiguous, got {like(out)} {out.stride()}")
    if x is not None and (
        x.shape != out.shape or x.device != out.device or not x.is_floating_point() or not x.is_contiguous()
    ):
        raise ValueError(f"x must be floating point, contiguous and fit out {like(out)}, got {like(x)}")
    wide = torch.promote_types(out.dtype, torch.float32)
    if scale.numel() != 1 or scale.dtype != wide or scale.device != out.device:
        raise ValueError(f"scale must be one {wide} on {out.device}, got {like(scale)}")


def _refuses(out: Tensor, x: Tensor | None, scale: Tensor) -> str | None:
    return no_float64(out) or (None if x is None else no_float64(x))


registry.define(
    "scale_(Tensor(a!) out, Tensor? x, Tensor scale) -> ()",
    fake=lambda out, x, scale: None,
    ref=ref.scale_,
    triton="scale.scale_",
    check=_check,
    supports={"native": _refuses, "triton": _refuses},
)


def scale_to(x: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool = False) -> Tensor:
    """x * scale in dtype; in place only if that is x's."""
    if torch.compiler.is_compiling():
        return (x.to(scale.dtype) * scale).to(dtype)
    in_place = in_place and x.dtype == dtype
    out = x if in_place else x.new_empty(x.shape, dtype=dtype)
    dispatch.run("scale_", out, None if in_place else x, scale)
    return out
