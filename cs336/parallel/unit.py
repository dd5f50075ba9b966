"""A unit of FSDP: parameters that are gathered, and whose gradients are scattered, together.

Of each parameter a rank has a piece; the pieces of one dtype lie side by side in a buffer of C elements, the master.
An all-gather gives (N, bytes), a row a rank: each parameter's pieces, in the dtype that it computes in, the widest
first. Gradients go the other way as (N, C + n), in the master's dtype; n columns of that message say of each of n
parameters how many ranks have a gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cs336.parallel.collectives import all_gather, reduce_scatter
from cs336.parallel.pieces import bounds, chunk

Group = dist.ProcessGroup | None
Owners = dict[Tensor, list[tuple[nn.Module, str]]]
DtypeOf = Callable[[Tensor], torch.dtype]
"""The dtype that a parameter computes in."""
ROW, START = 16, 256  # bytes of which a row of a message is a multiple, for NCCL, and the address of a parameter


class _Run(NamedTuple):
    """What of a master travels in one dtype."""

    dtype: torch.dtype
    columns: slice
    start: int
    """The byte of a row that it begins at."""
    widths: list[int]
    """Of each parameter."""

    @property
    def bytes(self) -> slice:
        return slice(self.start, self.start + self.dtype.itemsize * sum(self.widths))


class _Bundle:
    """Parameters of one dtype and device."""

    def __init__(self, params: Sequence[Tensor], owners: Owners, dtype_of: DtypeOf, group: Group) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        params = sorted(params, key=lambda p: (-dtype_of(p).itemsize, str(dtype_of(p))))
        self.widths = [chunk(p.numel(), self.ranks) for p in params]
        starts = [sum(self.widths[:i]) for i in range(len(params))]
        self.columns = [slice(s, s + w) for s, w in zip(starts, self.widths, strict=True)]
        self.master = torch.zeros(sum(self.widths), dtype=params[0].dtype, device=params[0].device)
        dtypes = [dtype_of(p) for p in params]
        self.runs, size = self._lay_out(dtypes)
        self.travels = [run.dtype for run in self.runs] == [self.master.dtype]  # as it is
        self.row_bytes = size if self.travels else _aligned(size, ROW)
        spans = [self.ranks * w * dtype.itemsize for w, dtype in zip(self.widths, dtypes, strict=True)]
        places = [sum(_aligned(span, START) for span in spans[:i]) for i in range(len(spans))]
        flat = torch.zeros(places[-1] + spans[-1], dtype=torch.uint8, device=params[0].device)
        self.storage, self.size = flat.untyped_storage(), flat.nbytes  # of all whole parameters
        self.shards: list[nn.Parameter] = []
        self.params: list[nn.Parameter] = []
        self.targets: list[Tensor] = []  # (N, width) each, where the pieces of a parameter belong
        for p, columns, dtype, span, place in zip(params, self.columns, dtypes, spans, places, strict=True):
            first, end = bounds(p.numel(), self.ranks, dist.get_rank(group))
            shard = self.master[columns][: end - first]
            shard.copy_(p.detach().reshape(-1)[first:end])
            self.shards.append(nn.Parameter(shard, requires_grad=p.requires_grad))
            own = flat[place : place + span].view(dtype)
            own[: p.numel()].copy_(p.detach().reshape(-1))
            # Of .data: what autograd has saved of a parameter is not outdated by what is written to it.
            self.targets.append(own.data.view(self.ranks, -1) if span else own.data.view(self.ranks, 0))
            whole = nn.Parameter(own[: p.numel()].view(p.shape), requires_grad=p.requires_grad)
            self.params.append(whole)
            for module, name in owners[p]:
                module._parameters[name] = whole
        self.version = self.master._version
        self.gathered = True  # whole, as they were given
        self.out: Tensor | None = None  # of an all-gather on its way
        self.work: dist.Work | None = None
        self.reduced: tuple[Tensor, dist.Work | None, list[bool]] | None = None

    def _lay_out(self, dtypes: list[torch.dtype]) -> tuple[list[_Run], int]:
        """What travels in each dtype, and the bytes of all."""
        runs, start = list[_Run](), 0
        for dtype in dict.fromkeys(dtypes):
            columns = [c for c, d in zip(self.columns, dtypes, strict=True) if d == dtype]
            widths = [c.stop - c.start for c in columns]
            runs.append(_Run(dtype, slice(columns[0].start, columns[-1].stop), start, widths))
            start = runs[-1].bytes.stop
        return runs, start

    def _row(self) -> Tensor:
        """This rank's pieces as they travel."""
        if self.travels:
            return self.master.view(torch.uint8)
        row = self.master.new_empty(self.row_bytes, dtype=torch.uint8)
        for run in self.runs:
            row[run.bytes].view(run.dtype).copy_(self.master[run.columns])
        return row

    @torch.no_grad()
    def start(self) -> None:
        if self.out is None and not (self.gathered and self.version == self.master._version):
            self.version = self.master._version
            self.out = self.master.new_empty(self.ranks * self.row_bytes, dtype=torch.uint8)
            self.work = all_gather(self.out, self._row(), self.group, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        if self.out is None:
            return
        if self.work is not None:
            self.work.wait()
        self.storage.resize_(self.size)
        rows_NB = self.out.view(self.ranks, -1)
        pieces = [piece for run in self.runs for piece in rows_NB[:, run.bytes].view(run.dtype).split(run.widths, 1)]
        torch._foreach_copy_(self.targets, pieces)
        self.out, self.work, self.gathered = None, None, True

    def release(self) -> None:
        if self.out is not None:  # gathered in vain
            self.wait()
        self.storage.resize_(0)
        self.gathered = False

    @torch.no_grad()
    def reduce(self) -> None:
        if not any(p.requires_grad for p in self.params):
            return
        self.finish()
        C, used = self.master.numel(), [p.grad is not None for p in self.params]
        message_NC = self.master.new_empty(self.ranks, C + len(self.params))
        message_NC[:, C:].fill_(1)
        places, whole = message_NC[:, :C].split(self.widths, 1), list[Tensor]()
        for i, p in enumerate(self.params):
            if p.grad is None:
                places[i].zero_()
                message_NC[:, C + i] = 0
                continue
            flat = p.grad.reshape(-1)
            if padding := self.ranks * self.widths[i] - p.numel():
                flat = nn.functional.pad(flat, (0, padding))
            whole.append(flat.view(self.ranks, -1))
            p.grad = None
        if whole:
            torch._foreach_copy_([place for place, u in zip(places, used, strict=True) if u], whole)
        out = self.master.new_empty(message_NC.shape[1])
        self.reduced = out, reduce_scatter(out, message_NC.view(-1), self.group, async_op=True), used

    def arrive(self) -> None:
        if self.reduced is not None:
            out, work, used = self.reduced
            if work is not None:
                work.wait()
            self.reduced = out, None, used

    @torch.no_grad()
    def finish(self) -> None:
        self.arrive()
        if self.reduced is None:
            return
        (out, _, used), self.reduced = self.reduced, None
        out.div_(self.ranks)
        flags = [] if all(used) else out[self.master.numel() :].tolist()  # the only wait for the device
        parts = out[: self.master.numel()].split(self.widths)
        for i, (shard, part) in enumerate(zip(self.shards, parts, strict=True)):
            if shard.requires_grad and (used[i] or flags[i] > 0):
                grad = part if shard.numel() == len(part) else part[: shard.numel()]
                shard.grad = grad if shard.grad is None else shard.grad.add_(grad)


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class Unit:
    """Parameters of any dtypes. `left`: their backward is over."""

    def __init__(self, params: Sequence[Tensor], owners: Owners, dtype_of: DtypeOf, group: Group) -> None:
        self.left = False
        self._originals: Sequence[Tensor] = params
        kinds = dict.fromkeys((p.dtype, p.device) for p in params)
        self._made = [[p for p in params if (p.dtype, p.device) == kind] for kind in kinds]
        self._how = owners, dtype_of, group
        self.bundles: list[_Bundle] = []

    def originals(self) -> Sequence[Tensor]:
        return self._originals

    def split(self) -> None:
        """Keep this rank's pieces alone."""
        self.bundles = [_Bundle(params, *self._how) for params in self._made]
        del self._how, self._made  # and with them what holds the parameters as they were
        self._originals = []
        self.release()

    def pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """(whole parameter, this rank's piece)"""
        for bundle in self.bundles:
            yield from zip(bundle.params, bundle.shards, strict=True)

    def start(self) -> None:
        """Begin to gather what is not whole or not up to date."""
        for bundle in self.bundles:
            bundle.start()

    def wait(self) -> None:
        for bundle in self.bundles:
            bundle.wait()

    def release(self) -> None:
        """Let go of the whole parameters."""
        for bundle in self.bundles:
            bundle.release()

    def reduce(self) -> None:
        """Begin to average the whole gradients, and let go of them."""
        for bundle in self.bundles:
            bundle.reduce()

    def arrive(self) -> None:
        """Wait for the averages that are on their way: what was sent is held until then."""
        for bundle in self.bundles:
            bundle.arrive()

    def finish(self) -> None:
        """Add the averages to the gradients of this rank's pieces."""
        for bundle in self.bundles:
            bundle.finish()
