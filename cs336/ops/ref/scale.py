import torch
from torch import Tensor


def scale_(out: Tensor, x: Tensor | None, scale: Tensor) -> None:
    """out = x * scale, in scale's dtype and rounded once; of out itself without x, which 1 leaves as it is: a GPU's
    product of a NaN has other bits."""
    source = out if x is None else x
    product = (source.to(scale.dtype) * scale).to(out.dtype)
    out.copy_(product if x is not None else torch.where(scale == 1, out, product))
