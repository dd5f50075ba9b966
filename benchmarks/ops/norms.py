"""What the benchmarks of rms_norm and layer_norm share: shapes, inputs, and host time of the public call."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

EPS = 1e-5
DTYPE = torch.bfloat16
WIDTHS = [1 << p for p in range(7, 18)]  # 128 ... 131072
MEGABYTES = {"quick": [64], "full": [64, 256, 16, 1024, 4, 1]}  # of x; last what a time limit may cut
COMPILED = 64  # MB at which torch.compile runs: it compiles anew for each shape
TUNED = ("max-autotune", "quack tuned")  # try dozens of kernels for each shape, minutes in all: `--only` names them


@dataclass(frozen=True)
class Pass:
    inputs: Callable[[int, int, torch.device], tuple]  # M, N, device -> arguments of the raw op
    contenders: dict[str, harness.Bind]
    moved: int  # elements, in units of x

    def behind(self) -> "Pass":
        """The same behind the kernel that produces x, whose bytes are counted too; so that the launches can overlap."""
        contenders = {name: harness.behind_producer(bind) for name, bind in self.contenders.items()}
        return Pass(self.inputs, contenders, self.moved + 2)


def torchs(eager: harness.Bind, compiled: Callable[..., tuple]) -> dict[str, harness.Bind]:
    """torch's contenders: its own function, and plain torch compiled."""
    return {
        "eager": eager,
        "compile": harness.compiled(compiled),
        "max-autotune": harness.max_autotuned(compiled),
    }


def shapes(size: str) -> Iterator[tuple[int, int]]:
    """(M, N) of a "tiny" (CPU), "quick" or "full" sweep."""
    if size == "tiny":
        yield from [(4, 128), (3, 257)]
        return
    widths = {"quick": WIDTHS[1::3], "full": WIDTHS}[size]
    for megabytes in MEGABYTES[size]:
        yield from (((megabytes << 20) // (n * DTYPE.itemsize), n) for n in widths)


def cases(op: str, passes: dict[str, Pass], size: str) -> Iterator[harness.Case]:
    for m, n in shapes(size):
        nbytes = m * n * DTYPE.itemsize
        dropped = set() if nbytes == COMPILED << 20 else {"compile", *TUNED}
        behind = {} if nbytes > COMPILED << 20 else {"fwd_behind": passes["fwd"].behind()}
        for name, p in (passes | behind).items():
            contenders = {k: bind for k, bind in p.contenders.items() if k not in dropped}
            inputs = functools.partial(p.inputs, m, n)
            yield harness.Case(op, name, (m, n), DTYPE, inputs, contenders, bytes=p.moved * nbytes)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def host_rows(
    op: str, ours: Callable[..., Any], torchs: Callable[..., Any], device: torch.device, blocks: int
) -> list[dict[str, Any]]:
    """Host seconds of the public call `ours(x, w)` and of torch's, on a size whose device time hides behind it."""
    x, w, dy = (normal(*shape, device=device) for shape in ((8, 512), (512,), (8, 512)))
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
    passes: dict[str, Callable[[Callable[..., Any]], Callable[[], Any]]] = {
        "host fwd": lambda f: lambda: f(x, w),
        "host fwd, grad": lambda f: lambda: f(xg, wg),
        "host fwd + bwd": lambda f: lambda: torch.autograd.grad(f(xg, wg), (xg, wg), dy),
    }
    rows = []
    for name, make in passes.items():
        timings = harness.host_seconds({"cs336": make(ours), "eager": make(torchs)}, device, blocks)
        for variant, timing in timings.items():
            row = {"op": op, "pass": name, "variant": variant, "shape": [8, 512], "dtype": harness.dtype_name(DTYPE)}
            rows.append(row | {"seconds": timing.seconds, "spread": round(timing.spread, 4), "method": timing.method})
    return rows
