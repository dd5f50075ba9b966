"""This machine as a planner sees it: its roofs, and what share of them a training step reaches."""

import os
import pathlib
import time
from dataclasses import dataclass

import torch

from cs336.models import TransformerConfig
from cs336.parallel.hardware import GB, GPUS, Gpu, Tier
from cs336.training.config import DataConfig, TrainConfig
from cs336.training.learner import Learner
from cs336.utils.device import peak_bandwidth

PROBES = {  # enough work that a step's fixed costs do not show, little enough for two seconds
    "cpu": (TransformerConfig(4096, 256, 4, 256, 4), 4),
    "cuda": (TransformerConfig(32_768, 2048, 8, 2048, 16), 8),
}
UNTIMED, TIMED = 2, 5  # steps: the first compile and allocate
PCIE = 20 * GB  # bytes a second between GPUs that the table does not know


@dataclass(frozen=True)
class Hardware:
    gpu: Gpu
    count: int
    compute_bytes: int
    """Of an activation: 2 where training is in bfloat16."""


def measure(device: str = "auto") -> Hardware:
    """The GPUs here, or the CPU as one, timed on steps of a small model as `cs336 train` makes them.

    Raises ValueError for a device that is not here, or whose roofs are unknown.
    """
    model, batch_size = PROBES["cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"]
    nowhere = pathlib.Path()  # a learner reads and writes nothing
    learner = Learner(TrainConfig(nowhere, DataConfig(nowhere), model, batch_size=batch_size, device=device))
    here = learner.device
    bandwidth = peak_bandwidth(here)
    if not learner.peak_flops or not bandwidth:
        raise ValueError(
            f"the roofs of {here} are not known: name a GPU with --gpu, and --efficiency if it was measured"
        )
    tokens = torch.randint(model.vocab_size, (batch_size, model.context_length + 1), device=here)
    batch = (tokens[:, :-1], tokens[:, 1:])
    times = []
    for _ in range(UNTIMED + TIMED):
        start = time.perf_counter()
        learner.update(batch, 1e-4)["loss"].item()  # which waits for the device
        times.append(time.perf_counter() - start)
    reached = model.flops_per_token() * batch_size * model.context_length / min(times[UNTIMED:])
    if here.type == "cpu":
        name, count, memory = "CPU", 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        tiers: tuple[Tier, ...] = (Tier(1, PCIE),)
    else:
        properties = torch.cuda.get_device_properties(here)
        name, count, memory = properties.name, torch.cuda.device_count(), properties.total_memory
        known = [gpu.tiers for gpu in GPUS.values() if gpu.name in name.split()]
        tiers = known[0] if known else (Tier(count, PCIE),)
    gpu = Gpu(name, memory, learner.peak_flops, bandwidth, tiers, reached / learner.peak_flops)
    return Hardware(gpu, count, learner.dtype.itemsize)
