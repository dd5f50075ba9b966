"""Whether a step fits the device, before anything of it is allocated."""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch

from cs336.models import Transformer
from cs336.models.memory import Memory, training_memory
from cs336.models.recompute import Recompute
from cs336.parallel.planner import Layout, Work, rank_memory
from cs336.training.objectives import for_model

if TYPE_CHECKING:
    from cs336.training.config import TrainConfig

GIB = 2**30
USABLE = 0.95  # of a device: the rest is the context's, and what the allocator cannot use
WAYS: tuple[Recompute, ...] = ("none", "selective", "full")  # the fastest first


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a run computes, as far as memory goes."""

    weight_bytes: int
    compute_bytes: int
    compiled: bool
    """By our kernels on a GPU."""
    layers_compiled: bool = False
    """By torch.compile."""


def predicted_memory(
    config: "TrainConfig", numerics: Numerics, recompute: Recompute, micro_batch_size: int, ranks: int = 1
) -> Memory:
    """What a step will take of the device's memory, of each of several ranks; batch_size is of each."""
    dtype = torch.bfloat16 if numerics.weight_bytes == 2 else torch.float32
    optimizer = config.optimizer.build(Transformer(config.model, device="meta", dtype=dtype))
    per_parameter = optimizer.state_bytes() / config.model.num_parameters()
    fused_head = bool(getattr(for_model(config.objective, config.model), "fused_head", False))
    if ranks > 1:
        return _of_fullest(config, numerics, recompute, micro_batch_size, ranks, per_parameter, fused_head)
    return training_memory(
        config.model,
        micro_batch_size,
        weight_bytes=numerics.weight_bytes,
        compute_bytes=numerics.compute_bytes,
        optimizer_bytes=per_parameter,
        gradient_checkpointing=recompute,
        compiled=numerics.compiled,
        layers_compiled=numerics.layers_compiled,
        accumulated=micro_batch_size < config.batch_size,
        fused_head=fused_head,
    )


def _of_fullest(
    config: "TrainConfig",
    numerics: Numerics,
    recompute: Recompute,
    micro_batch_size: int,
    ranks: int,
    optimizer_bytes: float,
    fused_head: bool,
) -> Memory:
    """Of the rank that has most: see cs336.parallel.planner."""
    way = recompute if isinstance(recompute, str) else "full" if recompute else "none"
    parallel = config.parallel
    sizes = parallel.axes(ranks)
    layout = Layout(
        **sizes, zero=parallel.zero, micro_batch=micro_batch_size, recompute=way, schedule=parallel.schedule
    )
    work = Work(
        config.model,
        config.batch_size * layout.data * layout.expert,
        config.model.context_length,
        numerics.weight_bytes,
        numerics.compute_bytes,
        optimizer_bytes,
        numerics.compiled,
        numerics.layers_compiled,
        fused_head,
    )
    return max((rank_memory(work, layout, stage) for stage in range(layout.pipeline)), key=lambda m: m.total)


def room(device: torch.device, limit_gib: float | None) -> float:
    """Bytes that a step may take."""
    if limit_gib is not None:
        return limit_gib * GIB
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    return USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_recompute(config: "TrainConfig", numerics: Numerics, room: float, ranks: int = 1) -> Recompute:
    """config.gradient_checkpointing, or for "auto" the fastest way that fits.

    Raises ValueError, with what would fit, for a step that does not.
    """
    micro = config.micro_batch_size or config.batch_size
    asked: Any = config.gradient_checkpointing
    ways: tuple[Recompute, ...] = WAYS if asked == "auto" else (asked,)
    needs = {way: predicted_memory(config, numerics, way, micro, ranks) for way in ways}
    if fitting := [way for way in ways if needs[way].total <= room]:
        return fitting[0]
    raise ValueError(
        f"a step takes about {needs[ways[-1]].total / GIB:,.2f} GiB, and {room / GIB:,.2f} can be used: "
        f"{_what_would_fit(config, numerics, room, micro, ranks)}"
    )


def _what_would_fit(config: "TrainConfig", numerics: Numerics, room: float, micro: int, ranks: int) -> str:
    """The change that costs least: smaller micro-batches down to a quarter, then recomputation, then both."""
    sizes = [size for size in range(micro, 0, -1) if config.batch_size % size == 0]
    few = [size for size in sizes if 4 * size >= micro]
    asked: Any = "full" if config.gradient_checkpointing in (True, "auto") else config.gradient_checkpointing
    options = [(asked, size) for size in few] + [(way, size) for way in WAYS[1:] for size in few]
    for way, size in [*options, *(("full", size) for size in sizes)]:
        need = predicted_memory(config, numerics, way, size, ranks).total
        if need <= room:
            changes = [] if size == micro else [f"micro_batch_size = {size}"]
            changes += [] if way == asked else [f'gradient_checkpointing = "{way}"']
            return f"{' and '.join(changes)} would fit, at {need / GIB:,.2f} GiB"
    least = predicted_memory(config, numerics, "full", 1, ranks)
    return f"even one sequence at a time takes {least}; use a smaller model, a shorter context or a larger device"
