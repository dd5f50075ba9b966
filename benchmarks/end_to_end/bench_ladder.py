"""The ladder: one model in plain PyTorch, with our pieces put in one after the other, then `cs336 train` itself.

Each rung has all pieces of the rungs before it; the first ones are put in by the compile backend, which finds their
patterns in the plain model. All rungs start from the same weights and read the same batches.

    python -m benchmarks.run ladder [124M] [--batch 32] [--data TOKENS] [--out FILE]
"""

import functools
import gc
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx

from benchmarks import harness
from benchmarks.end_to_end import bench_train
from benchmarks.end_to_end.bench_train import Update
from cs336 import compile_backend
from cs336.data import TokenDataset, TokenLoader
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner
from cs336.training.objectives import NextToken

WARM_UP = 4  # steps: compilation, the optimizer's state, the capture
PIECES = ("attention", "rms_norm", "swiglu", "linear_cross_entropy")  # by the compile backend's names


def rungs() -> dict[str, Callable[[Callable[..., Learner]], tuple[Learner, Update]]]:
    """Each by its name: make(...) a learner with these settings -> it, and what makes a step."""

    def plain(count: int, our_optimizer: bool, make: Callable[..., Learner]) -> tuple[Learner, Update]:
        learner = make()
        compile = functools.partial(torch.compile, backend=functools.partial(_backend, only=PIECES[:count]))
        update = bench_train.plain_update(learner, compile, our_optimizer=our_optimizer)
        bench_train.release(learner)  # the memory is that of the plain model alone
        return learner, update

    def trained(make: Callable[..., Learner], **settings: Any) -> tuple[Learner, Update]:
        learner = make(objective=NextToken(fused_head=True), **settings)
        return learner, lambda x, y, lr: learner.update((x, y), lr)["loss"]

    found: dict[str, Callable] = {"plain PyTorch": functools.partial(plain, 0, False)}
    found |= {f"+ {name}": functools.partial(plain, i, False) for i, name in enumerate(PIECES, 1)}
    found["+ AdamW"] = functools.partial(plain, len(PIECES), True)
    found["cs336 train"] = trained
    found["+ CUDA graph"] = functools.partial(trained, cuda_graph="auto")
    found["+ bf16 weights"] = functools.partial(trained, cuda_graph="auto", precision="bf16_weights")
    return found


def _backend(graph_module: torch.fx.GraphModule, example_inputs: list, *, only: tuple[str, ...]) -> Callable:
    counts = compile_backend.replace(graph_module, only)
    if missing := [name for name in only if not counts[name]]:
        raise ValueError(f"the plain model has no {', '.join(missing)} that the compile backend finds")
    return compile_fx(graph_module, example_inputs)


def climb(
    name: str, *, batch_size: int, blocks: int, steps: int, data: pathlib.Path | None = None, compile: bool = True
) -> Iterator[dict[str, Any]]:
    """A row a rung: seconds a step, the median of `blocks` blocks of `steps` steps; memory at the peak; the loss."""
    model = bench_train.MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            tokens = (WARM_UP + steps) * batch_size * model.context_length + 1
            data = bench_train.zipf_tokens(pathlib.Path(folder) / "zipf.bin", model.vocab_size, tokens)
        config = {"batch_size": batch_size, "compile": compile}
        make = functools.partial(_learner, pathlib.Path(folder), data, model, **config)
        for rung, build in rungs().items():
            torch._dynamo.reset()
            yield {"op": "ladder", "model": name, "variant": rung} | _measure(data, *build(make), blocks, steps)
            gc.collect()


def _learner(folder: pathlib.Path, data: pathlib.Path, model, **settings: Any) -> Learner:
    return Learner(TrainConfig(folder, DataConfig(data), model, **settings))


def _measure(data: pathlib.Path, learner: Learner, update: Update, blocks: int, steps: int) -> dict[str, Any]:
    model, batch_size, device = learner.config.model, learner.config.batch_size, learner.device
    dataset = TokenDataset(data, model.context_length, vocab_size=model.vocab_size)
    loader = TokenLoader(dataset, batch_size, device=device)
    for step in range(WARM_UP):
        update(*loader.batch(step), bench_train.rate(step, 2 * WARM_UP))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(blocks):
        harness.synchronize(device)
        start = time.perf_counter()
        losses = [update(*loader.batch(WARM_UP + step), 1e-4) for step in range(steps)]
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)
    timing = harness.summary(seconds, steps, "perf_counter")
    speed = batch_size * model.context_length / timing.seconds
    return {
        "shape": [batch_size, model.context_length],
        "dtype": harness.dtype_name(learner.dtype),
        "seconds": timing.seconds,
        "spread": round(timing.spread, 4),
        "tokens_per_second": round(speed, 1),
        "mfu": round(100 * speed * model.flops_per_token() / learner.peak_flops, 2) if learner.peak_flops else None,
        "bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "loss": round(torch.stack(losses).mean().item(), 4),
    }


def bench_ladder(benchmark):
    benchmark.pedantic(lambda: list(climb("tiny", batch_size=4, blocks=1, steps=2, compile=False)))
