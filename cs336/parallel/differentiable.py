"""Collectives that gradients flow through, each the transpose of another:

| function | forward                         | backward       | of a value that is           |
| ---      | ---                             | ---            | ---                          |
| copy     | nothing                         | sum            | alike -> used in parts       |
| sum_     | sum                             | nothing        | partial sums -> alike        |
| gather   | all-gather                      | reduce-scatter | divided -> used in parts     |
| scatter  | reduce-scatter                  | all-gather     | partial sums -> divided      |
| whole    | all-gather                      | own part       | divided -> alike             |
| part     | own part                        | all-gather     | alike -> divided             |
| exchange | part r goes to rank r           | and comes back | divided otherwise            |

"Alike" is the same on every rank, and so is its gradient; "used in parts" has a gradient that is a partial sum. A dim
that is divided holds the ranks' parts in their order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336.parallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter

Group = dist.ProcessGroup | None


def gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    """x of every rank, behind each other along dim."""
    N = dist.get_world_size(group)
    out_N = x.new_empty(N * x.shape[0] if x.dim() else N, *x.shape[1:])
    all_gather(out_N, x.contiguous(), group)
    return torch.cat(out_N.chunk(N), dim) if dim % x.dim() else out_N


def scattered(x: Tensor, dim: int, group: Group) -> Tensor:
    """The sum of the ranks' x, of which each keeps its part along dim."""
    N = dist.get_world_size(group)
    check_parts(x.shape[dim], N, f"dim {dim}")
    stacked_N = torch.cat(x.chunk(N, dim)) if dim % x.dim() else x.contiguous()
    out = stacked_N.new_empty(stacked_N.shape[0] // N, *stacked_N.shape[1:])
    reduce_scatter(out, stacked_N, group)
    return out


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x."""
    out = x.clone(memory_format=torch.contiguous_format)
    all_reduce(out, group)
    return out


def own_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of x along dim: a view."""
    N = dist.get_world_size(group)
    check_parts(x.shape[dim], N, f"dim {dim}")
    return x.chunk(N, dim)[dist.get_rank(group)]


def check_parts(size: int, N: int, what: str) -> None:
    if size % N != 0:
        raise ValueError(f"{what} of {size} does not divide by {N} ranks: {size} / {N} = {size / N:g}")


class _Linear(torch.autograd.Function):
    """A linear map of x and its transpose, each a function of one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward, backward) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        return ctx.transpose(dy), None, None


def copy(x: Tensor, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: x.view_as(x), lambda dy: summed(dy, group))


def sum_(x: Tensor, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: summed(x, group), lambda dy: dy)


def gather(x: Tensor, dim: int, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: gathered(x, dim, group), lambda dy: scattered(dy, dim, group))


def scatter(x: Tensor, dim: int, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: scattered(x, dim, group), lambda dy: gathered(dy, dim, group))


def whole(x: Tensor, dim: int, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: gathered(x, dim, group), lambda dy: own_part(dy, dim, group).contiguous())


def part(x: Tensor, dim: int, group: Group = None) -> Tensor:
    return _Linear.apply(x, lambda x: own_part(x, dim, group).contiguous(), lambda dy: gathered(dy, dim, group))


def exchange(
    x: Tensor, sent: Sequence[int] | None = None, received: Sequence[int] | None = None, group: Group = None
) -> Tensor:
    """x (sum of sent, ...), of which sent[r] rows go to rank r -> (sum of received, ...), received[r] of them from it.

    None: equal parts.
    """

    def move(x: Tensor, sent, received) -> Tensor:
        out = x.new_empty(x.shape[0] if received is None else sum(received), *x.shape[1:])
        all_to_all(out, x.contiguous(), group, sent=sent, received=received)
        return out

    return _Linear.apply(x, lambda x: move(x, sent, received), lambda dy: move(dy, received, sent))
