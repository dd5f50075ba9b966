"""LayerNorm.  y = (x - mean(x)) * rsqrt(var(x) + eps) * w + b         Ba, Kiros & Hinton 2016, arXiv:1607.06450

With a residual, x is first replaced by the sum x + residual, which is returned too: the next layer's residual.
M = rows, N = features. The bytes that must move are rms_norm's: in elements of x, forward 2MN (with residual 4MN),
backward 3MN (with the sum's gradient 4MN). FLOPs are about 7MN and 14MN: memory-bound on every device.
"""

from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import no_float64
from cs336.ops.norm import contract, norm, stat_dtype
from cs336.ops.ref import layer_norm as ref

KERNELS = {"native": no_float64, "triton": no_float64}


def _fake_fwd(x, w, b, eps):
    mean, rstd = (x.new_empty(x.shape[0], dtype=stat_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _faster_fwd(x, w, b, eps) -> str:
    """Triton's forward takes 0.85-1.0 of native's time from 16 MB on, H200 (shorter inputs: 0.3-2 us more).

    By N alone: a row's bits must not depend on how many rows there are.
    """
    return "triton" if 1024 <= x.shape[1] <= 65536 else "native"


registry.define(
    "layer_norm_fwd(Tensor x, Tensor w, Tensor? b, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake_fwd,
    ref=ref.fwd,
    triton="layer_norm.fwd",
    check=contract("x", "w", "b", "eps"),
    supports=KERNELS,
    prefer=_faster_fwd,
)
registry.define(
    "layer_norm_residual_fwd(Tensor x, Tensor residual, Tensor w, Tensor? b, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor sum)",
    fake=lambda x, residual, w, b, eps: (*_fake_fwd(x, w, b, eps), x.new_empty(x.shape)),
    ref=ref.residual_fwd,
    triton="layer_norm.residual_fwd",
    check=contract("x", "residual", "w", "b", "eps"),
    supports=KERNELS,
)
registry.define(
    "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor w, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    fake=lambda dy, dsum, x, w, mean, rstd: (x.new_empty(x.shape), w.new_empty(w.shape), w.new_empty(w.shape)),
    ref=ref.bwd,
    triton="layer_norm.bwd",
    check=contract("dy", "dsum", "x", "w", "mean", "rstd"),
    supports=KERNELS,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dim of x to mean 0 and variance 1, scale by weight and add bias, with fp32 accumulation.

    Args:
        x: (..., N) float32, float16, bfloat16 or (in plain torch) float64, N >= 1; rows may be strided.
        weight: (N,) in x's dtype or float32.
        bias: (N,) in weight's dtype.
        eps: added to the variance.
        residual: (..., N) like x; added to x first.

    Returns y (..., N) in x's dtype; with a residual (y, x + residual). Any transform of torch.func takes it.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    return norm("layer_norm", x, residual, eps, weight, (bias,))
