"""Linear layer and cross-entropy, forward and backward: torch, torch.compile, Liger, QuACK and CCE beside ours.

pytest benchmarks/ops/bench_linear_cross_entropy.py
python -m benchmarks.run ops linear_cross_entropy --out FILE [--quick]

Everyone returns the mean loss and the gradients of x and weight. "native" is ours as it chooses its chunks, "2048" and
the like with chunks of so many tokens. "per token" is ours with a gradient for each token's loss.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.ops.norms import DTYPE, normal
from cs336 import ops
from cs336.ops import registry

SHAPES = {  # tokens, features, vocabulary
    "tiny": [(5, 16, 33)],
    "quick": [(4096, 4096, 128256), (32768, 768, 50304)],
    "full": [
        (4096, 4096, 128256),
        (32768, 768, 50304),
        (8192, 1600, 50304),
        (8192, 2048, 128256),
        (4096, 2304, 256000),
    ],
}


def inputs(n: int, h: int, v: int, device: torch.device) -> tuple:
    x, weight = normal(n, h, device=device), normal(v, h, device=device) / h**0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,), device=device)


def with_gradients(loss) -> harness.Bind:
    """`loss(x, weight, targets)` and the gradients of the first two."""

    def bind(x, weight, targets):
        def call() -> tuple:
            with torch.enable_grad():
                out = loss(x, weight, targets)
            return out.detach().float(), *torch.autograd.grad(out, (x, weight))

        return call

    return bind


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def compiled(x, weight, targets):
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    return with_gradients(torch.compile(plain, dynamic=False, fullgraph=True))(x, weight, targets)


def liger(x, weight, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    return with_gradients(lambda x, weight, targets: Liger.apply(x, weight, targets)[0])(x, weight, targets)


def quack(x, weight, targets):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return with_gradients(lambda *args: chunked_linear_cross_entropy(*args, reduction="mean"))(x, weight, targets)


def cce(x, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return with_gradients(linear_cross_entropy)(x, weight, targets)


def ours(chunk_size: int | None) -> harness.Bind:
    return with_gradients(functools.partial(ops.linear_cross_entropy, chunk_size=chunk_size))


def ours_in_triton(x, weight, targets):
    """The same with Triton's kernel on each chunk."""
    if reason := registry.why_not("cross_entropy_gradient_", "triton", x, targets, x, -100, None, 0.0, 0.0):
        raise NotImplementedError(reason)
    call = ours(None)(x, weight, targets)

    def forced() -> tuple:
        with registry.use("triton"):
            return call()

    return forced


def per_token(x, weight, targets):
    return -ops.linear_log_probs(x, weight, targets).mean()


CONTENDERS: dict[str, harness.Bind] = {
    "native": ours(None),
    "triton": ours_in_triton,
    "1024": ours(1024),
    "2048": ours(2048),
    "8192": ours(8192),
    "per token": with_gradients(per_token),
    "ref": with_gradients(plain),
    "compile": compiled,
    "liger": liger,
    "quack": quack,
    "cce": cce,
}


def cases(size: str) -> Iterator[harness.Case]:
    contenders = {k: v for k, v in CONTENDERS.items() if size != "tiny" or k != "compile"}  # takes seconds
    for n, h, v in SHAPES[size]:
        make = functools.partial(inputs, n, h, v)
        flops = 6 * n * h * v
        yield harness.Case(
            "linear_cross_entropy", "fwd + bwd", (n, h, v), DTYPE, make, contenders, flops=flops, graph=False
        )


def bench_linear_cross_entropy(benchmark, case):
    harness.bench(benchmark, case)
