"""Rotary embedding of q and k in one launch, 64 MB together, and one decoded token of 256 sequences.

pytest benchmarks/ops/bench_rope.py
python -m benchmarks.run ops rope --out FILE [--quick]
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import harness
from cs336.ops import registry
from cs336.ops.ref import rope as ref

DTYPE = torch.bfloat16
SHAPES = {  # sequences, tokens, heads of q, heads of k, features
    "tiny": [(1, 3, 2, 1, 8)],
    "quick": [(4, 2048, 24, 8, 128)],
    "full": [(4, 2048, 24, 8, 128), (4, 2048, 48, 16, 64), (256, 1, 32, 8, 128)],
}


def inputs(B: int, S: int, Hq: int, Hk: int, D: int, device: torch.device) -> tuple[Tensor, ...]:
    """q and k as a projection leaves them, by token; tables of angles in order."""
    q, k = (torch.randn(B, S, H, D, device=device).to(DTYPE).transpose(1, 2) for H in (Hq, Hk))
    angles = torch.rand(1, S, D // 2, device=device)
    return q, k, angles.cos(), angles.sin()


def ours(variant: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> harness.Call:
    args = [q, k], cos, sin, None, False, False
    if reason := registry.why_not("rope_fwd", variant, *args):
        raise NotImplementedError(reason)
    overload = registry.OPS["rope_fwd"].overloads[variant]
    return lambda: tuple(overload(*args))


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """x cos + rotated(x) sin in x's dtype, as models write it."""
    cos, sin = (torch.cat((t, t), -1)[:, None].to(q.dtype) for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return turned(q), turned(k)


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(ref.fwd(x, cos[:, None], sin[:, None], False) for x in (q, k))


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        B, S, Hq, Hk, D = shape
        contenders: dict[str, harness.Bind] = {v: functools.partial(ours, v) for v in registry.NAMESPACE}
        contenders["eager"] = harness.eager(eager)
        if size != "tiny":  # takes seconds
            contenders["compile"] = harness.compiled(formula)
        moved = 2 * B * S * (Hq + Hk) * D * DTYPE.itemsize
        yield harness.Case("rope", "fwd", shape, DTYPE, functools.partial(inputs, *shape), contenders, bytes=moved)


def bench_rope(benchmark, case):
    harness.bench(benchmark, case)
