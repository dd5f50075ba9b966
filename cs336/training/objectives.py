"""What is trained for: an objective calls the model on a batch and returns a sum of losses and how many they are.

    gradient of a step = sum over micro-batches and ranks of the gradients of `sum`  /  sum of `count`

So a step is the same however its batch is cut, even where targets are ignored, which a mean of means is not. A batch is
a tuple of tensors, one sequence (or pair, or prompt) a row in each. B = batch, S = tokens, V = vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cs336 import ops

Batch = tuple[Tensor, ...]
Terms = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""The sum of the losses (float32 scalar), their count (scalar), and sums of other quantities over the same count."""


class Objective(Protocol):
    """A frozen dataclass with a tag `kind`, so that a configuration can name it."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms: ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each next token, in nats. The batch is (token_ids_BS, targets_BS), both int64."""

    kind: Literal["next_token"] = "next_token"
    ignore_index: int = -100
    """A target that counts for nothing."""
    fused_head: bool = False
    """Head and loss together, a chunk of tokens at a time: the logits are never kept whole."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        token_ids_BS, targets_BS = batch
        if self.fused_head:
            loss = model(token_ids_BS, targets=targets_BS, ignore_index=self.ignore_index)
        else:
            loss = ops.cross_entropy(
                model(token_ids_BS), targets_BS, ignore_index=self.ignore_index, reduction="sum"
            )  # fmt: skip
        return loss, (targets_BS != self.ignore_index).sum(), {}


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of `size` rows."""
    return zip(*(tensor.split(size) for tensor in batch), strict=True)


def over_ranks(totals: Tensor) -> Tensor:
    """The sum of the ranks' totals; themselves where there is one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    return totals


def gradient_scale(count: Tensor) -> Tensor:
    """What gradients of summed losses are multiplied by: 1 / count, float32; `count` is that of all ranks.

    torch's DDP and FSDP average gradients over ranks: times their number. Nothing counted is no gradient: 0, not NaN.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return torch.where(count > 0, world / count.clamp(min=1), 0.0).float()
