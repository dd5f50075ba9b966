"""The gated delta rule: a linear recurrence that replaces what its state holds under a key.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

DeltaNet, arXiv:2406.06484; with a decay Gated DeltaNet, arXiv:2412.06464. In chunks of C = 64 tokens a head takes
C (3 K + 2 V) + 6 K V FLOPs a token forward, and must move q, k, v, o once. Shapes as in linear_attention.py.
"""

from typing import Any

import torch
from torch import Tensor

from cs336.ops import chunked, recurrence, registry
from cs336.ops.checks import like, no_float64
from cs336.ops.dispatch import default_scale, has_kernel, recomputed
from cs336.ops.ref import gated_delta_rule as ref
from cs336.ops.ref.wide import wide

MOST_KEY_FEATURES = 128  # of the Triton kernels, which hold a state's rows whole
SHARED_MEMORY = {2: 96 * 1024, 4: 196 * 1024}  # that a block of theirs may take, by bytes of an element


def _check(q, k, v, beta, g, state, segments, scale) -> None:
    recurrence.check(q, k, v, g, state, segments, scale)
    stat = torch.promote_types(q.dtype, torch.float32)
    if beta.shape != v.shape[:-1] or beta.device != v.device:
        raise ValueError(f"beta must be {tuple(v.shape[:-1])} on {v.device} to fit v, got {like(beta)}")
    if beta.dtype != stat:
        raise ValueError(f"beta must be {stat}, or narrower, to fit q, got {like(beta)}")


def _triton_refuses(q, *_) -> str | None:
    if reason := no_float64(q):
        return reason
    if q.shape[-1] > MOST_KEY_FEATURES:
        return f"the Triton kernels take keys of up to {MOST_KEY_FEATURES} features, not {q.shape[-1]}"
    least = SHARED_MEMORY[q.dtype.itemsize]
    if q.is_cuda and (room := registry.shared_memory(q.device)) < least:
        return f"the Triton kernels take {least} bytes of shared memory for {q.dtype}, {q.device} has {room} a block"
    return None


def _fake_bwd(do, dstate, q, k, v, *_):
    (B, H, T, V), K = v.shape, q.shape[-1]
    stat = torch.promote_types(q.dtype, torch.float32)
    gates = (v.new_empty(B, H, T, dtype=stat) for _ in range(2))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *gates, v.new_empty(B, H, K, V, dtype=stat)


ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? state, Tensor? segments, float scale"
recurrence.define(
    f"gated_delta_rule_fwd({ARGUMENTS}) -> (Tensor o, Tensor last)",
    f"gated_delta_rule_bwd(Tensor do, Tensor? dstate, {ARGUMENTS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dg, Tensor dfirst)",
    reference=ref,
    fake_bwd=_fake_bwd,
    check=_check,
    triton_refuses=_triton_refuses,
)


class _GatedDeltaRule(recurrence.Recurrence): ...


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """Linear attention that writes by the delta rule: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T.

    beta: (B, H, T), how far what the state holds under k is replaced by v, 0 to 1 (to 2 with negative eigenvalues).
    k should be of length 1: a longer one makes the state grow. The other arguments, results and errors are
    linear_attention's, and so is what runs where; Triton's kernels take keys of up to 128 features.
    """
    g, state = recurrence.bounded(g), None if initial_state is None else wide(initial_state)
    beta = wide(beta)
    scale = default_scale(q) if scale is None else scale
    args = q, k, v, beta, g, state, segments, scale
    _check(*args)
    if v.shape[2] == 1 and registry.forced() != "ref":
        q0, k0, v0, g0, before = recurrence.first_token(q, k, v, g, state)
        o, last = ref.step(q0, k0, v0, beta[:, :, 0], g0, before, scale)
        o = o[:, :, None].to(v.dtype)
    elif registry.forced() == "ref" or (v.numel() and has_kernel("gated_delta_rule_fwd", *args)):
        o, last = recurrence.apply(_GatedDeltaRule, "gated_delta_rule", *args[:-1], scale=scale)
    else:
        o, last = recomputed(chunked.linear_attention, q, k, v, g, state, segments, scale, beta)
    return (o, last) if return_state else o
