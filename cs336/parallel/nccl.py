"""Communicators for ops: a group of processes under a number, and NCCL's own where the native kernels take part.

The compiled library takes NCCL's functions from the libnccl.so.2 that torch has loaded. Rank 0 makes a unique id, the
others read it in the store of the process group, and all together make a communicator with a stream of its own.
"""

import ctypes
import functools

import torch
import torch.distributed as dist
from torch import Tensor

from cs336 import _load
from cs336.ops import communicator
from cs336.parallel.collectives import all_gather, all_reduce, count, gather_json, reduce_scatter

ID_BYTES = 128  # ncclUniqueId


class Communicator:
    """Made by `connect`; `number` is what ops take as `comm`."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, native: bool) -> None:
        self.group, self.device, self.native = group, device, native
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.number = communicator.add(self)

    def all_reduce(self, x: Tensor) -> None:
        all_reduce(x, self.group)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        reduce_scatter(out, x, self.group)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        all_gather(out, x, self.group)

    def count(self, collective: str, whole: Tensor) -> None:
        """Account for what a native kernel moves; the others' collectives count for themselves."""
        if self.native:
            count(collective, whole, self.group)

    def stream(self) -> torch.cuda.Stream:
        """That NCCL works on, of a native one."""
        return torch.cuda.ExternalStream(_library().cs336_nccl_stream(self.number), self.device)

    def close(self) -> None:
        """Let NCCL go, when what is queued is done; every rank calls it. The number is void afterwards."""
        if self.native:
            _raise(_library().cs336_nccl_close(self.number))
        communicator.remove(self.number)
        for key in [key for key, other in _connected.items() if other is self]:
            del _connected[key]


_connected: dict[tuple[dist.ProcessGroup, torch.device, bool], Communicator] = {}  # groups are hashed by identity


def connect(
    group: dist.ProcessGroup | None = None, *, device: torch.device | str, native: bool = False
) -> Communicator:
    """The communicator of a group for tensors on `device`, made at the first call; every rank calls it.

    Args:
        group: of processes; None is the default one.
        device: this rank's own, e.g. "cuda:3".
        native: with NCCL, for the native variants of ops. Without it they are served by torch.distributed.

    Raises ValueError, on every rank, that says which rank cannot and why; RuntimeError with what NCCL says.
    """
    whole = dist.group.WORLD if group is None else group
    assert whole is not None
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (whole, device, native)
    if key not in _connected:
        if native:
            _refuse_together(device, group)
        made = Communicator(group, device, native)
        try:
            if native:
                _connect_nccl(made, whole)
        except RuntimeError:
            communicator.remove(made.number)
            raise
        _connected[key] = made
    return _connected[key]


def _refuse_together(device: torch.device, group: dist.ProcessGroup | None) -> None:
    for rank, reason in enumerate(gather_json(missing(device), device, group)):
        if reason is not None:
            raise ValueError(f"the native step is not possible on rank {rank}: {reason}")


def missing(device: torch.device) -> str | None:
    """Why there is no native communicator for that device, as a sentence; None if there can be one."""
    if device.type != "cuda":
        return f"NCCL moves what is on CUDA devices, and this is on {device}"
    if reason := _load.missing("cuda"):
        return reason
    return _text(_library().cs336_nccl_missing())


def _connect_nccl(made: Communicator, group: dist.ProcessGroup) -> None:
    store = group.get_group_store()
    key = f"cs336_nccl/id {store.add(f'cs336_nccl/count of {made.rank}', 1)}"  # every rank has connected as often
    unique = ctypes.create_string_buffer(ID_BYTES)
    if made.rank == 0:
        _raise(_library().cs336_nccl_unique_id(unique))
        store.set(key, unique.raw.hex())
    else:
        unique.raw = bytes.fromhex(store.get(key).decode())
    with torch.cuda.device(made.device):
        _raise(_library().cs336_nccl_connect(made.number, unique, made.rank, made.size, made.device.index))


@functools.cache
def _library() -> ctypes.CDLL:
    """Functions of csrc/ops/sharded_adamw_cuda.cpp; each returns null, or what went wrong."""
    library = ctypes.CDLL(str(_load.HERE / "_C_cuda.so"))
    number, text, count = ctypes.c_int64, ctypes.c_char_p, ctypes.c_int
    for name, arguments in {
        "missing": [],
        "unique_id": [text],
        "connect": [number, text, count, count, count],
        "close": [number],
    }.items():
        function = getattr(library, f"cs336_nccl_{name}")
        function.argtypes, function.restype = arguments, text
    library.cs336_nccl_stream.argtypes, library.cs336_nccl_stream.restype = [number], ctypes.c_void_p
    return library


def _text(message: bytes | None) -> str | None:
    return None if message is None else message.decode()


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())
