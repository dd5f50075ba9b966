"""torch.distributed's collectives with an NVTX range each, and the bytes that a ring of N ranks makes every rank send.

| collective     | S, bytes                  | sent by a rank |
| ---            | ---                       | ---            |
| all_reduce     | of the tensor             | 2 S (N-1) / N  |
| reduce_scatter | of the whole input        | S (N-1) / N    |
| all_gather     | of the whole output       | S (N-1) / N    |
| all_to_all     | of the input              | S (N-1) / N    |
| broadcast      | of the tensor             | S; 0 for N = 1 |
| reduce, gather | of the tensor             | S; 0 for N = 1 |
| scatter        | of the source's tensor    | S (N-1) / N by the source, else 0 |
| shift, send    | of the tensor             | S; 0 for N = 1 |

(the factors of nccl-tests, doc/PERFORMANCE.md). Tensors are contiguous and on a device that the group's backend serves.
With `async_op` a handle is returned whose `wait()` orders what follows after the collective; else None.
"""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336.utils.nvtx import annotate

MB = 2**20
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name until 2.12
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
BUCKET_BYTES = 25 * MB  # torch's DistributedDataParallel's


@dataclasses.dataclass
class Traffic:
    """What one rank sent, by the name of the collective: `bytes` by the formulas above, and `calls`."""

    bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)


_started: Counter[str] = Counter()  # by the ranks that take part, "0,1"; "" for what goes from one to another
_counting: list[Traffic] = []  # of the process: hooks of a backward run in threads of autograd


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the collectives of this module that are called inside, by any thread of this process."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting[:] = [t for t in _counting if t is not traffic]


def ring_bytes(name: str, size: int, world: int) -> int:
    """Bytes that each of `world` ranks sends in the collective `name` of S = `size` bytes."""
    if name in ("broadcast", "reduce", "gather", "shift", "send"):
        return size if world > 1 else 0
    return (2 if name == "all_reduce" else 1) * size * (world - 1) // world


def started() -> dict[str, int]:
    """How many collectives of this module this process has begun, by the ranks that take part, "0,1"; messages from
    one rank to another are under "". A rank that is behind the others of a group holds them up."""
    return dict(_started)


def count(name: str, whole: Tensor, group: dist.ProcessGroup | None) -> None:
    """Account for a collective that begins; `whole` is what S of the table above is of."""
    alone = name in ("send", "shift")
    ranks = [] if alone else dist.get_process_group_ranks(group or dist.group.WORLD)
    _started[",".join(map(str, ranks))] += 1
    sent = ring_bytes(name, whole.nbytes, dist.get_world_size(group))
    for traffic in _counting:
        traffic.bytes[name] += sent
        traffic.calls[name] += 1


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None, *, async_op: bool = False) -> dist.Work | None:
    """Replace x by its sum over the ranks."""
    with annotate("all_reduce"):
        count("all_reduce", x, group)
        return dist.all_reduce(x, group=group, async_op=async_op)


def reduce_scatter(
    out: Tensor, x: Tensor, group: dist.ProcessGroup | None = None, *, async_op: bool = False
) -> dist.Work | None:
    """Sum x (N * M, ...) over the ranks; rank r receives rows r M to (r+1) M of the sum in out (M, ...)."""
    with annotate("reduce_scatter"):
        count("reduce_scatter", x, group)
        return _reduce_scatter(out, x, group=group, async_op=async_op)


def all_gather(
    out: Tensor, x: Tensor, group: dist.ProcessGroup | None = None, *, async_op: bool = False
) -> dist.Work | None:
    """Fill out (N * M, ...) with every rank's x (M, ...), in the order of ranks."""
    with annotate("all_gather"):
        count("all_gather", out, group)
        return _all_gather(out, x, group=group, async_op=async_op)


def all_to_all(
    out: Tensor,
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    sent: Sequence[int] | None = None,
    received: Sequence[int] | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Send the r-th part of x to rank r; out receives, in order, what every rank sent here.

    sent, received: rows of each part of x, and of out. None: N equal parts.
    """
    with annotate("all_to_all"):
        count("all_to_all", x, group)
        sizes = {"input_split_sizes": sent and list(sent), "output_split_sizes": received and list(received)}
        return dist.all_to_all_single(out, x, **sizes, group=group, async_op=async_op)


def broadcast(
    x: Tensor, source: int, group: dist.ProcessGroup | None = None, *, async_op: bool = False
) -> dist.Work | None:
    """Replace x by the one of rank `source` of the group."""
    with annotate("broadcast"):
        count("broadcast", x, group)
        return dist.broadcast(x, group=group, group_src=source, async_op=async_op)


def shift(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """Send contiguous tensors to the next rank, the last one's to the first: a function that waits for the previous
    rank's, which are like these. What is sent must not be written to before."""
    with annotate("shift"):
        N, rank = dist.get_world_size(group), dist.get_rank(group)
        if N == 1:
            return lambda: tuple(tensors)
        came = tuple(torch.empty_like(x) for x in tensors)
        sends = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % N) for x in tensors]
        receives = [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % N) for x in came]
        for x in tensors:
            count("shift", x, group)
        works = dist.batch_isend_irecv([*sends, *receives])

    def wait() -> tuple[Tensor, ...]:
        for work in works:
            work.wait()
        return came

    return wait


