"""How many processes split a run, and along what: the [parallel] table of a configuration."""

from dataclasses import dataclass
from typing import Literal

AXES = ("data", "tensor", "pipeline", "context", "expert")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun started share the work. One process needs none of it.

    Raises ValueError for numbers that are not possible anywhere; `share` says what is not possible here.
    """

    data: int | None = None
    """Processes among which the sequences of a step are split. None: all there are."""
    zero: Literal[0, 1, 2, 3] = 0
    """What is split among them too: 0, nothing; 1, the optimizer's state; 2, gradients too; 3, weights too."""
    tensor: int = 1
    """Processes that split each matrix; training has 1."""
    pipeline: int = 1
    """Processes that split the layers; training has 1."""
    context: int = 1
    """Processes that split each sequence; training has 1."""
    expert: int = 1
    """Processes that split the experts; training has 1."""
    timeout: float = 600.0
    """Seconds without a collective after which all processes end, and say which one they waited for."""
    log_ranks: bool = False
    """Write ranks.jsonl too: what each process measured itself, a row a process for each row of metrics.jsonl."""

    def __post_init__(self):
        for axis in AXES:
            if (size := getattr(self, axis)) is not None and size < 1:
                raise ValueError(f"{axis} must be at least 1, got {size}")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout must be more than 0 seconds and finite, got {self.timeout}")

    def share(self, processes: int, batch_size: int, micro_batch_size: int | None) -> int:
        """Sequences of a step that each process takes.

        Raises ValueError, with the arithmetic, for a layout that so many processes or the batch cannot have.
        """
        others = {axis: getattr(self, axis) for axis in AXES if axis != "data"}
        data = self.data
        if data is None:
            data = max(1, processes)
            for size in others.values():
                data //= size
        sizes = {"data": data} | others
        product = 1
        for size in sizes.values():
            product *= size
        if product != processes:
            terms = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "data")
            raise ValueError(
                f"parallel: {terms} = {product} processes, and {_processes(processes)}: start torchrun with "
                f"--nproc_per_node={product}, or change [parallel]"
            )
        for axis, size in others.items():
            if size > 1:
                raise ValueError(f"parallel: {axis} = {size} is not possible in training, which splits data alone")
        if batch_size % data:
            raise ValueError(
                f"parallel: batch_size {batch_size} over data {data} is {batch_size / data:.2f} sequences a process: "
                f"use a multiple of {data}"
            )
        share = batch_size // data
        if micro_batch_size is not None and share % micro_batch_size:
            raise ValueError(
                f"parallel: batch_size {batch_size} / data {data} = {share} sequences a process, which is not a "
                f"multiple of micro_batch_size {micro_batch_size}"
            )
        return share


def _processes(count: int) -> str:
    return "this is one" if count == 1 else f"torchrun started {count}"
