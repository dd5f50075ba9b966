"""What linear_attention and gated_delta_rule share: checks, raw ops, gradients. Shapes as in linear_attention.py.

NAME_fwd(*tensors, scale) -> (o, last)
NAME_bwd(do, dstate, *tensors, scale) -> a gradient of each tensor but the segments, the last of them
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like
from cs336.ops.dispatch import rows, transformed
from cs336.ops.ref import linear_attention as ref
from cs336.ops.ref.wide import wide


def define(
    fwd: str,
    bwd: str,
    *,
    reference: ModuleType,
    fake_bwd: Callable,
    check: Callable[..., None],
    triton_refuses: Callable[..., str | None],
) -> None:
    """Both raw ops, by their schemas."""
    stem = fwd.partition("_fwd(")[0]

    def check_fwd(*args) -> None:
        check(*args)
        check_last_dims(**dict(zip("qkv", args, strict=False)))

    def check_bwd(do, dstate, *args) -> None:
        check_fwd(*args)
        _check_gradients(do, dstate, args[0], args[2])

    registry.define(
        fwd,
        fake=_fake_fwd,
        ref=reference.fwd,
        triton=f"{stem}.fwd",
        check=check_fwd,
        supports={"triton": triton_refuses},
    )
    registry.define(
        bwd,
        fake=fake_bwd,
        ref=reference.bwd,
        triton=f"{stem}_bwd.bwd",
        check=check_bwd,
        supports={"triton": lambda do, dstate, *rest: triton_refuses(*rest)},
    )


def check(q, k, v, g, state, segments, scale) -> None:
    if q.dim() != 4 or k.shape != q.shape or not q.is_floating_point():
        raise ValueError(f"q and k must be one (B, G, T, K), floating point, got {like(q)} and {like(k)}")
    (B, G, T, K), V = q.shape, v.shape[-1] if v.dim() else 0
    if v.dim() != 4 or (v.shape[0], v.shape[2]) != (B, T) or G == 0 or v.shape[1] % G:
        raise ValueError(f"v must be ({B}, a multiple of {G}, {T}, V) to fit q {tuple(q.shape)}, got {like(v)}")
    H, stat = v.shape[1], torch.promote_types(q.dtype, torch.float32)
    if k.dtype != q.dtype or v.dtype != q.dtype or len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must have one dtype and device, got {like(q)}, {like(k)}, {like(v)}")
    for name, x, shape in (("g", g, (B, H, T)), ("state", state, (B, H, K, V))):
        if x is not None and (x.shape != shape or x.dtype != stat or x.device != q.device):
            raise ValueError(f"{name} must be {shape} {stat} on {q.device}, got {like(x)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if segments is not None and (
        segments.shape != (B, T) or segments.dtype.is_floating_point or segments.device != q.device
    ):
        raise ValueError(f"segments must be ({B}, {T}) integers on {q.device}, got {like(segments)}")


def _check_gradients(do, dstate, q, v) -> None:
    """Of the outputs and, if there is one, of the last state."""
    stat, state_shape = torch.promote_types(q.dtype, torch.float32), (*v.shape[:2], q.shape[-1], v.shape[-1])
    for name, x, shape, dtype in (("do", do, v.shape, v.dtype), ("dstate", dstate, state_shape, stat)):
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)} {dtype} on {q.device}, got {like(x)}")
    check_last_dims(do=do)


def _fake_fwd(q, k, v, *_):
    (B, H, T, V), K = v.shape, q.shape[-1]
    stat = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(B, T, H, V).transpose(1, 2), v.new_empty(B, H, K, V, dtype=stat)


class Recurrence(torch.autograd.Function):
    """A subclass an op, so that graphs and profiles name it."""

    @staticmethod
    def forward(ctx, op, scale, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.op, ctx.scale = op, scale
        ctx.set_materialize_grads(False)
        return registry.call(f"{op}_fwd", *tensors, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        tensors = ctx.saved_tensors
        do = torch.zeros_like(tensors[2]) if do is None else do
        grads = registry.call(f"{ctx.op}_bwd", rows(do), dlast, *tensors, ctx.scale)
        return None, None, *(None if x is None else d for x, d in zip(tensors, grads, strict=False)), None


def apply(
    function: type[Recurrence], op: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """OP_fwd with its gradients, of tensors whose last dims may have gaps."""
    return function.apply(op, scale, *(rows(x) for x in (q, k, v)), *others)


def bounded(g: Tensor | None) -> Tensor | None:
    """Log-decays that can be added up and taken off again; the least one's exponential is 0 all the same."""
    if g is None:
        return None
    return wide(g).clamp(min=_least(g.dtype)) if transformed() else _Bounded.apply(wide(g))


def first_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None):
    """What a step takes: the first token's q, k, v and g, wide and for each head of the values, and a state."""
    q, k = (wide(ref.heads(x, v.shape[1])) for x in (q, k))
    state = ref.start(k, v, state)
    return q[:, :, 0], k[:, :, 0], wide(v[:, :, 0]), None if g is None else g[:, :, 0], state


def _least(dtype: torch.dtype) -> float:
    return -746.0 if dtype == torch.float64 else -104.0  # FORGETS in triton/linear_attention.py


class _Bounded(torch.autograd.Function):
    """A gradient passes as it is: where g is bounded its exponential, and what comes back, is 0. Nothing is kept."""

    @staticmethod
    def forward(ctx, g):
        one = g[tuple(slice(0, 1) if step == 0 else slice(None) for step in g.stride())]  # what is expanded stays so
        return one.clamp(min=_least(g.dtype)).expand_as(g)

    @staticmethod
    def backward(ctx, dg):
        return dg
