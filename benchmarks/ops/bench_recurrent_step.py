"""A step of recurrences, whose state is read and written where it lies, beside plain torch.

pytest benchmarks/ops/bench_recurrent_step.py
python -m benchmarks.run ops recurrent_step --out FILE [--quick]

Shapes are rows, heads of q and k, heads, features of a key and of a value: the gated delta rule's, whose outputs are
normed and gated, and Mamba-2's, at 350M parameters. Bytes: the state twice.
"""

import functools
from collections.abc import Iterator

import torch

from benchmarks import harness

DTYPE = torch.bfloat16
SHAPES = {
    "tiny": [(2, 2, 2, 8, 8), (2, 1, 2, 8, 8)],
    "quick": [(1, 8, 8, 128, 128), (64, 8, 8, 128, 128)],
    "full": [(B, *heads) for heads in ((8, 8, 128, 128), (1, 32, 128, 64)) for B in (1, 8, 64, 256)],
}


def inputs(shape: tuple[int, ...], device: torch.device) -> tuple:
    """Two states a row, so that a step that is repeated reads the same one."""
    B, G, H, K, V = shape
    delta = G == H
    memory, lengths = torch.randn(B, 2, H, K, V, device=device), torch.full((B,), 8, device=device)
    q, k = torch.randn(2, B, G, K, device=device).to(DTYPE)
    v, gate = torch.randn(2, B, H, V, device=device).to(DTYPE)
    g, beta = torch.randn(2, B, H, device=device).to(DTYPE)
    A_log, dt_bias, D = torch.randn(3, H, device=device).to(DTYPE)
    norm = torch.ones(V, device=device, dtype=DTYPE)
    rule = (beta, None, norm) if delta else (None, D, None)
    return memory, q, k, v, lengths, None, g, A_log, dt_bias, *rule, gate, 1.0, 1e-5


def cases(size: str) -> Iterator[harness.Case]:
    for shape in SHAPES[size]:
        B, _, H, K, V = shape
        draw = functools.partial(inputs, shape)
        contenders = harness.variants("recurrent_step_", (0,))
        contenders["eager"] = contenders["ref"]
        yield harness.Case("recurrent_step", "fwd", shape, DTYPE, draw, contenders, bytes=8 * B * H * K * V)


def bench_recurrent_step(benchmark, case):
    harness.bench(benchmark, case)
