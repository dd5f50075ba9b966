"""Linear attention with decay: attention without the softmax, so that a state of K V numbers stands for all tokens.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

Without g that of arXiv:2006.16236, less its feature map and normaliser; with a constant g a head RetNet
(arXiv:2307.08621); with g made of the token the scalar gate of gated linear attention (arXiv:2312.06635) and Mamba-2's
state space (arXiv:2405.21060), where q is C, k is B and v is dt x. `gated_delta_rule` corrects what the state holds
under a key instead of adding to it (DeltaNet, arXiv:2406.06484; with decay arXiv:2412.06464).

In chunks of C = 64 tokens a head takes 2 C (K + V) + 4 K V FLOPs a token forward, and must move q, k, v, o, once.
B = batch, H = heads, G = heads of q and k, T = tokens, K = features of a key, V = of a value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cs336.ops import chunked, registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import default_scale, has_kernel, rows
from cs336.ops.ref import linear_attention as ref
from cs336.ops.ref.wide import wide

WIDE_KEYS = 107 * 1024  # bytes of shared memory that the backward takes for keys of 256 features in float32


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
    if segments is not None and (
        segments.shape != (B, T) or segments.dtype.is_floating_point or segments.device != q.device
    ):
        raise ValueError(f"segments must be ({B}, {T}) integers on {q.device}, got {like(segments)}")


def _check_raw(*args) -> None:
    check(*args)
    check_last_dims(**dict(zip("qkv", args, strict=False)))


def _check_bwd(do, dstate, *args) -> None:
    _check_raw(*args)
    check_gradients(do, dstate, args[0], args[2])


def check_gradients(do, dstate, q, v) -> None:
    """Of the outputs and, if there is one, of the last state."""
    stat, state_shape = torch.promote_types(q.dtype, torch.float32), (*v.shape[:2], q.shape[-1], v.shape[-1])
    for name, x, shape, dtype in (("do", do, v.shape, v.dtype), ("dstate", dstate, state_shape, stat)):
        if x is not None and (x.shape != shape or x.dtype != dtype or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)} {dtype} on {q.device}, got {like(x)}")
    check_last_dims(do=do)


def _triton_refuses(q, k, v, *_) -> str | None:
    if reason := no_float64(q):
        return reason
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the Triton kernels take keys and values of up to 256 features, not {q.shape[-1]} and {v.shape[-1]}"
    if q.is_cuda and q.dtype == torch.float32 and q.shape[-1] > 128 and registry.shared_memory(q.device) < WIDE_KEYS:
        return f"keys of {q.shape[-1]} features in float32 take {WIDE_KEYS} bytes of shared memory a block"
    return None


def fake_fwd(q, k, v, *_):
    (B, H, T, V), K = v.shape, q.shape[-1]
    stat = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(B, T, H, V).transpose(1, 2), v.new_empty(B, H, K, V, dtype=stat)


def _fake_bwd(do, dstate, q, k, v, g, state, segments, scale):
    stat = torch.promote_types(q.dtype, torch.float32)
    (B, H, T, V), K = v.shape, q.shape[-1]
    return (
        *(x.new_empty(B, T, *x.shape[1::2]).transpose(1, 2) for x in (q, k, v)),
        v.new_empty(B, H, T, dtype=stat),
        v.new_empty(B, H, K, V, dtype=stat),
    )


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? state, Tensor? segments, float scale"
registry.define(
    f"linear_attention_fwd({ARGUMENTS}) -> (Tensor o, Tensor last)",
    fake=fake_fwd,
    ref=ref.fwd,
    triton="linear_attention.fwd",
    check=_check_raw,
    supports={"triton": _triton_refuses},
)
registry.define(
    f"linear_attention_bwd(Tensor do, Tensor? dstate, {ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dfirst)",
    fake=_fake_bwd,
    ref=ref.bwd,
    triton="linear_attention_bwd.bwd",
    check=_check_bwd,
    supports={"triton": lambda do, dstate, *rest: _triton_refuses(*rest)},
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, state, segments, scale):
        ctx.save_for_backward(q, k, v, g, state, segments)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return registry.call("linear_attention_fwd", q, k, v, g, state, segments, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, g, state, segments = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(v)
        dq, dk, dv, dg, dfirst = registry.call(
            "linear_attention_bwd", rows(do), dlast, q, k, v, g, state, segments, ctx.scale
        )
        return dq, dk, dv, None if g is None else dg, None if state is None else dfirst, None, None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """Causal linear attention whose state decays by exp(g) a token.

    Args:
        q, k: (B, G, T, K) floating point.
        v: (B, H, T, V) like q; head h reads heads h // (H / G) of q and k.
        g: (B, H, T), log of the decay, 0 or less; none if None.
        scale: of the outputs; 1 / sqrt(K) if None.
        initial_state: (B, H, K, V), what the tokens before have come to; zeros if None.
        segments: (B, T) integers, equal ones side by side: tokens with different ones are strangers. The first sees
            the initial state.
        return_state: return the state after the last token too, (B, H, K, V) in float32 or wider.

    Returns o (B, H, T, V) like v, or (o, state). Raises ValueError for shapes, dtypes or devices that do not fit.

    On a GPU Triton's kernels; elsewhere plain torch in chunks, which the backward computes again, and one token by
    itself; the recurrence where "ref" is forced.
    """
    g, state = bounded(g), None if initial_state is None else wide(initial_state)
    scale = default_scale(q) if scale is None else scale
    args = q, k, v, g, state, segments, scale
    check(*args)
    if registry.forced() == "ref":
        o, last = ref.fwd(*args)
    elif v.shape[2] == 1:
        q0, k0, v0, g0, before = first_token(q, k, v, g, state)
        o, last = ref.step(q0, k0, v0, g0, before, scale)
        o = o[:, :, None].to(v.dtype)
    elif v.numel() and has_kernel("linear_attention_fwd", *args):
        o, last = _LinearAttention.apply(*(rows(x) for x in (q, k, v)), g, state, segments, scale)
    else:
        o, last = recomputed(chunked.linear_attention, *args)
    return (o, last) if return_state else o


def bounded(g: Tensor | None) -> Tensor | None:
    """Log-decays that can be added up and taken off again; the least one's exponential is 0 all the same."""
    return None if g is None else _Bounded.apply(wide(g))


def first_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None):
    """What a step takes: the first token's q, k, v and g, wide and for each head of the values, and a state."""
    q, k = (wide(ref.heads(x, v.shape[1])) for x in (q, k))
    state = ref.start(k, v, state)
    return q[:, :, 0], k[:, :, 0], wide(v[:, :, 0]), None if g is None else g[:, :, 0], state


def recomputed(function: Callable, *args: Any) -> Any:
    """Keeps the arguments alone for the backward."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


class _Bounded(torch.autograd.Function):
    """A gradient passes as it is: where g is bounded its exponential, and what comes back, is 0. Nothing is kept."""

    @staticmethod
    def forward(ctx, g):
        least = -746.0 if g.dtype == torch.float64 else -104.0  # FORGETS in triton/linear_attention.py
        one = g[tuple(slice(0, 1) if step == 0 else slice(None) for step in g.stride())]  # what is expanded stays so
        return one.clamp(min=least).expand_as(g)

    @staticmethod
    def backward(ctx, dg):
        return dg
