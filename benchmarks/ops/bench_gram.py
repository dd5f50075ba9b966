"""Muon's symmetric products, batches of a model's matrices: torch's whole product beside our half of it.

pytest benchmarks/ops/bench_gram.py
python -m benchmarks.run ops gram --out FILE [--quick]

FLOPs are those of the half that must be computed, so a whole product reaches half of the roof at most.
"""

from collections.abc import Iterator

import torch

from benchmarks import harness
from benchmarks.ops.norms import DTYPE, normal

SHAPES = {  # matrices, rows, columns
    "tiny": [(2, 17, 33)],
    "quick": [(48, 768, 768), (36, 768, 2048)],
    "full": [(48, 768, 768), (36, 768, 2048), (24, 768, 3072), (16, 1600, 1600), (12, 1600, 6400), (8, 2048, 2048)],
}


def inputs(b: int, m: int, n: int, with_c: bool, device: torch.device) -> tuple:
    x = normal(b * m, n, device=device).view(b, m, n) / n**0.5
    if not with_c:
        return x, None, 1.0, 1.0
    c = normal(b * m, m, device=device).view(b, m, m)
    return x, c + c.mT, 0.5, -1.5


def whole(x, c, alpha, beta):
    return (x @ x.mT if c is None else torch.baddbmm(c, x, x.mT, beta=beta, alpha=alpha),)


def cases(size: str) -> Iterator[harness.Case]:
    for b, m, n in SHAPES[size]:
        for with_c in (False, True):
            yield harness.Case(
                "gram",
                "x x^T + c" if with_c else "x x^T",
                (b, m, n),
                DTYPE,
                lambda device, shape=(b, m, n), with_c=with_c: inputs(*shape, with_c, device),
                {**harness.variants("gram", (0,)), "eager": harness.eager(whole)},
                flops=b * m * (m + 1) * n,
            )


def bench_gram(benchmark, case):
    harness.bench(benchmark, case)
