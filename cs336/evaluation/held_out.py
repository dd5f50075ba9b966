"""Bits per byte: how many bits a model needs for each byte of a text, whatever its tokens are.

    bits per byte = loss in nats per token * tokens / (ln 2 * bytes)

An arithmetic coder driven by the model would reach it (Shannon 1948), which makes a compressor a fair rival.
"""

import math

import torch

from cs336.data import TokenDataset
from cs336.models import Transformer
from cs336.training import NextToken, evaluators


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """loss: mean nats per token; tokens: of the text, end-of-text tokens included; num_bytes: of the text in UTF-8."""
    return loss * tokens / (math.log(2) * num_bytes)


@torch.no_grad()
def mean_loss(model: Transformer, data: TokenDataset, batch_size: int = 16, most_windows: int | None = None) -> float:
    """Nats per token over the whole windows of the data, each read without what is before it.

    most_windows: read no more of them than this, spread evenly.
    """
    count = min(len(data), len(data) if most_windows is None else most_windows)
    objective, training = NextToken(), model.training
    model.eval()
    loss = evaluators.mean_loss(lambda batch: objective(model, batch), data, count, batch_size, model.device)
    model.train(training)
    return loss