def reduce(x: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace x, on one rank of the group, by its sum over the ranks; on the others it is undefined afterwards."""
    with annotate("reduce"):
        count("reduce", x, group)
        dist.reduce(x, group=group, group_dst=rank)


def gather(out: Tensor | None, x: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Fill out (N * M, ...), of one rank of the group, None on the others, with every rank's x (M, ...)."""
    with annotate("gather"):
        count("gather", x, group)
        parts = None if out is None else list(out.chunk(dist.get_world_size(group)))
        dist.gather(x, parts, group=group, group_dst=rank)


def scatter(out: Tensor, x: Tensor | None, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Give every rank's out (M, ...) its part of x (N * M, ...), which one rank of the group has, None the others."""
    with annotate("scatter"):
        if x is not None:
            count("scatter", x, group)
        parts = None if x is None else list(x.chunk(dist.get_world_size(group)))
        dist.scatter(out, parts, group=group, group_src=rank)


def send(x: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Send x to a rank of the group: a handle, until whose `wait()` x must be neither written to nor freed."""
    with annotate("send"):
        count("send", x, group)
        work = dist.isend(x, group=group, group_dst=rank)
        assert work is not None  # this rank is of the group
        return work


def receive(out: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Fill out with what a rank of the group sent."""
    with annotate("receive"):
        dist.recv(out, group=group, group_src=rank)


@torch.no_grad()
def broadcast_all(tensors: Iterable[Tensor], source: int, group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors of any dtypes and layouts by those of rank `source`: as bytes, in flat buckets of 25 MB."""
    mine = dist.get_rank(group) == source
    for bucket in buckets([t.detach() for t in tensors], BUCKET_BYTES):
        sizes = [t.nbytes for t in bucket]
        if mine:
            broadcast(torch.cat([t.reshape(-1).view(torch.uint8) for t in bucket]), source, group)
            continue
        broadcast(flat := torch.empty(sum(sizes), dtype=torch.uint8, device=bucket[0].device), source, group)
        for t, part in zip(bucket, flat.split(sizes), strict=True):
            odd = part.storage_offset() % t.itemsize
            t.copy_((part.clone() if odd else part).view(t.dtype).view(t.shape))


def buckets(tensors: Iterable[Tensor], most: float) -> Iterator[list[Tensor]]:
    """Runs of tensors on one device with at most `most` bytes; a larger tensor is alone, an empty one left out."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        if bucket and (t.device != bucket[0].device or size + t.nbytes > most):
            yield bucket
            bucket, size = [], 0
        if t.numel():
            bucket.append(t)
            size += t.nbytes
    if bucket:
        yield bucket


def gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in the order of ranks. Nothing is unpickled."""
    world = dist.get_world_size(group)
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = torch.empty(world, dtype=torch.int64, device=device)
    all_gather(sizes, torch.tensor([text.numel()], device=device), group)
    most = int(sizes.max())
    padded = torch.nn.functional.pad(text, (0, most - text.numel()))
    texts = torch.empty(world * most, dtype=torch.uint8, device=device)
    all_gather(texts, padded, group)
    rows = texts.view(world, most).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes.tolist(), strict=True)]


def check_alike(
    what: Sequence[tuple[str, str]],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    *,
    advice: str = "Build the model from the same configuration on every rank",
) -> None:
    """Raises ValueError, on every rank, that names the first (name, description) that differs from rank 0's."""
    first, *others = gather_json(list(what), device, group)
    for rank, other in enumerate(others, 1):
        for i in range(max(len(first), len(other))):
            here, there = (f"{x[i][0]}: {x[i][1]}" if i < len(x) else "nothing more" for x in (first, other))
            if here != there:
                difference = f"rank 0 has {here}; rank {rank} has {there}"
                raise ValueError(f"ranks must be given the same; first difference: {difference}. {advice}")


def describe(t: Tensor) -> str:
    """Shape and dtype, for `check_alike`."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
