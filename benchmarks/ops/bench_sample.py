"""Sampling from logits: 1 to 256 rows of 32k to 152k tokens, without a filter and with each; FlashInfer beside.

pytest benchmarks/ops/bench_sample.py
python -m benchmarks.run ops sample --out FILE [--quick] [--only native,ref]

Bytes: the logits once. Contenders draw their own random numbers, so only the shapes of tokens are compared.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks import harness
from cs336.ops import registry


class Shape(NamedTuple):
    B: int
    V: int


SETTINGS = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "all": (1.0, 0, 1.0, 0.0),
    "top-p": (1.0, 0, 0.9, 0.0),
    "top-k": (1.0, 50, 1.0, 0.0),
    "top-k top-p": (0.8, 50, 0.9, 0.0),
    "min-p": (1.0, 0, 1.0, 0.05),
}
SHAPES = {
    "tiny": [Shape(2, 40)],
    "quick": [Shape(128, 131072)],
    "full": [Shape(B, V) for B in (1, 128, 256) for V in (32000, 131072, 151936)],
}


def inputs(shape: Shape, setting: str, device: torch.device) -> tuple:
    B, V = shape
    temperature, top_k, top_p, min_p = SETTINGS[setting]
    logits = 3 * torch.randn(B, V, device=device)
    floats = [torch.full((B,), x, device=device) for x in (temperature, top_p, min_p)]
    k = torch.full((B,), top_k, dtype=torch.int32, device=device)
    seeds, offsets = torch.arange(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    return logits, floats[0], k, *floats[1:], seeds, offsets, None, None, None, None, None, 0


def ours(variant: str, logits: torch.Tensor, *args) -> harness.Call:
    if reason := registry.why_not("sample", variant, logits, *args):
        raise NotImplementedError(reason)
    overload = registry.OPS["sample"].overloads[variant]

    def call() -> tuple:
        tokens, *_ = overload(logits, *args)
        return ((tokens >= 0).float(),)

    return call


def flashinfer(logits, temperature, top_k, top_p, min_p, *_) -> harness.Call:
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    V = logits.shape[1]
    k = torch.where(top_k > 0, top_k, V).to(torch.int32)
    if (temperature <= 0).any() or (min_p > 0).any():
        raise NotImplementedError("FlashInfer's function of logits has no greedy rows and no min-p")
    return lambda: ((top_k_top_p_sampling_from_logits(logits / temperature[:, None], k, top_p) >= 0).float(),)


CONTENDERS = {variant: functools.partial(ours, variant) for variant in registry.NAMESPACE} | {"flashinfer": flashinfer}


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        for setting in SETTINGS:
            draw = functools.partial(inputs, shape, setting)
            moved = shape.B * shape.V * 4
            yield harness.Case("sample", setting, shape, torch.float32, draw, CONTENDERS, bytes=moved)


def bench_sample(benchmark, case):
    harness.bench(benchmark, case)
