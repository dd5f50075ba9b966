"""Rotary position embedding.  (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)      Su et al. 2021, arXiv:2104.09864

Each pair of features turns by its position times its frequency: ops/rope_tables.py makes the tables. With P pairs, pair
i is (x[i], x[i + P]), or (x[2i], x[2i + 1]) when interleaved; features from 2 P on are left as they are. The backward
turns back. Bytes that must move: 2 numel(x) elements; 3 FLOPs an element: memory-bound on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import has_kernel, rows, turn
from cs336.ops.ref import rope as ref
from cs336.ops.ref.embedding import look_up


def check_tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """x (B, H, S, D); cos and sin (L, P) float32 beside positions (1 or B, S), or (1 or B, S, P)."""
    B, _, S, D = x.shape
    shape = "(L, P)" if positions is not None else f"(1 or {B}, {S}, P)"
    fits = cos.dim() == 2 if positions is not None else cos.dim() == 3 and cos.shape[:2] in ((1, S), (B, S))
    if not fits or 2 * cos.shape[-1] > D or cos.dtype != torch.float32 or cos.device != x.device:
        raise ValueError(f"cos must be {shape} float32 with 2 P <= {D} on {x.device}, got {like(cos)}")
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.device != cos.device or sin.stride() != cos.stride():
        raise ValueError(f"sin must be like cos, {like(cos)} {cos.stride()}, got {like(sin)} {sin.stride()}")
    check_last_dims(cos=cos)
    if positions is not None and (
        positions.shape not in ((1, S), (B, S))
        or positions.dtype not in (torch.int64, torch.int32)
        or positions.device != x.device
        or positions.stride(-1) not in (1, 0)
    ):
        raise ValueError(f"positions must be (1 or {B}, {S}) int64 or int32 on {x.device}, got {like(positions)}")


def check_heads(name: str, x: Tensor, other: Tensor) -> None:
    same = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (other.shape[0], *other.shape[2:])
    if not same or x.dtype != other.dtype or x.device != other.device or not x.is_floating_point():
        raise ValueError(f"{name} must be (B, H, S, D), floating point, like q but for its heads, got {like(x)}")
    if x.shape[-1] == 0 or (x.shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(f"{name} must have D >= 1 and its last dim contiguous, got {like(x)}, stride {x.stride()}")


def _check(xs, cos, sin, positions, interleaved, inverse) -> None:
    if not 1 <= len(xs) <= 2:
        raise ValueError(f"xs must be one or two tensors, got {len(xs)}")
    for x in xs:
        check_heads("x", x, xs[0])
    check_tables(xs[0], cos, sin, positions)


def kernels_refuse(x: Tensor) -> str | None:
    if reason := no_float64(x):
        return reason
    return None if x.shape[-1] <= 1024 else f"the kernels take heads of up to 1024 features, not {x.shape[-1]}"


registry.define(
    "rope_fwd(Tensor[] xs, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor[]",
    fake=lambda xs, *_: [torch.empty_like(x) for x in xs],
    ref=ref.many,
    triton="rope.fwd",
    check=_check,
    supports=dict.fromkeys(("native", "triton"), lambda xs, *_: kernels_refuse(xs[0])),
)


class _Rope(torch.autograd.Function):
    """by_token: xs are (B, S, H, D), as they are stored (see cs336.ops.attention_autograd); otherwise (B, H, S, D)."""

    @staticmethod
    def forward(ctx, cos, sin, positions, interleaved, inverse, by_token, *xs):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.inverse, ctx.by_token = interleaved, inverse, by_token
        return _turned(xs, by_token, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx, *dys):
        cos, sin, positions = ctx.saved_tensors
        grads, tables = [rows(dy) for dy in dys], (cos, sin, positions, ctx.interleaved, not ctx.inverse)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dxs = _Rope.apply(*tables, ctx.by_token, *grads)  # differentiable again
        else:
            dxs = _turned(grads, ctx.by_token, *tables)
        return None, None, None, None, None, None, *dxs


def _turned(xs: Sequence[Tensor], by_token: bool, *tables) -> tuple[Tensor, ...]:
    if not by_token:
        return tuple(registry.call("rope_fwd", list(xs), *tables))
    return tuple(turn(y) for y in registry.call("rope_fwd", [turn(x) for x in xs], *tables))


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False) -> Tensor:
    """Rotate the first features of x, in fp32.

    Args:
        x: (..., S, D) floating point.
        cos, sin: (..., P), broadcastable to x's leading dims, 2 P <= D; beside positions (L, P). float32 keeps far
            positions exact.
        positions: (S,) or (B, S) int64 or int32 for x (B, H, S, D): the rows of the tables; in order if None.
        interleaved: pair neighbouring features, as the paper does, instead of the two halves.

    Returns a tensor like x. Raises ValueError for shapes or dtypes that do not fit, IndexError on a CPU for positions
    outside the tables; on a GPU those give NaN.
    """
    _check_public(x, cos, sin, positions)
    if positions is None and x.dim() > 2 and cos.dim() > 2 and cos.shape[-3] != 1:  # each head has tables of its own
        return ref.fwd(x, cos, sin, interleaved)
    if not _has_kernel(x, cos):
        return ref.fwd(x, *_broadcast(cos, sin, positions), interleaved)
    x_BHSD = _four_dims(rows(x))
    (y,) = _Rope.apply(*_tables(x_BHSD, cos, sin, positions), interleaved, False, False, x_BHSD)
    return y.view(x.shape) if y.is_contiguous() else y.reshape(x.shape)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """`rope` of q (B, Hq, S, D) and k (B, Hkv, S, D) in one launch. The other arguments, and errors, are rope's."""
    check_heads("q", rows(q), q)
    check_heads("k", rows(k), q)
    _check_public(q, cos, sin, positions)
    if not _has_kernel(q, cos):
        tables = _broadcast(cos, sin, positions)
        return ref.fwd(q, *tables, interleaved), ref.fwd(k, *tables, interleaved)
    q, k, tables = rows(q), rows(k), _tables(q, cos, sin, positions)
    if q.stride(1) < q.stride(2):
        q, k = _Rope.apply(*tables, interleaved, False, True, turn(q), turn(k))
        return turn(q), turn(k)
    return _Rope.apply(*tables, interleaved, False, False, q, k)


