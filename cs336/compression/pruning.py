"""Weights that are set to zero, by their score; the model keeps its shape.

    magnitude    |W_ij|                     the lowest of each matrix
    wanda        |W_ij| * ||x_j||_2         the lowest of each row, x_j what feature j was over calibration text, seen
                                            through the blocks that are pruned already (arXiv:2306.11695)

"2:4" sets the two lowest of each four neighbours in a row to zero instead, which sparse tensor cores skip
(arXiv:2104.08378). N = out_features, K = in_features.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cs336.compression.blocks import Walk, prunable, refuse_quantized
from cs336.models import Transformer

Score = Literal["magnitude", "wanda"]
Sparsity = float | Literal["2:4"]


def lowest(score_NK: Tensor, sparsity: float, *, by_row: bool) -> Tensor:
    """(N, K) boolean: the floor(sparsity * K) lowest scores of each row, or floor(sparsity * N * K) of all.

    Raises ValueError for a sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be '2:4' or a share from 0 to below 1, got {sparsity!r}")
    scores = score_NK if by_row else score_NK.reshape(1, -1)
    count = int(sparsity * scores.shape[1] + 1e-9)  # 0.29 * 100 is 28.999...
    index = scores.topk(count, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True).view_as(score_NK)


def lowest_2_4(score_NK: Tensor) -> Tensor:
    """(N, K) boolean: the two lowest scores of each four neighbours in a row. Raises ValueError for another K."""
    N, K = score_NK.shape
    if K % 4:
        raise ValueError(f"2:4 takes rows in fours: in_features must be a multiple of 4, got {K}")
    fours = score_NK.reshape(-1, 4)
    index = fours.topk(2, largest=False).indices
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(1, index, True).view(N, K)


@torch.no_grad()
def prune_weights_(
    model: Transformer, score: Score, sparsity: Sparsity = 0.5, batches: Sequence[Tensor] = ()
) -> Transformer:
    """Set weights of the model's linear layers to zero, in place: embedding, head, routers and experts stay.

    batches: token ids (B, S) int64 of calibration text, for wanda.
    Returns the model. Raises ValueError for an unknown score, a sparsity out of range, weights that are not finite, by
    their name, a quantised model, and without text for wanda.
    """
    if score not in ("magnitude", "wanda"):
        raise ValueError(f"score must be magnitude or wanda, got {score!r}")
    if isinstance(sparsity, str) and sparsity != "2:4":
        raise ValueError(f"sparsity must be '2:4' or a share from 0 to below 1, got {sparsity!r}")
    refuse_quantized(model)
    walk = Walk(model, batches) if score == "wanda" else None
    for i, block in enumerate(model.layers if walk is None else walk):
        layers = prunable(block)
        squares = {} if walk is None else walk.squares(block, dict(layers))
        for name, layer in layers.items():
            score_NK = layer.weight.double().abs()
            if name in squares:
                score_NK = score_NK * squares[name].sqrt()
            try:
                if not score_NK.isfinite().all():
                    raise ValueError("a weight, or what it is multiplied with, is not finite")
                if isinstance(sparsity, str):
                    zero_NK = lowest_2_4(score_NK)
                else:
                    zero_NK = lowest(score_NK, sparsity, by_row=name in squares)
            except ValueError as error:
                raise ValueError(f"layers.{i}.{name}: {error}") from None
            layer.weight.masked_fill_(zero_NK, 0)
    return model


def zeros(model: Transformer) -> float:
    """The share of the linear layers' weights that are zero."""
    weights = [layer.weight for block in model.layers for layer in prunable(block).values()]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
