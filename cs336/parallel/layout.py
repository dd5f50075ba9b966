"""How many processes split a run, and along what: the [parallel] table of a configuration."""

import math
from dataclasses import dataclass
from typing import Literal

AXES = ("data", "pipeline", "context", "expert", "tensor")  # of the mesh: neighbours are on the last


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun started share the work. One process needs none of it.

    Raises ValueError for numbers that are not possible anywhere; `share` says what is not possible here.
    """

    data: int | None = None
    """Processes among which the sequences of a step are split. None: all that the others leave."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is split among those that hold alike: 0, nothing; 1, the optimizer's state; 2, gradients too; 3, weights
    too."""
    native_step: bool = False
    """With zero = 1 and AdamW: gradients, step and weights travel in flat buckets, each of which is cut evenly, on GPUs
    by NCCL from our own kernels; see cs336.parallel.ShardedAdamW."""
    tensor: int = 1
    """Processes that split each matrix, and between them the tokens."""
    pipeline: int = 1
    """Processes that split the layers; micro-batches flow through them."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Of a pipeline: one forward and one backward in turn, or every forward first."""
    context: int = 1
    """Processes that split each sequence."""
    attention: Literal["ring", "all_to_all"] = "ring"
    """Over a sequence that is split: keys and values go round, or tokens are exchanged for heads."""
    expert: int = 1
    """Processes that split the experts; each has sequences of its own."""
    timeout: float = 600.0
    """Seconds without a collective after which all processes end, and say which one they waited for. Only collectives
    count: what a process does by itself, as to sample, evaluate on rank 0 or read a checkpoint, must take less."""
    log_ranks: bool = False
    """Write ranks.jsonl too: what each process measured itself, a row a process for each row of metrics.jsonl."""

    def __post_init__(self):
        for axis in AXES:
            if (size := getattr(self, axis)) is not None and size < 1:
                raise ValueError(f"{axis} must be at least 1, got {size}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be more than 0 seconds and finite, got {self.timeout}")

    def axes(self, processes: int) -> dict[str, int]:
        """How many of the processes there are along each axis, in the order of the mesh.

        Raises ValueError, with the arithmetic, where they do not make up the processes.
        """
        others = math.prod(getattr(self, axis) for axis in AXES if axis != "data")
        data = max(1, processes // others) if self.data is None else self.data
        sizes = {axis: getattr(self, axis) for axis in AXES} | {"data": data}
        if (product := data * others) != processes:
            terms = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "data")
            raise ValueError(
                f"parallel: {terms} = {product} processes, and {_processes(processes)}: start torchrun with "
                f"--nproc_per_node={product}, or change [parallel]"
            )
        return sizes

    def share(self, processes: int, batch_size: int, micro_batch_size: int | None) -> int:
        """Sequences of a step that each process takes; those of a tensor, pipeline or context group take the same.

        Raises ValueError, with the arithmetic, for a layout that so many processes or the batch cannot have.
        """
        sizes = self.axes(processes)
        parts = sizes["data"] * sizes["expert"]
        terms = f"data {sizes['data']}" + (f" x expert {sizes['expert']}" if sizes["expert"] > 1 else "")
        if batch_size % parts:
            raise ValueError(
                f"parallel: batch_size {batch_size} over {terms} is {batch_size / parts:.2f} sequences a process: "
                f"use a multiple of {parts}"
            )
        share = batch_size // parts
        if micro_batch_size is not None and share % micro_batch_size:
            raise ValueError(
                f"parallel: batch_size {batch_size} / {terms} = {share} sequences a process, which is not a "
                f"multiple of micro_batch_size {micro_batch_size}"
            )
        return share


def _processes(count: int) -> str:
    return "this is one" if count == 1 else f"torchrun started {count}"
