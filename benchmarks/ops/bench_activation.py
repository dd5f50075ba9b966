"""SwiGLU, GEGLU (tanh) and ReLU^2: rows of 1024 ... 32768, 64 MB each; torch, torch.compile and Liger beside ours.

pytest benchmarks/ops/bench_activation.py
python -m benchmarks.run ops activation --out FILE [--quick]
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops.norms import DTYPE, normal
from cs336.ops.activation import Kind

WIDTHS = {"tiny": [33], "quick": [11008], "full": [1024, 4096, 11008, 32768]}
MEGABYTES = 64  # of each tensor

FORMULAS = {
    Kind.SILU: lambda gate, up: F.silu(gate) * up,
    Kind.GELU_TANH: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    Kind.RELU2: lambda x, up: F.relu(x).square(),
}
NAMES = {Kind.SILU: "swiglu", Kind.GELU_TANH: "geglu", Kind.RELU2: "relu2"}


def inputs(kind: Kind, m: int, n: int, backward: bool, device: torch.device) -> tuple:
    x, up, dy = (normal(m, n, device=device) for _ in range(3))
    gate = None if kind == Kind.RELU2 else up
    return (x, gate, dy, int(kind)) if backward else (x, gate, int(kind))


def torchs_fwd(kind: Kind):
    return lambda x, up, _: (FORMULAS[kind](x, up),)


def torchs_bwd(kind: Kind):
    """As autograd of the formula runs it: with the activation kept, and not computed again, it would move more."""

    def bwd(x, up, dy, _):
        leaves = [t.detach().requires_grad_() for t in (x, up) if t is not None]
        with torch.enable_grad():
            y = FORMULAS[kind](leaves[0], leaves[-1])
        return torch.autograd.grad(y, leaves, dy)

    return bwd


def compiled_bwd(kind: Kind):
    """The reference's formula, which torch.compile makes one kernel of."""
    from cs336.ops.ref import activation as ref

    def bwd(x, up, dy, _):
        dx, dup = ref.bwd(x, up, dy, int(kind))
        return (dx,) if up is None else (dx, dup)

    return harness.compiled(bwd)


def liger_fwd(kind: Kind):
    def bind(x, up, _):
        from liger_kernel.ops import geglu, swiglu

        function = {Kind.SILU: swiglu.swiglu_forward, Kind.GELU_TANH: geglu.geglu_forward}[kind]
        return lambda: (function(x, up)[2],)

    return bind


def liger_bwd(kind: Kind):
    """In place: gate and up become their gradients, so it works on copies, and later calls on what it left."""

    def bind(x, up, dy, _):
        from liger_kernel.ops import geglu, swiglu

        function = {Kind.SILU: swiglu.swiglu_backward, Kind.GELU_TANH: geglu.geglu_backward}[kind]
        gate, other = x.clone(), up.clone()
        return lambda: function(gate, other, dy)

    return bind


def cases(size: str) -> Iterator[harness.Case]:
    for n in WIDTHS[size]:
        m = 3 if size == "tiny" else (MEGABYTES << 20) // (n * DTYPE.itemsize)
        for kind, name in NAMES.items():
            gated = kind != Kind.RELU2
            fwd = harness.variants("activation_fwd", keep=(0,)) | {
                "eager": harness.eager(torchs_fwd(kind)),
                "compile": harness.compiled(torchs_fwd(kind)),
            }
            bwd = harness.variants("activation_bwd", keep=(0, 1) if gated else (0,)) | {
                "eager": harness.eager(torchs_bwd(kind)),
                "compile": compiled_bwd(kind),
            }
            if gated:
                fwd["liger"], bwd["liger"] = liger_fwd(kind), liger_bwd(kind)
            if size == "tiny":
                del fwd["compile"], bwd["compile"]  # takes seconds
            for name_of_pass, contenders, moved in (("fwd", fwd, 3 if gated else 2), ("bwd", bwd, 5 if gated else 3)):
                make = functools.partial(inputs, kind, m, n, name_of_pass == "bwd")
                nbytes = moved * m * n * DTYPE.itemsize
                yield harness.Case(name, name_of_pass, (m, n), DTYPE, make, contenders, bytes=nbytes)


def bench_activation(benchmark, case):
    harness.bench(benchmark, case)
