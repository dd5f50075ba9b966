"""LayerNorm with a bias: rows of 128 ... 131072, x of 1 MB ... 1 GB; torch, torch.compile, Liger and QuACK beside ours.

pytest benchmarks/ops/bench_layer_norm.py
python -m benchmarks.run ops layer_norm --out FILE [--quick]
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops import norms
from benchmarks.ops.norms import EPS, normal
from cs336 import ops
from cs336.ops.ref import layer_norm as ref


def fwd_inputs(m: int, n: int, device: torch.device) -> tuple:
    return normal(m, n, device=device), normal(n, device=device), normal(n, device=device), EPS


def residual_inputs(m: int, n: int, device: torch.device) -> tuple:
    return normal(m, n, device=device), *fwd_inputs(m, n, device)


def bwd_inputs(m: int, n: int, device: torch.device) -> tuple:
    x, w, b, eps = fwd_inputs(m, n, device)
    return normal(m, n, device=device), None, x, w, *ref.fwd(x, w, b, eps)[1:]


# ---- torch ----


def eager_fwd(x, w, b, eps):
    return (F.layer_norm(x, w.shape, w, b, eps),)


def eager_residual(x, residual, w, b, eps):
    total = x + residual
    return F.layer_norm(total, w.shape, w, b, eps), total


def eager_bwd(dy, dsum, x, w, mean, rstd):
    bwd, bias = torch.ops.aten.native_layer_norm_backward, w  # only whether there is a bias matters
    mean, rstd = (s[:, None].to(x.dtype if x.is_cpu else s.dtype) for s in (mean, rstd))
    return lambda: bwd(dy, x, w.shape, mean, rstd, w, bias, [True, True, True])


# ---- Liger ----


def liger_fwd(x, w, b, eps):
    from liger_kernel.ops.layer_norm import layer_norm_forward

    return lambda: layer_norm_forward(x, w, b, eps)[:1]


def liger_bwd(dy, dsum, x, w, mean, rstd):
    from liger_kernel.ops.layer_norm import layer_norm_backward

    return lambda: layer_norm_backward(dy, x, w, w, mean, rstd)


# ---- QuACK takes float32 parameters ----


def quack_fwd(x, w, b, eps):
    from quack.rmsnorm import layernorm_fwd

    w, b = w.float(), b.float()
    return lambda: layernorm_fwd(x, w, b, eps, return_rstd=True, return_mean=True)[:1]


def quack_bwd(dy, dsum, x, w, mean, rstd):
    from quack.rmsnorm import layernorm_bwd

    w = w.float()
    return lambda: layernorm_bwd(x, w, dy, rstd, mean)


PASSES = {
    "fwd": norms.Pass(
        fwd_inputs,
        harness.variants("layer_norm_fwd", keep=(0,))
        | norms.torchs(harness.eager(eager_fwd), eager_fwd)
        | {"liger": liger_fwd, "quack": quack_fwd},
        moved=2,
    ),
    "residual_fwd": norms.Pass(
        residual_inputs,
        harness.variants("layer_norm_residual_fwd", keep=(0, 3))
        | norms.torchs(harness.eager(eager_residual), eager_residual),
        moved=4,
    ),
    "bwd": norms.Pass(
        bwd_inputs,
        harness.variants("layer_norm_bwd", keep=(0, 1, 2))
        | norms.torchs(eager_bwd, ref.bwd)
        | {"liger": liger_bwd, "quack": quack_bwd},
        moved=3,
    ),
}


def cases(size: str) -> Iterator[harness.Case]:
    return norms.cases("layer_norm", PASSES, size)


def host(device: torch.device, blocks: int = 30) -> list[dict[str, Any]]:
    def ours(x, w):
        return ops.layer_norm(x, w, w, EPS)

    def torchs(x, w):
        return F.layer_norm(x, w.shape, w, w, EPS)

    return norms.host_rows("layer_norm", ours, torchs, device, blocks)


def bench_layer_norm(benchmark, case):
    harness.bench(benchmark, case)


def bench_layer_norm_host(benchmark):
    harness.bench_host(benchmark, host)
