"""A few processes over gloo, that meet in a file."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
mp.set_forkserver_preload(["cs336.training", "torch._dynamo"])  # once, and not in each process


def on_a_rank(rank, folder, function, world):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    try:
        torch.save(function(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_ranks(function, folder, world):
    """[what function(rank) returns in a process of its own, for each rank]"""
    mp.start_processes(on_a_rank, (str(folder), function, world), nprocs=world, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def on_two_ranks(function, folder):
    return on_ranks(function, folder, WORLD)


def error_of(call):
    try:
        call()
    except (ValueError, RuntimeError, TypeError, OSError, ArithmeticError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
