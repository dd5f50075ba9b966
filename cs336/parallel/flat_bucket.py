"""Parameters in a flat bucket of which every rank owns a part; what ShardedAdamW is made of."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cs336.ops import sharded_adamw_reduce_, sharded_adamw_step_, sharded_adamw_wait_
from cs336.ops.ref.sharded_adamw import pieces
from cs336.ops.sharded_adamw import ALIGN
from cs336.parallel.collectives import all_gather
from cs336.parallel.nccl import Communicator


class FlatBucket:
    """Parameters of one dtype and group. `first`: the number of the first of them, among those of all buckets.

    gathering: a step has begun to gather the parts. overlapped: a forward waits for that, so that the step need not.
    """

    def __init__(self, params: list[Tensor], group: dict[str, Any], number: int, first: int, comm: Communicator):
        self.params, self.group, self.number, self.comm = params, group, number, comm
        self.numels = [-(-p.numel() // ALIGN) * ALIGN for p in params]
        self.at = slice(first, first + len(params))
        unit = ALIGN * comm.size
        padding = -sum(self.numels) % unit
        self.shard = (sum(self.numels) + padding) // comm.size
        self.param, self.grad = (params[0].new_zeros(self.shard * comm.size, requires_grad=False) for _ in range(2))
        self.state = {"exp_avg": self._moment(), "exp_avg_sq": self._moment()}
        if group.get("rounding", "nearest") == "remainder" and params[0].dtype == torch.bfloat16:
            self.state["remainder"] = self.param.new_zeros(self.shard, dtype=torch.int16)
        self.views, self.gradients = (self._cut(whole) for whole in (self.param, self.grad))
        for p, view in zip(params, self.views, strict=True):
            view.copy_(p.detach())
            p.data = view
        if comm.native:
            for t in (self.param, self.grad):  # another stream uses them: they must not be freed under it
                t.record_stream(comm.stream())
        self.gathering = self.overlapped = False
        self.reset()

    def _moment(self) -> Tensor:
        return self.param.new_zeros(self.shard, dtype=torch.float32)

    def _cut(self, whole: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat tensor like the bucket."""
        parts = whole[: sum(self.numels)].split(self.numels)
        return [part[: p.numel()].view(p.shape) for p, part in zip(self.params, parts, strict=True)]

    def reset(self) -> None:
        self.ready: set[int] = set()
        self.unused: list[int] = []
        self.launched = False

    def holds(self, i: int) -> bool:
        """Whether the i-th parameter is still a view of the bucket."""
        p, view = self.params[i], self.views[i]
        return p.data_ptr() == view.data_ptr() and p.dtype == view.dtype

    def adopt(self, i: int) -> None:
        """Make the i-th parameter's gradient a view of the bucket."""
        p, view = self.params[i], self.gradients[i]
        if p.grad is not None and p.grad is not view:
            view.copy_(p.grad)
            p.grad = view

    @torch.no_grad()
    def launch(self, squares: Tensor) -> None:
        """Begin to sum the gradients, which are no parameter's own from here on."""
        for i, p in enumerate(self.params):
            if p.grad is None:
                self.gradients[i].zero_()
                self.unused.append(i)
            self.adopt(i)
            p.grad = None
        self.launched = True
        self.comm.count("reduce_scatter", self.grad)
        sharded_adamw_reduce_(self.grad, squares, self.comm.number)

    def step(self, lr: Tensor, steps: Tensor, used: Tensor, scale: Tensor) -> None:
        beta1, beta2 = self.group["betas"]
        sharded_adamw_step_(
            self.param,
            self.grad,
            self.state.get("remainder"),
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            steps=steps[self.at],
            used=used[self.at],
            numels=self.numels,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=self.group["eps"],
            weight_decay=self.group["weight_decay"],
            comm=self.comm.number,
            grad_scale=scale,
        )
        self.comm.count("all_gather", self.param)
        self.gathering = True
        self.reset()

    def wait(self) -> None:
        if self.gathering:
            sharded_adamw_wait_(self.param, self.comm.number)
            self.gathering = False

    def own_pieces(self) -> Iterator[tuple[slice, slice]]:
        """Of each parameter its elements in this rank's shard, and the same among its own; without padding."""
        parts = dict(pieces(self.numels, self.shard, self.comm.number))
        begin = -self.comm.rank * self.shard  # of the parameter, in the shard
        for i, p in enumerate(self.params):
            part = parts.get(i, slice(0, 0))
            first, end = part.start - begin, min(part.stop - begin, p.numel())
            yield (slice(part.start, begin + end), slice(first, end)) if first < end else (slice(0, 0), slice(0, 0))
            begin += self.numels[i]

    def gathered(self, name: str) -> list[Tensor]:
        """A state of every parameter, whole; every rank calls it."""
        whole = self.state[name].new_empty(self.shard * self.comm.size)
        all_gather(whole.view(torch.uint8), self.state[name].view(torch.uint8), self.comm.group)
        return self._cut(whole)
