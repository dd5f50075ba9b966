"""A model that nothing uses any more is freed, whatever divided it: a run that goes back makes another."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cs336.parallel import DDP, FSDP, ShardedAdamW


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


def stepped(kind):
    """A parameter of a model that has made a step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    p = weakref.ref(model[0].weight)
    if kind is ShardedAdamW:
        optimizer = ShardedAdamW(model.parameters(), lr=torch.tensor(0.1))
        optimizer.overlap(model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    else:
        divided = kind(model)
        divided(torch.ones(2, 4)).sum().backward()
        divided.finish_gradient_synchronization()
    assert p() is not None
    return p


@pytest.mark.parametrize("kind", [DDP, FSDP, ShardedAdamW])
def test_a_model_is_freed(world, kind):
    p = stepped(kind)
    gc.collect()
    assert p() is None
