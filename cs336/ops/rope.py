"""Rotary position embedding.  (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)      Su et al. 2021, arXiv:2104.09864

Each pair of features turns by its position times its frequency. Pair i is (x[i], x[i + D/2]), or (x[2i], x[2i + 1])
when interleaved. Bytes that must move: 2 numel(x) elements; 3 FLOPs an element: memory-bound on every device.
"""

from torch import Tensor

from cs336.ops.ref import rope as ref


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the last dim of x, in fp32.

    Args:
        x: (..., D) floating point, D even.
        cos, sin: (..., D / 2), broadcastable to x's leading dims; float32 keeps far positions exact.
        interleaved: pair neighbouring features, as the paper does, instead of the two halves.

    Returns a tensor like x. Raises ValueError for shapes or dtypes that do not fit.
    """
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x must be (..., D) with D even, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    lead = tuple(reversed(x.shape[:-1]))
    fits = cos.dim() <= x.dim() and all(c in (1, n) for c, n in zip(reversed(cos.shape[:-1]), lead, strict=False))
    if cos.dim() == 0 or cos.shape[-1] * 2 != x.shape[-1] or not fits:
        raise ValueError(f"cos must be (..., {x.shape[-1] // 2}) to fit x {tuple(x.shape)}, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    return ref.fwd(x, cos, sin, interleaved)
