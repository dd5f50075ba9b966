"""The processes of a run, as torchrun starts them: which one this is, and how they agree on what the host decides.

Without torchrun there is one process, of rank 0, and all of this costs nothing. Values travel as JSON: nothing is
unpickled.
"""

import atexit
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cs336.parallel.collectives import all_reduce, broadcast, gather_json
from cs336.utils.device import pick

T = TypeVar("T")
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE


class RankError(RuntimeError):
    """What went wrong on another rank, which it names."""


def connect(device: str = "auto") -> torch.device:
    """Join the other processes that torchrun started, once, and return this one's device: see `place`.

    GPU tensors travel by NCCL, CPU tensors by gloo. Does nothing in a process that torchrun did not start, or that has
    a default process group already.

    Raises ValueError for a device that is not here, and where only part of torchrun's environment is there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if missing := [name for name in ENVIRONMENT if name not in os.environ]:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {', '.join(missing)} not set: start several processes "
                "with torchrun --nproc_per_node=N -m cs336 train ..., or unset WORLD_SIZE"
            )
        here = _of_rank(device, int(os.environ["LOCAL_RANK"]))
        if here.type == "cuda":
            torch.cuda.set_device(here)
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it restarts the processes, and in it the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)
        atexit.register(_disconnect)
    return place(device)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def place(device: str) -> torch.device:
    """The device that a setting means on this rank: "auto" and "cuda" are the GPU of its number on this host.

    Raises ValueError for a device that is not here, or that several ranks would share.
    """
    if world_size() == 1:
        return pick(device)
    return _of_rank(device, int(os.environ.get("LOCAL_RANK", rank())))


def _of_rank(device: str, local_rank: int) -> torch.device:
    found = pick(device)
    if found.type != "cuda":
        return found
    if found.index is not None:
        raise ValueError(
            f"device {device} is one GPU, and there are several processes: use device = cuda, one for each"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this host has no GPU: torch sees {torch.cuda.device_count()}, numbered from 0. "
            "Start fewer with --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def rank() -> int:
    """Of this process among all; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def control_device() -> torch.device:
    """Where small tensors live through which the hosts agree: the CPU if the group serves it, so that no GPU waits."""
    on_cpu = "cpu" in dist.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def agreed(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on every rank: what JSON can say."""
    if world_size() == 1:
        return value
    device = control_device()
    text = json.dumps(value).encode() if rank() == 0 else b""
    size = torch.tensor([len(text)], device=device)
    broadcast(size, 0, group)
    data = torch.tensor(list(text), dtype=torch.uint8, device=device)
    if rank() != 0:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    broadcast(data, 0, group)
    return json.loads(bytes(data.tolist()))


def any_rank(flag: bool) -> bool:
    """Whether it is true on some rank."""
    if world_size() == 1:
        return flag
    count = torch.tensor([int(flag)], device=control_device())
    all_reduce(count)
    return bool(count.item())


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks for CPU tensors, apart from the default one; None where there is one process."""
    return None if world_size() == 1 else dist.new_group(backend="gloo")


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call it on every rank; if it fails on one it fails on all, instead of leaving the others to wait.

    Raises its own error where it failed, RankError, which names the rank, elsewhere.
    """
    if world_size() == 1:
        return function()
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    _raise_together(error, group)
    return result


def on_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call it on rank 0 alone; its JSON value is returned, or its failure raised, on every rank."""
    if world_size() == 1:
        return function()
    result = together(function if rank() == 0 else lambda: None, group)
    return agreed(result, group)  # type: ignore[return-value]


def from_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON value, in the order of ranks."""
    return [value] if world_size() == 1 else gather_json(value, control_device(), group)


def _raise_together(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    texts = from_ranks(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RankError("; ".join(f"rank {rank}: {text}" for rank, text in failed))
