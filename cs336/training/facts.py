"""What run.json and the first lines on the terminal say of a run."""

import datetime
import platform
import resource
import shlex
import sys
from typing import Any

import torch

from cs336 import __version__
from cs336.models.recompute import KEEPS_ALL
from cs336.parallel.launch import world_size
from cs336.training.budget import Plan
from cs336.training.config import TrainConfig
from cs336.training.learner import Learner
from cs336.utils.commit import commit
from cs336.utils.counted import counted


def describe(config: TrainConfig, learner: Learner, train_tokens: int, data: dict[str, str | None]) -> dict[str, Any]:
    """What runs, and on what. data: the fingerprints of the training and validation data."""
    device = learner.device
    name = f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "device": name,
        "parameters": config.model.num_parameters(),
        "flops_per_token": config.model.flops_per_token(),
        "peak_flops": learner.peak_flops,
        "predicted_memory_bytes": learner.predicted_memory().total,
        "tokens_per_step": config.batch_size * config.model.context_length,
        "train_tokens": train_tokens,
        "data": data,
        "precision": _precision(learner),
        "compiled": learner.compiled,
        "processes": world_size(),
        "command": shlex.join(sys.argv),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cs336": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def announcement(config: TrainConfig, learner: Learner, plan: Plan, train_tokens: int) -> str:
    """The run in a line."""
    total, tokens = plan.total_steps, config.batch_size * config.model.context_length
    steps = "as many steps as fit" if total is None else f"{counted(total, 'step')}, {total * tokens:,} tokens"
    return (
        f"{config.model.num_parameters():,} parameters on {_places(learner)} "
        f"({_precision(learner)}{', compiled' if learner.compiled else ''}), {train_tokens:,} tokens of data, "
        f"budget {config.budget}: {steps}; a step takes about {learner.predicted_memory().total / 2**20:,.0f} MiB"
        f"{'' if learner.recompute in KEEPS_ALL else f', with {_recompute(learner)} recomputation'}"
    )


def _places(learner: Learner) -> str:
    if world_size() == 1:
        return str(learner.device)
    zero, sizes = learner.config.parallel.zero, learner.division.sizes
    axes = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    how = [*(axes if axes != [f"data {world_size()}"] else []), *([f"ZeRO-{zero}"] if zero else [])]
    how += ["native step"] if learner.division.flat is not None and learner.device.type == "cuda" else []
    return ", ".join([f"{world_size()} x {learner.device.type}", *how]) + ("," if how else "")


def measured(learner: Learner) -> dict[str, Any]:
    """What a process measures itself: the loss of its own sequences in the latest step, and its memory."""
    return {"train/loss": learner.own_loss.item(), "peak_memory_bytes": peak_memory(learner.device)}


def memory_used(learner: Learner) -> str:
    """What was predicted beside what a GPU's allocator gave at most; nothing on a CPU, which does not count it."""
    if learner.device.type != "cuda":
        return ""
    peak, predicted = peak_memory(learner.device), learner.predicted_memory().total
    return f"memory: {peak / 2**20:,.0f} MiB at most, {peak / predicted - 1:+.0%} of the prediction"


def peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _recompute(learner: Learner) -> str:
    return "full" if learner.recompute is True else str(learner.recompute)


def _precision(learner: Learner) -> str:
    weights = " weights" if learner.weight_dtype == torch.bfloat16 else ""
    products = ", products of layers in fp8" if learner.config.fp8 else ""
    return str(learner.dtype).removeprefix("torch.") + weights + products
