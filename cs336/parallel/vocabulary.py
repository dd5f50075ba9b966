"""A vocabulary divided among ranks: rank r of N has rows r V/N to (r+1) V/N of the embedding and of the head.

    embedding       rows of other ranks count as zeros, and the sum over ranks is the whole           (B S M sent twice)
    cross-entropy   lse = log sum_r exp(lse_r), and the target's logit is one rank's                  (3 floats a token)

so that logits (tokens, V) never travel (Shoeybi et al. 2019, arXiv:1909.08053, section 3). n = tokens, C = V/N.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cs336.nn import Embedding
from cs336.ops.cross_entropy import check_options, check_reduction, check_targets, reduced
from cs336.parallel.collectives import all_reduce
from cs336.parallel.differentiable import Group, check_parts, own_part, sum_

CHUNK_BYTES = 1 << 28  # of a chunk's float32 logits


class VocabularyEmbedding(Embedding):
    """An Embedding of which each rank has its rows: ids (...) in [0, num_embeddings) -> (..., embedding_dim), the same
    on every rank and bit for bit what one table gives. weight is (num_embeddings / N, embedding_dim).

    Raises ValueError where num_embeddings does not divide.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, group: Group = None, *, device=None, dtype=None):
        N = dist.get_world_size(group)
        check_parts(num_embeddings, N, "a vocabulary")
        super().__init__(num_embeddings // N, embedding_dim, device=device, dtype=dtype)
        self.group, self.vocab_size = group, num_embeddings

    @classmethod
    def of(cls, table: nn.Embedding, group: Group = None) -> "VocabularyEmbedding":
        """This rank's part of a table."""
        made = cls(table.num_embeddings, table.embedding_dim, group, device="meta")
        weight = own_part(table.weight.detach(), 0, group).clone()
        made.weight = nn.Parameter(weight, table.weight.requires_grad)
        return made

    def forward(self, ids: Tensor) -> Tensor:
        if ids.device.type == "cpu" and ids.numel() and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise IndexError(f"ids must be 0 to {self.vocab_size - 1}, got some from {ids.min()} to {ids.max()}")
        local, mine = _local(ids, self.num_embeddings, self.group)
        rows = super().forward(local).masked_fill(~mine[..., None], 0.0)
        return sum_(rows, self.group)


def _local(ids: Tensor, C: int, group: Group) -> tuple[Tensor, Tensor]:
    """ids among this rank's C rows, 0 for those of others, and which are its own."""
    local = ids - dist.get_rank(group) * C
    mine = (local >= 0) & (local < C)
    return local.masked_fill(~mine, 0), mine


def vocabulary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    group: Group = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """ops.cross_entropy of logits (..., V) of which this rank has its part (..., V / N).

    targets (...), int64 or int32 in [0, V), and what is returned are the same on every rank. The gradient is that of
    this rank's part of the logits.
    """
    C = logits.shape[-1]
    targets_n = _checked(logits, targets, C, group, ignore_index, reduction)
    loss_n, _ = _Loss.apply(logits.reshape(-1, C), None, targets_n, group, ignore_index, softcap)
    return reduced(loss_n, targets, ignore_index, reduction)


def vocabulary_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: Group = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """ops.linear_cross_entropy of x (..., M) with the whole weight (V, M), of which this rank has its part (V / N, M).

    x, targets (...) and what is returned are the same on every rank. x's gradient is a partial sum: pass
    `differentiable.copy(x, group)` to have it summed. Logits are made in chunks of tokens, again in the backward.
    """
    targets_n = _checked(x, targets, weight.shape[0], group, ignore_index, reduction)
    loss_n, _ = _Loss.apply(*_layer(x, weight), targets_n, group, ignore_index, softcap)
    return reduced(loss_n, targets, ignore_index, reduction)


def vocabulary_linear_loss_sums(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: Group = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """ops.linear_loss_sums, of such a weight: what is minimised, and the cross-entropy alone, without a gradient."""
    check_options(softcap, z_loss, label_smoothing)
    targets_n = _checked(x, targets, weight.shape[0], group, ignore_index, "sum")
    options = ignore_index, softcap, label_smoothing, z_loss
    loss_n, plain_n = _Loss.apply(*_layer(x, weight), targets_n, group, *options)
    return loss_n.sum(), plain_n.sum()


def _layer(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, M) and weight as a linear layer takes them."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return x.reshape(-1, x.shape[-1]), weight


def vocabulary_loss_bytes(tokens: int, C: int, M: int, width: int, *, capped: bool) -> int:
    """What vocabulary_linear_cross_entropy takes on this rank at its peak, in the backward, `width` bytes an element: a
    chunk's logits in float32, or what it adds to the gradient of the weight; that in float32, and that of x."""
    chunk = min(tokens, _rows(C)) * C
    return max(chunk * (8 + 4 * capped), width * (chunk + C * M)) + width * tokens * M + 4 * C * M


def _checked(x: Tensor, targets: Tensor, C: int, group: Group, ignore_index: int, reduction: str) -> Tensor:
    check_reduction(reduction)
    if targets.shape != x.shape[:-1] or targets.dtype not in (torch.int64, torch.int32):
        got = f"{tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"targets must be {tuple(x.shape[:-1])} int64 or int32 to fit {tuple(x.shape)}, got {got}")
    targets_n = targets.reshape(-1).long()
    check_targets(targets_n, C * dist.get_world_size(group), ignore_index)
    return targets_n


class _Loss(torch.autograd.Function):
    """Losses (n,) in float32 or wider, and the cross-entropy alone, which has no gradient. x (n, M) with a weight
    (C, M), or logits (n, C) with None.

        loss = (1 - s) (lse - z_target) + s (lse - mean z) + zeta lse^2         s label_smoothing, zeta z_loss
        dloss / dz = (1 + 2 zeta lse) softmax(z) - (1 - s) [target] - s / V
    """

    @staticmethod
    def forward(ctx: Any, x_nM, weight_CM, targets_n, group, ignore_index, softcap, label_smoothing=0.0, z_loss=0.0):
        C = x_nM.shape[1] if weight_CM is None else weight_CM.shape[0]
        local_n, mine_n = _local(targets_n, C, group)
        wide = torch.promote_types(x_nM.dtype, torch.float32)
        lse_n, hit_n, mean_n = (x_nM.new_zeros(len(x_nM), dtype=wide) for _ in range(3))
        share = label_smoothing / (C * dist.get_world_size(group))  # of each token of the vocabulary
        for rows in _chunks(len(x_nM), C):
            z_nC = _logits(x_nM[rows], weight_CM, softcap)[0]
            lse_n[rows] = z_nC.logsumexp(-1)
            hit_n[rows] = z_nC.gather(-1, local_n[rows, None])[:, 0].masked_fill(~mine_n[rows], 0.0)
            if label_smoothing:
                mean_n[rows] = z_nC.sum(-1) * share
        most_n = lse_n.clone()
        dist.all_reduce(most_n, dist.ReduceOp.MAX, group=group)
        sums = torch.stack(((lse_n - most_n).exp(), hit_n, *((mean_n,) if label_smoothing else ())))
        all_reduce(sums, group)
        lse_n, hit_n = sums[0].log() + most_n, sums[1]
        counts_n = targets_n != ignore_index
        ctx.save_for_backward(x_nM, weight_CM, local_n, mine_n & counts_n, counts_n, lse_n)
        ctx.softcap, ctx.label_smoothing, ctx.z_loss, ctx.share = softcap, label_smoothing, z_loss, share
        plain_n = (lse_n - hit_n).masked_fill(~counts_n, 0.0)
        loss_n = plain_n.clone()
        if label_smoothing or z_loss:
            loss_n = lse_n - (1 - label_smoothing) * hit_n + z_loss * lse_n.square()
            loss_n = (loss_n - sums[2] if label_smoothing else loss_n).masked_fill(~counts_n, 0.0)
        ctx.mark_non_differentiable(plain_n)
        ctx.set_materialize_grads(False)
        return loss_n, plain_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss_n, _):
        if dloss_n is None:
            return (None,) * 8
        x_nM, weight_CM, local_n, mine_n, counts_n, lse_n = ctx.saved_tensors
        C = x_nM.shape[1] if weight_CM is None else weight_CM.shape[0]
        dloss_n = dloss_n.masked_fill(~counts_n, 0.0)
        dx_nM, dw_CM = torch.empty_like(x_nM), None
        if weight_CM is not None:
            dw_CM = torch.zeros_like(weight_CM, dtype=torch.promote_types(weight_CM.dtype, torch.float32))
        for rows in _chunks(len(x_nM), C):
            given_n = dloss_n[rows]
            hit_n = torch.where(mine_n[rows], -(1 - ctx.label_smoothing) * given_n, 0.0)
            soft_n = given_n * (1 + 2 * ctx.z_loss * lse_n[rows]) if ctx.z_loss else given_n
            even_n = ctx.share * given_n if ctx.share else None
            place = lse_n[rows], soft_n, hit_n, local_n[rows], even_n
            dz_nC = _gradient(x_nM[rows], weight_CM, ctx.softcap, *place).to(x_nM.dtype)
            dx_nM[rows] = dz_nC if weight_CM is None else dz_nC @ weight_CM
            if dw_CM is not None:
                dw_CM += dz_nC.T @ x_nM[rows]
            del dz_nC  # before the next chunk is there
        return dx_nM, None if dw_CM is None else dw_CM.to(weight_CM.dtype), *[None] * 6


def _logits(x_nM: Tensor, weight_CM: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """In float32 or wider, and the slope of the soft-cap."""
    z_nC = x_nM if weight_CM is None else F.linear(x_nM, weight_CM)
    z_nC = z_nC.to(torch.promote_types(z_nC.dtype, torch.float32))
    if softcap is None:
        return z_nC, None
    z_nC = (z_nC / softcap).tanh_()
    slope_nC = z_nC.square().neg_().add_(1)
    return z_nC.mul_(softcap), slope_nC


def _gradient(
    x_nM: Tensor, weight_CM: Tensor | None, softcap: float | None, lse_n, soft_n, hit_n, local_n, even_n
) -> Tensor:
    """Of a chunk's logits: soft times the softmax, hit at the target, less what is even over the vocabulary."""
    z_nC, slope_nC = _logits(x_nM, weight_CM, softcap)
    dz_nC = (z_nC - lse_n[:, None]).exp_().mul_(soft_n[:, None])
    dz_nC.scatter_add_(-1, local_n[:, None], hit_n[:, None])
    if even_n is not None:
        dz_nC.sub_(even_n[:, None])
    return dz_nC if slope_nC is None else dz_nC.mul_(slope_nC)


def _rows(C: int) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_BYTES // (4 * C))


def _chunks(n: int, C: int) -> list[slice]:
    size = _rows(C)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
