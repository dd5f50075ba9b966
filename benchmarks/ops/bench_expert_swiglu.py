"""The first half of a mixture's experts: one kernel beside torch's grouped matrix products.

pytest benchmarks/ops/bench_expert_swiglu.py
python -m benchmarks.run ops expert_swiglu --out FILE [--quick]

Shapes are tokens, experts, choices a token, d_model, features of an expert: Qwen3-30B-A3B's and Mixtral-8x7B's. Bytes:
x, h and the matrices of the experts that are chosen, as many as by chance, once. "grouped" gathers, multiplies twice
and gates.
"""

import functools
from collections.abc import Iterator

import torch

from benchmarks import harness
from cs336.nn.mlp import gate as gated
from cs336.nn.moe import grouped_matmul

DTYPE = torch.bfloat16
MODELS = [(128, 8, 2048, 768), (8, 2, 4096, 14336)]
SHAPES = {
    "tiny": [(3, 4, 2, 32, 48)],
    "quick": [(N, *MODELS[0]) for N in (8, 512)],
    "full": [(N, *model) for model in MODELS for N in (1, 8, 64, 512, 4096, 16384)],
}


def inputs(shape: tuple[int, ...], device: torch.device) -> tuple:
    N, E, K, M, F = shape
    x = torch.randn(N, M, device=device).to(DTYPE)
    gate, up = (torch.randn(E, F, M, device=device, dtype=DTYPE) / M**0.5 for _ in range(2))
    expert = torch.rand(N, E, device=device).topk(K).indices.flatten()
    return x, expert.argsort(stable=True) // K, torch.bincount(expert, minlength=E), gate, up


def grouped(x, token, load, gate, up) -> tuple:
    rows = x[token]
    return (gated("silu", grouped_matmul(rows, gate, load), grouped_matmul(rows, up, load)),)


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        N, E, K, M, F = shape
        chosen = E * (1 - (1 - K / E) ** N)  # on average
        contenders = harness.variants("expert_swiglu", (0,)) | {"grouped": harness.eager(grouped)}
        yield harness.Case(
            "expert_swiglu",
            "fwd",
            shape,
            DTYPE,
            functools.partial(inputs, shape),
            contenders,
            bytes=int(2 * (N * M + N * K * F + 2 * chosen * F * M)),
            flops=4 * N * K * M * F,
            right=harness.eager(grouped),
        )


def bench_expert_swiglu(benchmark, case):
    harness.bench(benchmark, case)
