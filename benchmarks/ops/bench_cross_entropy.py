"""Cross-entropy: vocabularies of 32000 ... 262144, logits of 1 GB; torch, torch.compile, Liger and QuACK beside ours.

pytest benchmarks/ops/bench_cross_entropy.py
python -m benchmarks.run ops cross_entropy --out FILE [--quick]

fwd returns the losses; bwd the gradient of the logits, in a tensor of its own; gradient both at once, in place.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops.norms import DTYPE, normal
from cs336.ops.ref import cross_entropy as ref

SHAPES = {
    "tiny": [(3, 257)],
    "quick": [(4096, 128256), (8192, 50304)],
    "full": [(16384, 32000), (8192, 50304), (8192, 50257), (4096, 128256), (8192, 131072), (2048, 262144)],
}
OPTIONS = (-100, None, 0.0, 0.0)


def fwd_inputs(n: int, v: int, device: torch.device) -> tuple:
    return normal(n, v, device=device), torch.randint(0, v, (n,), device=device), *OPTIONS, False


def bwd_inputs(n: int, v: int, device: torch.device) -> tuple:
    logits, targets, *options, _ = fwd_inputs(n, v, device)
    lse = torch.cat([torch.logsumexp(rows.float(), -1) for rows in logits.split(256)])  # to spare memory
    return logits, targets, lse, lse.new_empty(0), torch.rand(n, device=device), None, None, *options


def gradient_inputs(n: int, v: int, device: torch.device) -> tuple:
    logits, targets, *options, _ = fwd_inputs(n, v, device)
    return logits, targets, torch.ones((), device=device), *options


def eager_fwd(logits, targets, *_):
    return (F.cross_entropy(logits, targets, reduction="none").float(),)


def plain_fwd(logits, targets, *_):
    return (F.cross_entropy(logits.float(), targets, reduction="none"),)


def plain_bwd(logits, targets, lse, entropy, dloss, *_):
    return (ref.bwd(logits, targets, lse, entropy, dloss, None, None, *OPTIONS),)


def eager_bwd(logits, targets, lse, entropy, dloss, *_):
    """torch's backward alone, from the log-probabilities that its forward keeps."""
    log_p = F.log_softmax(logits, -1)
    picked = torch.zeros_like(logits).scatter_(1, targets[:, None], -dloss[:, None].to(logits.dtype))
    return lambda: (torch.ops.aten._log_softmax_backward_data(picked, log_p, 1, logits.dtype),)


def quack_fwd(logits, targets, *_):
    from quack.cross_entropy import cross_entropy_fwd

    return lambda: cross_entropy_fwd(logits, targets, return_lse=False)[:1]


def quack_bwd(logits, targets, lse, entropy, dloss, *_):
    from quack.cross_entropy import cross_entropy_bwd

    return lambda: (cross_entropy_bwd(logits, targets, dloss, lse),)


def in_place(bind: harness.Bind) -> harness.Bind:
    """Losses and gradient of the first call; later ones run on what it left in the logits."""

    def bind_copy(logits, *args):
        logits = logits.clone()
        call = bind(logits, *args)
        return lambda: (call()[0], logits)

    return bind_copy


def liger_gradient(logits, targets, scale, *_):
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    def call() -> tuple:
        outputs = cross_entropy_forward(logits, targets, None, -100, 0.0, 0.0, "none", None, False)
        return (outputs[0].float(),)

    return call


def quack_gradient(logits, targets, scale, *_):
    """Its backward with the gradient in place, behind its forward."""
    from quack.cross_entropy import cross_entropy_fwd_out

    loss, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))

    def call() -> tuple:
        cross_entropy_fwd_out(logits, targets, None, loss=loss, lse=lse, dx=logits, ignore_index=-100)
        return (loss,)

    return call


PASSES = {
    "fwd": (
        fwd_inputs,
        harness.variants("cross_entropy_fwd", keep=(0,))
        | {
            "eager": harness.eager(eager_fwd),
            "compile": harness.compiled(plain_fwd),
            "quack": quack_fwd,
        },
        1,
    ),
    "bwd": (
        bwd_inputs,
        harness.variants("cross_entropy_bwd", keep=(0,))
        | {"eager": eager_bwd, "compile": harness.compiled(plain_bwd), "quack": quack_bwd},
        2,
    ),
    "gradient": (
        gradient_inputs,
        {
            name: in_place(bind)
            for name, bind in (
                harness.variants("cross_entropy_gradient_", keep=(0,))
                | {"liger": liger_gradient, "quack": quack_gradient}
            ).items()
        },
        2,
    ),
}


def cases(size: str) -> Iterator[harness.Case]:
    for n, v in SHAPES[size]:
        for name, (inputs, everyone, moved) in PASSES.items():
            contenders = {k: v for k, v in everyone.items() if size != "tiny" or k != "compile"}  # takes seconds
            make = functools.partial(inputs, n, v)
            nbytes = moved * n * v * DTYPE.itemsize
            yield harness.Case("cross_entropy", name, (n, v), DTYPE, make, contenders, bytes=nbytes)


def bench_cross_entropy(benchmark, case):
    harness.bench(benchmark, case)