def _has_kernel(x: Tensor, cos: Tensor) -> bool:
    """Whether a kernel shall run; else plain torch, which inductor fuses with its neighbours."""
    return cos.dtype == torch.float32 and not cos.requires_grad and has_kernel("rope_fwd", [x], cos)


def _four_dims(x: Tensor) -> Tensor:
    if x.dim() < 4:
        return x.view(*[1] * (4 - x.dim()), *x.shape)
    return x if x.dim() == 4 else x.flatten(0, -4)


def _broadcast(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tables that broadcast to x (..., H, S, D)."""
    if positions is None:
        return cos, sin
    cos, sin = (look_up(table, positions, "positions") for table in (cos, sin))
    return (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(-3), sin.unsqueeze(-3))


def _tables(x_BHSD: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None):
    """Tables and positions as the raw ops have them."""
    cos, sin = rows(cos), rows(sin)
    if positions is not None:
        return cos.contiguous(), sin.contiguous(), positions.reshape(-1, positions.shape[-1])
    B, _, S, _ = x_BHSD.shape

    def three(table: Tensor) -> Tensor:
        if table.dim() > 2:
            table = table.squeeze(-3)
        table = table if table.dim() <= 3 else table.flatten(0, -3)
        table = table.view(*[1] * (3 - table.dim()), *table.shape)
        return table.expand(table.shape[0], S, table.shape[-1])

    cos, sin = three(cos), three(sin)
    if cos.shape[0] not in (1, B):  # the leading dims were broadcast in part: made whole
        raise ValueError(f"cos must have one batch or x's {B}, got {cos.shape[0]}")
    return cos, sin if sin.stride() == cos.stride() else sin.clone(), None


def _check_public(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., D), floating point, got {tuple(x.shape)} {x.dtype}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if cos.dim() == 0 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            f"cos must be (..., P) with 2 P <= {x.shape[-1]} to fit x {tuple(x.shape)}, got {tuple(cos.shape)}"
        )
    if positions is None:
        lead = tuple(reversed(x.shape[:-1]))
        fits = cos.dim() <= x.dim() and all(c in (1, n) for c, n in zip(reversed(cos.shape[:-1]), lead, strict=False))
        if not fits:
            raise ValueError(f"cos must be (..., P) to fit x {tuple(x.shape)}, got {tuple(cos.shape)}")
        return
    if cos.dim() != 2 or x.dim() < 2:
        raise ValueError(f"cos must be (L, P) beside positions, got {tuple(cos.shape)}")
    lead = x.shape[:-3] if positions.dim() > 1 else ()
    if positions.shape != (*lead, x.shape[-2]) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"positions must be ({x.shape[-2]},) or {(*x.shape[:-3], x.shape[-2])} int64 or int32 to fit x "
            f"{tuple(x.shape)}, got {like(positions)}"
        )
