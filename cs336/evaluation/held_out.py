"""Bits per byte: how many bits a model needs for each byte of a text, whatever its tokens are.

    bits per byte = loss in nats per token * tokens / (ln 2 * bytes)

An arithmetic coder driven by the model would reach it (Shannon 1948), which makes a compressor a fair rival.
"""

import math

import numpy as np
import torch

from cs336 import ops
from cs336.data import TokenDataset
from cs336.data.dataset import to_device
from cs336.models import Transformer


def bits_per_byte(loss: float, tokens: int, num_bytes: int) -> float:
    """loss: mean nats per token; tokens: of the text, end-of-text tokens included; num_bytes: of the text in UTF-8."""
    return loss * tokens / (math.log(2) * num_bytes)


@torch.no_grad()
def mean_loss(model: Transformer, data: TokenDataset, batch_size: int = 16, most_windows: int | None = None) -> float:
    """Nats per token over the whole windows of the data, each read without what is before it.

    most_windows: read no more of them than this, spread evenly.
    """
    training = model.training
    model.eval()
    count = min(len(data), len(data) if most_windows is None else most_windows)
    index_N = np.arange(count) * len(data) // count
    total = torch.zeros((), dtype=torch.float64)
    for index_B in np.split(index_N, range(batch_size, count, batch_size)):
        x_BT, y_BT = to_device(data.windows(index_B), model.device)
        total += ops.cross_entropy(model(x_BT), y_BT).double().cpu() * len(index_B)
    model.train(training)
    return total.item() / count
