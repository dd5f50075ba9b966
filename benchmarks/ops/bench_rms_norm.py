"""RMSNorm: rows of 128 ... 131072, x of 1 MB ... 1 GB; torch, torch.compile, Liger and QuACK beside ours.

pytest benchmarks/ops/bench_rms_norm.py
python -m benchmarks.run ops rms_norm --out FILE [--quick]
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops import norms
from benchmarks.ops.norms import EPS, normal
from cs336 import ops
from cs336.ops.ref import rms_norm as ref


def fwd_inputs(m: int, n: int, device: torch.device) -> tuple:
    return normal(m, n, device=device), normal(n, device=device), EPS


def residual_inputs(m: int, n: int, device: torch.device) -> tuple:
    return normal(m, n, device=device), *fwd_inputs(m, n, device)


def bwd_inputs(m: int, n: int, device: torch.device) -> tuple:
    x, w, eps = fwd_inputs(m, n, device)
    return normal(m, n, device=device), None, x, w, ref.fwd(x, w, eps)[1]


# ---- torch ----


def eager_fwd(x, w, eps):
    return (F.rms_norm(x, w.shape, w, eps),)


def eager_residual(x, residual, w, eps):
    total = x + residual
    return F.rms_norm(total, w.shape, w, eps), total


def eager_bwd(dy, dsum, x, w, rstd):
    return torch.ops.aten._fused_rms_norm_backward(dy, x, w.shape, rstd[:, None], w, [True, True])


# ---- Liger ----


def liger_fwd(x, w, eps):
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return lambda: rms_norm_forward(x, w, eps, 0.0, "llama", None)[:1]


def liger_residual(x, residual, w, eps):
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return lambda: fused_add_rms_norm_forward(x, residual, w, eps, 0.0, "llama")[:2]


def liger_bwd(dy, dsum, x, w, rstd):
    """In place as by default: dy becomes dx, so the first call is checked and the later ones run on what it left."""
    from liger_kernel.ops.rms_norm import rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    dy, (block, warps), llama = dy.clone(), calculate_settings(w.shape[0]), 0
    return lambda: rms_norm_backward(dy, x, w, rstd, 0.0, llama, block, warps, True, None)


# ---- QuACK ----


def quack_fwd(x, w, eps):
    from quack.rmsnorm import rmsnorm_fwd

    return lambda: rmsnorm_fwd(x, w, eps=eps, store_rstd=True)[:1]


def quack_tuned_fwd(x, w, eps):
    """It measures every configuration at the first call."""
    from quack.rmsnorm import rmsnorm_fwd_tuned

    absent = dict.fromkeys(("bias", "mean", "residual", "residual_out"))

    def call() -> tuple:
        out, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        rmsnorm_fwd_tuned(x, w, out, rstd=rstd, eps=eps, is_layernorm=False, per_head=False, **absent)
        return (out,)

    return call


def quack_residual(x, residual, w, eps):
    from quack.rmsnorm import rmsnorm_fwd

    return lambda: rmsnorm_fwd(x, w, residual=residual, eps=eps, store_rstd=True)[:2]


def quack_bwd(dy, dsum, x, w, rstd):
    from quack.rmsnorm import rmsnorm_bwd

    return lambda: rmsnorm_bwd(x, w, dy, rstd)[:2]


def quack_tuned_bwd(dy, dsum, x, w, rstd):
    from quack.rmsnorm import rmsnorm_bwd_tuned
    from quack.rmsnorm_config import get_sm_count

    blocks = get_sm_count(x.shape[1], x.device)
    absent = dict.fromkeys(("db_partial", "dresidual_out", "dresidual"))
    switches = {"per_head": False, "has_dw_partial": True, "has_db_partial": False}

    def call() -> tuple:
        dx, partials = torch.empty_like(x), x.new_empty(blocks, x.shape[1], dtype=torch.float32)
        rmsnorm_bwd_tuned(x, w, dy, rstd, dx, dw_partial=partials, sm_count=blocks, **absent, **switches)
        return dx, partials.sum(0).to(w.dtype)

    return call


PASSES = {
    "fwd": norms.Pass(
        fwd_inputs,
        harness.variants("rms_norm_fwd", keep=(0,))
        | norms.torchs(harness.eager(eager_fwd), eager_fwd)
        | {"liger": liger_fwd, "quack": quack_fwd, "quack tuned": quack_tuned_fwd},
        moved=2,
    ),
    "residual_fwd": norms.Pass(
        residual_inputs,
        harness.variants("rms_norm_residual_fwd", keep=(0, 2))
        | norms.torchs(harness.eager(eager_residual), eager_residual)
        | {"liger": liger_residual, "quack": quack_residual},
        moved=4,
    ),
    "bwd": norms.Pass(
        bwd_inputs,
        harness.variants("rms_norm_bwd", keep=(0, 1))
        | norms.torchs(harness.eager(eager_bwd), ref.bwd)
        | {"liger": liger_bwd, "quack": quack_bwd, "quack tuned": quack_tuned_bwd},
        moved=3,
    ),
}


def cases(size: str) -> Iterator[harness.Case]:
    return norms.cases("rms_norm", PASSES, size)


def host(device: torch.device, blocks: int = 30) -> list[dict[str, Any]]:
    return norms.host_rows(
        "rms_norm", lambda x, w: ops.rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, w.shape, w, EPS), device, blocks
    )


def bench_rms_norm(benchmark, case):
    harness.bench(benchmark, case)


def bench_rms_norm_host(benchmark):
    harness.bench_host(benchmark, host)
