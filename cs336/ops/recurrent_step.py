"""One token more of a recurrence, whose state stays where it is: what decoding does between two projections.

    S <- exp(g) S + k v^T                         linear attention            o = scale S^T q
    S <- exp(g) (S - b k (k^T S)) + b k v^T       by the delta rule: b = sigmoid(beta), q and k brought to length 1

    g = -exp(A_log) dt,  dt = softplus(g + dt_bias)     where a decay is made of the token
    v = dt v,  o = o + D v                              Mamba-2, arXiv:2405.21060
    y = norm(o) silu(gate)                              each where it is asked for

In one launch, for a step of few rows lasts as long as its launches. Bytes that must move: the state, 8 K V a head, read
and written once; FLOPs 4 K V, by the delta rule 8. N = rows of the state, B = rows of a step, H = heads, G = heads of q
and k, K = features of a key, V = of a value, R = states kept of a row: that after n tokens is the one n mod R.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import default_scale, rows, run
from cs336.ops.paged_attention import readable
from cs336.ops.ref import recurrent_step as ref

MOST_STATE = 128 * 128  # numbers of a head's state, each side a power of two, that a program of Triton's holds


def recurrent_step_(
    memory: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    places: Tensor | None = None,
    *,
    g: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    beta: Tensor | None = None,
    D: Tensor | None = None,
    norm: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Read each row's state, make it that after its next token, and return what this token reads there.

    Args:
        memory: (N, R, H, K, V) float32, or float64 for float64, contiguous, written to. A row of no tokens begins with
            zeros, whatever is there.
        q, k: (B, G, K) floating point; v: (B, H, V) like q; head h reads heads h // (H / G) of q and k.
        lengths: (B,) int32 or int64, tokens of each row before this one.
        places: (B,) int32 or int64, which rows of memory these are; None: the first B. Of rows that share a place none
            may be read again.
        g: (B, H), the log of the decay, or with A_log and dt_bias, (H,) each, what it is made of. None: no decay.
        beta: (B, H), before its sigmoid: the delta rule.
        D: (H,), Mamba-2's; needs A_log.
        norm: (V,), of an RMSNorm over each head of o, with eps; gate: (B, H, V) like q.
        scale: of o; 1 / sqrt(K) if None.

    Returns y (B, H, V) like v; all is computed in float32, float64 for float64. No gradient. Raises ValueError for
    arguments that do not fit. What lengths and places hold is checked on a CPU; on a GPU a row whose place is outside
    the memory is skipped, and its y undefined.
    """
    scale = default_scale(q) if scale is None else scale
    read = [x if x is None or x.dim() == 0 else rows(x) for x in (q, k, v, gate)]
    args: Any = memory, *read[:3], lengths, places, g, A_log, dt_bias, beta, D, norm, read[3], scale, eps
    _check(*args)
    return run("recurrent_step_", *args)


def check_rows(memory: Tensor, count: int, lengths: Tensor, places: Tensor | None) -> None:
    """Of a step of `count` rows, whose state is at `places` of memory (N, ...)."""
    for name, x in (("lengths", lengths), ("places", places)):
        if x is None:
            continue
        if x.shape != (count,) or x.dtype not in (torch.int32, torch.int64) or x.device != memory.device:
            raise ValueError(f"{name} must be ({count},) int32 or int64 on {memory.device}, got {like(x)}")
        if count and readable(x) and x.min() < 0:
            raise ValueError(f"{name} must be 0 or more, got {int(x.min())}")
    N = memory.shape[0]
    if places is None and count > N:
        raise ValueError(f"the state has {N} rows, {count} were given: say their places")
    if places is not None and count and readable(places) and places.max() >= N:
        raise ValueError(f"places must be below {N}, the rows of the state, got {int(places.max())}")


def _check(memory, q, k, v, lengths, places, g, A_log, dt_bias, beta, D, norm, gate, scale, eps) -> None:
    if q.dim() != 3 or k.shape != q.shape or not q.is_floating_point():
        raise ValueError(f"q and k must be one (B, G, K), floating point, got {like(q)} and {like(k)}")
    (B, G, K), (H, V) = q.shape, v.shape[1:] if v.dim() == 3 else (0, 0)
    if v.dim() != 3 or v.shape[0] != B or G == 0 or H % G:
        raise ValueError(f"v must be ({B}, a multiple of {G}, V) to fit q {tuple(q.shape)}, got {like(v)}")
    stat = torch.promote_types(q.dtype, torch.float32)
    if memory.dim() != 5 or memory.shape[2:] != (H, K, V) or memory.dtype != stat or memory.shape[1] == 0:
        raise ValueError(f"memory must be (N, R, {H}, {K}, {V}) {stat} to fit q, k and v, got {like(memory)}")
    if not memory.is_contiguous():
        raise ValueError(f"memory must be contiguous, got strides {memory.stride()}")
    check_rows(memory, B, lengths, places)
    for name, x, shape in (("k", k, k.shape), ("v", v, v.shape), ("gate", gate, v.shape)):
        if x is not None and (x.shape != shape or x.dtype != q.dtype or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)} {q.dtype} on {q.device}, as q is, got {like(x)}")
    for name, x, shape in (
        ("g", g, (B, H)), ("A_log", A_log, (H,)), ("dt_bias", dt_bias, (H,)), ("beta", beta, (B, H)), ("D", D, (H,)),
        ("norm", norm, (V,)),
    ):  # fmt: skip
        if x is not None and (x.shape != shape or not x.is_floating_point() or x.device != q.device):
            raise ValueError(f"{name} must be {tuple(shape)}, floating point, on {q.device}, got {like(x)}")
    if memory.device != q.device:
        raise ValueError(f"memory is on {memory.device}, q on {q.device}")
    if (A_log is None) != (dt_bias is None) or (A_log is not None and g is None):
        raise ValueError("a decay of the token needs g, A_log and dt_bias: give all three, or g alone")
    if D is not None and A_log is None:
        raise ValueError("D is of a state whose steps are made of the token: it needs g, A_log and dt_bias")
    check_last_dims(q=q, k=k, v=v, gate=gate, norm=norm, A_log=A_log, dt_bias=dt_bias, D=D)


def _power(n: int) -> int:
    """Of two, n or more."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def _triton_refuses(memory, q, k, v, *rest) -> str | None:
    if reason := no_float64(q):
        return reason
    if _power(q.shape[2]) * _power(v.shape[2]) > MOST_STATE:
        return f"the Triton kernel takes states of up to {MOST_STATE} numbers a head, not {q.shape[2]} x {v.shape[2]}"
    return None


registry.define(
    "recurrent_step_(Tensor(a!) memory, Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? places, Tensor? g, "
    "Tensor? A_log, Tensor? dt_bias, Tensor? beta, Tensor? D, Tensor? norm, Tensor? gate, float scale, float eps) "
    "-> Tensor",
    fake=lambda memory, q, k, v, *_: v.new_empty(v.shape),
    ref=ref.recurrent_step_,
    triton="recurrent_step.recurrent_step_",
    check=_check,
    supports={"triton": _triton_refuses},
)
