"""One autograd.Function over the raw ops of attention_raw.py. Saved: q, k, v, o, lse, and what is small."""

import numpy as np
import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.attention_raw import CHECKS
from cs336.ops.dispatch import rows, run, transformed, turn
from cs336.ops.ref import attention as ref

PLAIN = {"attention": ref.fwd, "attention_varlen": ref.varlen_fwd, "attention_general": ref.general_fwd}
NUM_OPTIONS = {"attention": 5, "attention_varlen": 9, "attention_general": 9}  # before `deterministic` in the backward


class _Attention(torch.autograd.Function):
    """q, k, v, o and their gradients as they are stored, (B, S, H, D) or packed: torch.compile makes the gradients that
    it hands to a backward contiguous, which would copy what is stored by token and seen by head."""

    @staticmethod
    def forward(ctx, name, deterministic, q, k, v, *rest):
        o, lse = run(f"{name}_fwd", turn(q), turn(k), turn(v), *rest)
        o = turn(o)
        ctx.save_for_backward(q, k, v, o, lse, *(x for x in rest if isinstance(x, Tensor)))
        ctx.set_materialize_grads(False)
        ctx.name, ctx.deterministic, ctx.rest = (
            name,
            deterministic,
            [None if isinstance(x, Tensor) else x for x in rest],
        )
        ctx.tensors = [n for n, x in enumerate(rest) if isinstance(x, Tensor)]
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse, *tensors = ctx.saved_tensors
        rest = list(ctx.rest)
        for n, x in zip(ctx.tensors, tensors, strict=True):
            rest[n] = x
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, *_differentiable(ctx.name, do, dlse, q, k, v, rest), *(None for _ in rest)
        rest.insert(NUM_OPTIONS[ctx.name], ctx.deterministic or registry.is_deterministic())
        if do is None:
            do = torch.zeros_like(o)
        do, dlse = rows(do), None if dlse is None else dlse.contiguous()
        do, q, k, v, o = (turn(x) for x in (do, q, k, v, o))
        grads = run(f"{ctx.name}_bwd", do, dlse, q, k, v, o, lse, *rest)
        return None, None, *(turn(x) for x in grads), *(None for _ in ctx.rest)


def _differentiable(name: str, do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rest: list):
    """dq, dk, dv for create_graph: in plain torch, differentiable again, from q, k and v alone."""
    leaves = [x.view_as(x) for x in (q, k, v)]  # of which two may be one tensor
    wanted = [x for x in leaves if x.requires_grad]
    o, lse = PLAIN[name](*(turn(x) for x in leaves), *rest)
    pairs = [(y, dy) for y, dy in ((turn(o), do), (lse, dlse)) if dy is not None]
    outputs, their_grads = zip(*pairs, strict=True)
    grads = iter(torch.autograd.grad(outputs, wanted, their_grads, create_graph=True, allow_unused=True))
    return tuple(next(grads) if x.requires_grad else None for x in leaves)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, *rest, deterministic: bool = False) -> tuple[Tensor, Tensor]:
    """o and lse of `name`_fwd for these arguments, differentiable; deterministic whether torch is or not."""
    q, k, v = rows(q), rows(k), rows(v)
    if transformed():
        CHECKS[name](q, k, v, *rest)
        return PLAIN[name](q, k, v, *rest)
    if torch.compiler.is_compiling():  # which takes no tensor twice: q is k, or both cu_seqlens are one
        k, v = k.view_as(k), v.view_as(v)
        rest = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in rest)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o, lse = _Attention.apply(name, deterministic, turn(q), turn(k), turn(v), *rest)
        return turn(o), lse
    return run(f"{name}_fwd", q, k, v, *rest)


def with_sinks(o_HSE: Tensor, lse_HS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """o (..., H, S, E) and lse (..., H, S) where each head has one more score, with a value of zero:
    o sigmoid(lse - sink), log(e^lse + e^sink). A query without keys keeps its zeros."""
    sinks_H1 = sinks_H[:, None].to(lse_HS.dtype)
    share_HS = torch.sigmoid(lse_HS - sinks_H1)
    return (o_HSE * share_HS[..., None]).to(o_HSE.dtype), torch.logaddexp(lse_HS, sinks_H1)


def check_sinks(sinks: Tensor, num_heads: int, device: torch.device) -> None:
    if sinks.shape != (num_heads,) or not sinks.is_floating_point() or sinks.device != device:
        got = f"{tuple(sinks.shape)} {sinks.dtype} on {sinks.device}"
        raise ValueError(f"sinks must be a floating-point number a query head, ({num_heads},) on {device}, got {got}")


def new_seed(device: torch.device) -> Tensor:
    """Drawn from torch's generator of the device, without waiting for it: replayed by graphs and checkpoints."""
    return torch.randint(2**63 - 1, (1,), device=device)


def limits(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """A window as raw ops have it: -1 where it is open."""
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window must be (left, right), None where a side is open, got {window!r}")
    left, right = window
    for side, value in (("left", left), ("right", right)):
        if value is not None and not (is_integer(value) and value >= 0):
            raise ValueError(
                f"window's {side} must be an integer of at least 0, or None where it is open, got {value!r}"
            )
    return -1 if left is None else left, -1 if right is None else right


def is_integer(value: object) -> bool:
    """Also of numpy, or a size that torch.compile does not know yet."""
    return isinstance(value, int | np.integer | torch.SymInt)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as torch's attention has them."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
