"""What is trained for: an objective calls the model on a batch and returns a sum of losses and how many they are.

    gradient of a step = sum over micro-batches and ranks of the gradients of `sum`  /  sum of `count`

So a step is the same however its batch is cut, even where targets are ignored, which a mean of means is not. A batch is
a tuple of tensors, one sequence (or pair, or prompt) a row in each. B = batch, S = tokens, V = vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cs336 import ops
from cs336.models import TransformerConfig
from cs336.nn.moe import Routing, experts_of

Batch = tuple[Tensor, ...]
Terms = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""The sum of the losses (float32 scalar), their count (scalar), and sums of other quantities over the same count."""


class Objective(Protocol):
    """A frozen dataclass with a tag `kind`, so that a configuration can name it."""

    def __call__(self, model: nn.Module, batch: Batch) -> Terms: ...


def for_model(objective: Objective, config: TransformerConfig) -> Objective:
    """The objective of a run with such a model: NextToken says fused_head, others are as they are."""
    return objective.of(config) if isinstance(objective, NextToken) else objective


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of each next token, in nats. The batch is (token_ids_BS, targets_BS), both int64.

    With smoothing, a z-loss or a mixture of experts, whose routers add theirs, the sum that is minimised is more than
    the cross-entropy, which is a metric of its own.
    """

    kind: Literal["next_token"] = "next_token"
    ignore_index: int = -100
    """A target that counts for nothing."""
    label_smoothing: float = 0.0
    """Share of a target's probability that is spread evenly over the vocabulary (arXiv:1512.00567)."""
    z_loss: float = 0.0
    """How much of the square of log Z, the logits' log-sum-exp, is added: it keeps logits from drifting
    (arXiv:2204.02311, which takes 1e-4)."""
    fused_head: bool | None = None
    """Head and loss together, a chunk of tokens at a time: the logits are never kept whole. None: in training, where
    the model caps its logits, whose passes over float32 made a step of 124M on an H200 half again as long."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be a number from 0 to below 1, got {self.label_smoothing!r}")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss must be a finite number, 0 or more, got {self.z_loss!r}")

    def of(self, config: TransformerConfig) -> "NextToken":
        """Of a model like that: with fused_head said."""
        capped = config.logit_softcap is not None
        return dataclasses.replace(self, fused_head=capped) if self.fused_head is None else self

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        token_ids_BS, targets_BS = batch
        count = (targets_BS != self.ignore_index).sum()
        metrics: dict[str, Tensor] = {}
        options: dict[str, float] = {}  # of a loss that is more than the cross-entropy
        if self.label_smoothing or self.z_loss:
            options = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        if self.fused_head:
            named = {"targets": targets_BS, "ignore_index": self.ignore_index}
            loss, routing = with_routing(model, token_ids_BS, **named, **options)
            if options:
                loss, metrics["cross_entropy"] = loss
        else:
            logits_BSV, routing = with_routing(model, token_ids_BS)
            if options:
                metrics["cross_entropy"] = self._sum(logits_BSV.detach(), targets_BS)
            # Last: on a GPU the logits become their gradient.
            loss = self._sum(logits_BSV, targets_BS, in_place=True, **options)
        if routing is not None:
            metrics = {"cross_entropy": loss} | metrics
            metrics |= {name: count * value for name, value in routing.metrics().items()}
            loss = loss + count * (routing.balance + routing.z)
        return loss, count, metrics

    def _sum(self, logits_BSV: Tensor, targets_BS: Tensor, **options: float) -> Tensor:
        named: dict[str, Any] = {"ignore_index": self.ignore_index, "reduction": "sum"} | options
        loss = ops.cross_entropy(logits_BSV, targets_BS, **named)
        assert isinstance(loss, Tensor)  # nothing but the loss was asked for
        return loss


def with_routing(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Routing | None]:
    """model(...), and what its mixtures of experts add to the loss: None where it has none. Wrapped or not."""
    if next(experts_of(model), None) is None:
        return model(*args, **kwargs), None
    return model(*args, **kwargs, return_routing=True)


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of `size` rows."""
    return zip(*(tensor.split(size) for tensor in batch), strict=True)


def gradient_scale(count: Tensor, averaged: int = 1) -> Tensor:
    """What gradients of summed losses are multiplied by: 1 / count, float32; `count` is that of all ranks.

    DDP and FSDP, torch's and ours, average gradients over so many ranks: times their number, `averaged`.
    Nothing counted is no gradient: 0, not NaN.
    """
    return torch.where(count > 0, averaged / count.clamp(min=1), 0.0).float()
