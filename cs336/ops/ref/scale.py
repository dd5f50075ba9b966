from torch import Tensor


def scale_(out: Tensor, x: Tensor | None, scale: Tensor) -> None:
    """out = x * scale, in scale's dtype and rounded once; of out itself without x."""
    out.copy_((out if x is None else x).to(scale.dtype) * scale)
