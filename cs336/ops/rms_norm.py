"""RMSNorm.  y = x * rsqrt(mean(x^2) + eps) * w         Zhang & Sennrich 2019, arXiv:1910.07467

With a residual, x is first replaced by the sum x + residual, which is returned too: the next layer's residual.
M = rows, N = features. Bytes that must move, in elements of x: forward 2MN (with residual 4MN), backward 3MN (with the
sum's gradient 4MN). FLOPs are about 4MN and 10MN: memory-bound on every device.
"""

from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import no_float64
from cs336.ops.norm import contract, norm, stat_dtype
from cs336.ops.ref import rms_norm as ref

KERNELS = {"native": no_float64, "triton": no_float64}


def _fake_fwd(x, w, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=stat_dtype(x))


registry.define(
    "rms_norm_fwd(Tensor x, Tensor w, float eps) -> (Tensor y, Tensor rstd)",
    fake=_fake_fwd,
    ref=ref.fwd,
    triton="rms_norm.fwd",
    check=contract("x", "w", "eps"),
    supports=KERNELS,
)
registry.define(
    "rms_norm_residual_fwd(Tensor x, Tensor residual, Tensor w, float eps) -> (Tensor y, Tensor rstd, Tensor sum)",
    fake=lambda x, residual, w, eps: (*_fake_fwd(x, w, eps), x.new_empty(x.shape)),
    ref=ref.residual_fwd,
    triton="rms_norm.residual_fwd",
    check=contract("x", "residual", "w", "eps"),
    supports=KERNELS,
)
registry.define(
    "rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor w, Tensor rstd) -> (Tensor dx, Tensor dw)",
    fake=lambda dy, dsum, x, w, rstd: (x.new_empty(x.shape), w.new_empty(w.shape)),
    ref=ref.bwd,
    triton="rms_norm.bwd",
    check=contract("dy", "dsum", "x", "w", "rstd"),
    supports=KERNELS,
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dim of x by its root mean square and scale it by weight, with fp32 accumulation.

    Args:
        x: (..., N) float32, float16, bfloat16 or (in plain torch) float64, N >= 1; rows may be strided.
        weight: (N,) in x's dtype or float32.
        eps: added to the mean square.
        residual: (..., N) like x; added to x first.

    Returns y (..., N) in x's dtype; with a residual (y, x + residual). Any transform of torch.func takes it.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    return norm("rms_norm", x, residual, eps, weight)
