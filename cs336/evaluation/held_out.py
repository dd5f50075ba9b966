"""A model's loss on held-out text, as validation measures it."""

import torch

from cs336.data import TokenDataset
from cs336.models import Transformer
from cs336.training import NextToken, evaluators


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
