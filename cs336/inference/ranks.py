"""What the engines of a divided model must agree on: each rank has one, and all lay out the same steps.

Every rank is asked the same, in the same order. Logits are the same on all of them, and so is what is drawn.
"""

import torch
import torch.distributed as dist

from cs336.models import Transformer
from cs336.parallel.tensor import TensorParallelTransformer


def is_divided(model: Transformer) -> bool:
    return isinstance(model, TensorParallelTransformer)


def least(value: int, model: Transformer) -> int:
    """The smallest of all ranks' values; of a model that is not divided its own."""
    if not isinstance(model, TensorParallelTransformer):
        return value
    value_ = torch.tensor(value, device=model.device)
    dist.all_reduce(value_, dist.ReduceOp.MIN, group=model.region.group)
    return int(value_)


def generator_of_seeds(model: Transformer) -> torch.Generator:
    """Of requests that have none: torch's global one, or where a model is divided one that all ranks have alike."""
    if not isinstance(model, TensorParallelTransformer):
        return torch.default_generator
    drawn = int(torch.randint(2**62, (), device="cpu"))
    return torch.Generator().manual_seed(least(drawn, model))
