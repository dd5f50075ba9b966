"""The ladder: one model in plain PyTorch, with our pieces put in one after the other, then `cs336 train` itself.

Each rung has all pieces of the rungs before it; the first ones are put in by the compile backend, which finds their
patterns in the plain model. All rungs start from the same weights and read the same batches.

    python -m benchmarks.run ladder [124M] [--batch 24] [--data TOKENS] [--out FILE]
"""

import collections
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from benchmarks.end_to_end import bench_train
from benchmarks.end_to_end.bench_train import Apart, Contender, Update, Way
from cs336 import compile_backend
from cs336.training.learner import Learner
from cs336.training.objectives import NextToken

PIECES = ("attention", "rms_norm", "swiglu", "linear_cross_entropy")  # by the compile backend's names


def rungs() -> Mapping[str, Way]:
    """Each by its name."""
    fused = functools.partial(bench_train.trained, objective=NextToken(fused_head=True))
    found: dict[str, Way] = {"plain PyTorch": bench_train.plain}
    found |= {f"+ {name}": functools.partial(_with_pieces, PIECES[:i]) for i, name in enumerate(PIECES, 1)}
    found["+ AdamW"] = functools.partial(_with_pieces, PIECES, our_optimizer=True)
    found["cs336 train"] = functools.partial(fused, cuda_graph=False)
    found["+ CUDA graph"] = fused
    found["+ bf16 weights"] = functools.partial(fused, precision="bf16_weights")
    return found


def _with_pieces(
    pieces: tuple[str, ...], make: Callable[..., Learner], *, our_optimizer: bool = False
) -> tuple[Learner, Update]:
    learner, (backend, counts) = make(cuda_graph=False), _backend(pieces)
    compile = functools.partial(torch.compile, backend=backend)
    update = bench_train.plain_update(learner, compile, our_optimizer=our_optimizer)

    def checked(x_BT: Tensor, y_BT: Tensor, lr: float) -> Tensor:
        loss = update(x_BT, y_BT, lr)
        if learner.compiled and (missing := [name for name in pieces if not counts[name]]):
            raise ValueError(f"the plain model has no {', '.join(missing)} that the compile backend finds")
        return loss

    return learner, checked


@functools.cache  # of another backend a layer would be compiled again
def _backend(pieces: tuple[str, ...]) -> tuple[Callable, collections.Counter[str]]:
    """Inductor behind these pieces of ours, and how often each was found."""
    counts = collections.Counter[str]()

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list) -> Callable:
        counts.update(compile_backend.replace(graph_module, pieces))
        return compile_fx(graph_module, example_inputs)

    return backend, counts


def climb(
    name: str, *, batch_size: int, blocks: int, steps: int, data: pathlib.Path | None = None, compile: bool = True
) -> list[dict[str, Any]]:
    """A row a rung, as bench_train has them; on a GPU each rung has a process of its own. Raises ValueError if the loss
    curves disagree."""
    settings: dict[str, Any] = {"batch_size": batch_size, "compile": compile, "ways": rungs}
    with bench_train.shard(name, data, blocks * steps * batch_size) as tokens:
        apart = torch.cuda.is_available()
        contenders = [(Apart if apart else Contender)(name, rung, tokens, **settings) for rung in rungs()]
        turns = bench_train.in_turn([contenders]) if apart else [contenders]
        (rows,) = (bench_train.take_turns(group, blocks, steps) for group in turns)
    return [row | {"op": "ladder"} for row in rows]


def bench_ladder(benchmark):
    benchmark.pedantic(lambda: climb("tiny", batch_size=4, blocks=2, steps=2, compile=False))
