"""AdamW over all tensors of a GPT-2-shaped model, one step; torch's fused and foreach optimizers beside ours.

pytest benchmarks/ops/bench_adamw.py
python -m benchmarks.run ops adamw --out FILE [--quick]
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from cs336.ops import registry
from cs336.optim import AdamW

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
TORCH_HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEP = 10
MODELS = {"tiny": (1, 8, 33), "124M": (12, 768, 50257), "355M": (24, 1024, 50257)}  # layers, features, vocabulary
SWEEPS = {
    "tiny": [("tiny", torch.float32)],
    "quick": [("124M", torch.float32)],
    "full": [("124M", torch.float32), ("355M", torch.float32), ("124M", torch.bfloat16)],
}


def shapes(model: str) -> list[tuple[int, ...]]:
    """Of every parameter: embeddings of tokens and of 1024 positions, then the layers, biases too."""
    layers, d, vocabulary = MODELS[model]
    norm: list[tuple[int, ...]] = [(d,), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(vocabulary, d), (1024, d), *layers * layer, *norm]


def inputs(model: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Parameters, gradients, first and second moments, one list after the other. The parameters are much smaller than
    the update of one step, so that a wrong update shows in them."""

    def normal(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
        return size * torch.randn(shape, dtype=dtype, device=device)

    all_shapes, fp32 = shapes(model), torch.float32
    return (
        *(normal(s, dtype, 1e-4) for s in all_shapes),
        *(normal(s, dtype, 1.0) for s in all_shapes),
        *(normal(s, fp32, 0.3) for s in all_shapes),
        *(normal(s, fp32, 1.0).square_() for s in all_shapes),
    )


def split(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """The four lists; copies of all but the gradients, which a step leaves as they are."""
    n = len(tensors) // 4
    return [[t if k == 1 else t.clone() for t in tensors[k * n : (k + 1) * n]] for k in range(4)]


def ours(variant: str, *tensors: Tensor) -> harness.Call:
    params, grads, exp_avgs, exp_avg_sqs = split(tensors)
    lr, *others = HYPER.values()
    step, lr = (torch.tensor(float(number), device=params[0].device) for number in (STEP, lr))
    args = (params, grads, exp_avgs, exp_avg_sqs, [step] * len(params), lr, None, *others)
    if reason := registry.why_not("adamw_", variant, *args):
        raise NotImplementedError(reason)
    overload = registry.OPS["adamw_"].overloads[variant]

    def call() -> tuple:
        overload(*args)
        return (*params, *exp_avgs, *exp_avg_sqs)

    return call


def torchs(*tensors: Tensor, **kind: bool) -> harness.Call:
    """Moments in the parameters' dtype, as torch has them: with bfloat16 parameters it moves 14 bytes to our 22."""
    params, grads, exp_avgs, exp_avg_sqs = split(tensors)
    on_gpu = params[0].is_cuda
    optimizer = torch.optim.AdamW(params, **TORCH_HYPER, capturable=on_gpu, **kind)
    moments = [[m.to(p.dtype) for m, p in zip(ms, params, strict=True)] for ms in (exp_avgs, exp_avg_sqs)]
    for p, g, m, v in zip(params, grads, *moments, strict=True):
        p.grad = g
        step = torch.tensor(STEP - 1.0, device=p.device if on_gpu else None)
        optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def call() -> tuple:
        optimizer.step()
        return (*params, *moments[0], *moments[1])

    return call


CONTENDERS = {variant: functools.partial(ours, variant) for variant in registry.NAMESPACE} | {
    "fused": functools.partial(torchs, fused=True),
    "foreach": functools.partial(torchs, foreach=True),
}


def cases(size: str) -> Iterator[harness.Case]:
    for model, dtype in SWEEPS[size]:
        numel = sum(torch.Size(s).numel() for s in shapes(model))
        moved = numel * (3 * dtype.itemsize + 16)  # p read and written, g read; m and v read and written
        torchs_moved = numel * 7 * dtype.itemsize  # its moments have the parameters' dtype
        yield harness.Case(
            "adamw_",
            "step",
            (numel,),
            dtype,
            functools.partial(inputs, model, dtype),
            CONTENDERS,
            bytes=moved,
            own_bytes=dict.fromkeys(("fused", "foreach"), torchs_moved),
        )


def host(device: torch.device, blocks: int = 30) -> list[dict[str, Any]]:
    """Host time of a whole optimizer step over as many tensors as the 124M model has, each of one element."""

    def stepper(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[], Any]:
        params = [torch.randn(1, device=device) for _ in shapes("124M")]
        for p in params:
            p.grad = torch.randn_like(p)
        return make(params).step

    calls = {
        "cs336": stepper(lambda params: AdamW(params, **TORCH_HYPER)),
        "eager": stepper(lambda params: torch.optim.AdamW(params, **TORCH_HYPER, fused=True)),
    }
    row = {"op": "adamw_", "pass": "host step", "shape": [len(shapes("124M"))], "dtype": "float32"}
    return [
        row | {"variant": v, "seconds": t.seconds, "spread": round(t.spread, 4), "method": t.method}
        for v, t in harness.host_seconds(calls, device, blocks).items()
    ]


def bench_adamw(benchmark, case):
    harness.bench(benchmark, case)


def bench_adamw_host(benchmark):
    harness.bench_host(benchmark, host)
