"""AdamW on one rank's shard of a bucket, between collectives, in plain torch: the definition."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cs336.ops import communicator
from cs336.ops.ref import adamw
from cs336.ops.ref.rounding import join, split

PART = 1 << 22  # elements that are float64 at once


def own(bucket: Tensor, comm: int) -> Tensor:
    """This rank's shard."""
    ranks = communicator.get(comm)
    return bucket.view(ranks.size, -1)[ranks.rank]


def pieces(numels: Sequence[int], shard: int, comm: int) -> Iterator[tuple[int, slice]]:
    """(which parameter, its elements in this rank's shard) of each parameter that has any there."""
    start = communicator.get(comm).rank * shard
    end = 0
    for i, numel in enumerate(numels):
        begin, end = end, end + numel
        piece = slice(max(begin - start, 0), min(end - start, shard))
        if piece.start < piece.stop:
            yield i, piece


def reduce_(grad: Tensor, squares: Tensor, comm: int) -> None:
    shard = own(grad, comm)
    communicator.get(comm).reduce_scatter(shard, grad)
    parts = [part.double().square().sum() for part in shard.split(PART)]
    squares.zero_()[0] = torch.stack(parts).sum()


def total_(totals: Tensor, squares: Tensor, comm: int) -> None:
    totals[0] = squares.sum()
    communicator.get(comm).all_reduce(totals)


def step_(
    param: Tensor,
    grad: Tensor,
    remainder: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    used: Tensor,
    numels: Sequence[int],
    lr: Tensor,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    comm: int,
) -> None:
    p_own, g_own = own(param, comm), own(grad, comm)
    for i, piece in pieces(numels, exp_avg.numel(), comm):
        if used[i] > 0:
            p, g, m, v = p_own[piece], g_own[piece], exp_avg[piece], exp_avg_sq[piece]
            wide = p if remainder is None else join(p, remainder[piece])
            adamw.step_([wide], [g], [m], [v], [steps[i]], lr, grad_scale, beta1, beta2, eps, weight_decay)
            if remainder is not None:
                p[:], remainder[piece] = split(wide)
    communicator.get(comm).all_gather(param, p_own)


def wait_(param: Tensor, comm: int) -> None:
    """The collectives above are over."""
