"""AdamW on one rank's shard of a bucket: the kernel of adamw.py, a launch for each parameter, between collectives."""

from cs336.ops import communicator
from cs336.ops.ref.sharded_adamw import own, pieces
from cs336.ops.ref.sharded_adamw import reduce_ as reduce_
from cs336.ops.ref.sharded_adamw import total_ as total_
from cs336.ops.ref.sharded_adamw import wait_ as wait_
from cs336.ops.triton import adamw


def step_(
    param, grad, remainder, exp_avg, exp_avg_sq, steps, used, numels, lr, grad_scale, beta1, beta2, eps, weight_decay,
    comm,
):  # fmt: skip
    p, g = own(param, comm), own(grad, comm)
    for i, piece in pieces(numels, exp_avg.numel(), comm):
        kept = {"remainder": None if remainder is None else remainder[piece], "used": used[i]}
        of_piece = (p[piece], g[piece], exp_avg[piece], exp_avg_sq[piece], steps[i])
        adamw.update(*of_piece, lr, grad_scale, beta1, beta2, eps, weight_decay, **kept)
    communicator.get(comm).all_gather(param, p)
