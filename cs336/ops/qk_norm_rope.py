"""RMSNorm over each head of q and k, and their rotation, in one pass.   arXiv:2302.05442, arXiv:2104.09864

    y = rope(x * rsqrt(mean(x^2) + eps) * w)      for x of q and of k, each with weights w of its own

Bytes that must move, in elements of q and k together: forward 2 each, backward 3. Memory-bound on every device. What
is normalised is not rounded before it turns.
"""

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.dispatch import rows, run, transformed
from cs336.ops.ref import qk_norm_rope as ref
from cs336.ops.rope import _check_public, _tables, check_heads, check_tables, kernels_refuse


def _check(q, k, q_weight, k_weight, cos, sin, positions, *_) -> None:
    check_heads("q", q, q)
    check_heads("k", k, q)
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w.shape != q.shape[-1:] or w.device != q.device or w.dtype not in (q.dtype, torch.float32):
            raise ValueError(
                f"{name} must be ({q.shape[-1]},) float32 or {q.dtype} on {q.device}, got {tuple(w.shape)} {w.dtype} "
                f"on {w.device}"
            )
        if not w.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {w.stride()}")
    check_tables(q, cos, sin, positions)


def _check_bwd(dq, dk, q, k, q_weight, k_weight, q_rstd, k_rstd, *tables) -> None:
    _check(q, k, q_weight, k_weight, *tables)
    for name, dx, x in (("dq", dq, q), ("dk", dk, k)):
        check_heads(name, dx, x)
        if dx.shape != x.shape:
            raise ValueError(f"{name} must be {tuple(x.shape)}, got {tuple(dx.shape)}")
    for name, rstd, x in (("q_rstd", q_rstd, q), ("k_rstd", k_rstd, k)):
        wide = torch.promote_types(x.dtype, torch.float32)
        if rstd.shape != x.shape[:3] or rstd.dtype != wide or not rstd.is_contiguous() or rstd.device != x.device:
            raise ValueError(
                f"{name} must be contiguous {tuple(x.shape[:3])} {wide}, got {tuple(rstd.shape)} {rstd.dtype}"
            )


def _fake_fwd(q, k, *_):
    wide = torch.promote_types(q.dtype, torch.float32)
    return *(torch.empty_like(x) for x in (q, k)), *(x.new_empty(x.shape[:3], dtype=wide) for x in (q, k))


registry.define(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions, "
    "bool interleaved, float eps) -> (Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)",
    fake=_fake_fwd,
    ref=ref.fwd,
    triton="qk_norm_rope.fwd",
    check=_check,
    supports={"triton": lambda q, *_: kernels_refuse(q)},
)
registry.define(
    "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd, "
    "Tensor k_rstd, Tensor cos, Tensor sin, Tensor? positions, bool interleaved) "
    "-> (Tensor dq_in, Tensor dk_in, Tensor dq_weight, Tensor dk_weight)",
    fake=lambda dq, dk, q, k, q_weight, k_weight, *_: tuple(torch.empty_like(x) for x in (q, k, q_weight, k_weight)),
    ref=ref.bwd,
    triton="qk_norm_rope.bwd",
    check=_check_bwd,
    supports={"triton": lambda dq, dk, q, *_: kernels_refuse(q)},
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, positions, interleaved, eps):
        tables = cos, sin, positions
        q_out, k_out, *rstds = run("qk_norm_rope_fwd", q, k, q_weight, k_weight, *tables, interleaved, eps)
        ctx.save_for_backward(q, k, q_weight, k_weight, *rstds, *tables)
        ctx.interleaved, ctx.eps = interleaved, eps
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq, dk):
        q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, positions = ctx.saved_tensors
        qk, tables = (q, k, q_weight, k_weight), (cos, sin, positions)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: in plain torch, from q and k
            _, _, q_rstd, k_rstd = ref.fwd(*qk, *tables, ctx.interleaved, ctx.eps)
            grads = ref.bwd(dq, dk, *qk, q_rstd, k_rstd, *tables, ctx.interleaved)
        else:
            grads = run("qk_norm_rope_bwd", rows(dq), rows(dk), *qk, q_rstd, k_rstd, *tables, ctx.interleaved)
        return *grads, None, None, None, None, None


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of q and k by its root mean square, scale it by a weight, and rotate it.

    Args:
        q: (B, Hq, S, D) floating point, any strides; k: (B, Hkv, S, D) like q.
        q_weight, k_weight: (D,) in q's dtype or float32.
        cos, sin, positions, interleaved: as in `rope`; the tables are float32.
        eps: added to the mean square.

    Returns tensors like q and k. Differentiable, but for the tables; any transform of torch.func takes it.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    q, k = rows(q), rows(k)
    check_heads("q", q, q)
    _check_public(q, cos, sin, positions)
    args = q, k, q_weight.contiguous(), k_weight.contiguous(), *_tables(q, cos, sin, positions), interleaved, eps
    if transformed():
        _check(*args)
        return ref.plain(*args)
    return _QkNormRope.apply(*args)
