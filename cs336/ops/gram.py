"""A symmetric product: y = alpha x x^T + beta c, of which half is computed and the other half is its mirror.

Muon's iteration has two such products a step, of a matrix with its own transpose and of that with itself. FLOPs
B M (M + 1) N, half of a product's; bytes that must move: x once, c and y once.

B = batch, M = rows, N = columns.
"""

import torch
from torch import Tensor

from cs336.ops import dispatch, registry
from cs336.ops.checks import check_last_dims
from cs336.ops.ref import gram as ref


def gram(x: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha x x^T + beta c of each matrix of a batch.

    Args:
        x: (B, M, N) floating point.
        c: (B, M, M) like x and symmetric, or None. Only its lower triangle may be read.

    Returns y (B, M, M) like x. Gradients are plain torch's, and so is the product where native kernels are forced: it
    has none, and what calls it has others. Raises ValueError for arguments that do not fit.
    """
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, c))
    learns = learns or dispatch.transformed()
    if learns or (registry.forced() == "native" and registry.missing("gram", "native", x.device)):
        _check(x, c, alpha, beta)
        return ref.gram(x, c, alpha, beta)
    x, c = dispatch.rows(x), None if c is None else dispatch.rows(c)
    _check(x, c, alpha, beta)
    return dispatch.run("gram", x, c, alpha, beta)


def _check(x: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, M, N) floating point, got {tuple(x.shape)} {x.dtype}")
    wanted = (*x.shape[:2], x.shape[1])
    if c is not None and (c.shape != wanted or c.dtype != x.dtype or c.device != x.device):
        raise ValueError(f"c must be {wanted} {x.dtype} on {x.device}, got {tuple(c.shape)} {c.dtype} on {c.device}")


def _check_raw(x: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    _check(x, c, alpha, beta)
    check_last_dims(x=x, c=c)


def _triton_refuses(x: Tensor, *_) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the Triton kernel takes float16 and bfloat16, not {x.dtype}"
    if x.shape[0] >= 1 << 16:
        return f"the Triton kernel takes fewer than 65,536 matrices, got {x.shape[0]:,}"
    return None


registry.define(
    "gram(Tensor x, Tensor? c, float alpha, float beta) -> Tensor",
    fake=lambda x, c, alpha, beta: x.new_empty(*x.shape[:2], x.shape[1]),
    ref=ref.gram,
    triton="gram.gram",
    check=_check_raw,
    supports={"triton": _triton_refuses},
)
