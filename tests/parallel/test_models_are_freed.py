"""A model that nothing uses any more is freed, whatever divided it: a run that goes back makes another."""

import gc
import warnings
import weakref

import pytest
import torch
from gloo_ranks import on_two_ranks
from torch import nn

from cs336.parallel import DDP, FSDP, ShardedAdamW


def stepped(kind):
    """A parameter of a model that has made a step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if kind is ShardedAdamW:
        optimizer = ShardedAdamW(model.parameters(), lr=torch.tensor(0.1))
        optimizer.overlap(model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    else:
        divided = kind(model)
        divided(torch.ones(2, 4)).sum().backward()
        divided.finish_gradient_synchronization()
    return weakref.ref(model[0].weight)


@pytest.mark.parametrize("kind", [DDP, FSDP, ShardedAdamW])
def test_a_model_is_freed(world, kind):
    p = stepped(kind)
    gc.collect()
    assert p() is None


def test_weights_that_fsdp_has_split_are_freed(world):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)]))
    given = [weakref.ref(p) for p in model.parameters()]
    divided = FSDP(model)
    gc.collect()
    assert [p() for p in given] == [None] * 4
    assert len(list(divided.parameters())) == 4


class Layer(nn.Linear):
    """mixed: with parameters of two dtypes, which travel apart."""

    def __init__(self, mixed):
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) if mixed else None

    def forward(self, x):
        y = nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias.to(self.weight.dtype))
        return y if self.gain is None else y * self.gain


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("computed", ["float32", "bfloat16", "weights alone"])
@pytest.mark.parametrize("mixed", [False, True])
def test_one_unit_of_gradients_is_on_its_way_without_its_weights(world, monkeypatch, mixed, computed, reshard):
    """Work holds what it sends until it is waited for, as NCCL's does. Gradients of no_sync are sent as others."""
    on_its_way, most, weights = [], [], []
    model = nn.ModuleDict({"layers": nn.ModuleList(Layer(mixed) for _ in range(5))})

    class Work:
        def wait(self):
            on_its_way.remove(self)

    def send(out, x, group, async_op):
        out.copy_(x)
        on_its_way.append(Work())
        most.append(len(on_its_way))
        weights.append(sum(layer.weight.untyped_storage().nbytes() > 0 for layer in model["layers"]))
        return on_its_way[-1]

    monkeypatch.setattr("cs336.parallel.unit.reduce_scatter", send)
    some = [layer.weight for layer in model["layers"]] if computed == "weights alone" else None
    low = None if computed == "float32" else torch.bfloat16
    model.forward = lambda x: [x := layer(x) for layer in model["layers"]][-1]
    divided = FSDP(model, low, computed=some, reshard=reshard)
    messages = 5 * (1 + mixed)
    for step in range(2):
        with divided.no_sync():
            divided(torch.ones(2, 4)).sum().backward()
        assert len(most) == step * messages
        assert not [p for p in divided.parameters() if p.grad is not None]
        divided(torch.ones(2, 4)).sum().backward()
        divided.finish_gradient_synchronization()
        assert not on_its_way
        for p in divided.parameters():
            p.grad = None
    assert max(most) == 1 + mixed
    assert len(most) == 2 * messages
    assert weights == [0 if reshard else 5] * 2 * messages


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_units_whose_parameters_are_all_unused(world, low):
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), "idle": nn.Linear(1, 1)})
    model.forward = lambda x: model["layers"][0](x.to(model["layers"][0].weight.dtype)) + 0 * x
    divided = FSDP(model, low)
    divided(torch.ones(2, 4)).sum().backward()
    divided.finish_gradient_synchronization()
    assert [p.grad is None for p in divided.parameters()] == [False] * 2 + [True] * 4


def said(p):
    """What a backward of p says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (p * 1).sum().backward()
    return [str(warning.message) for warning in caught]


def dropped(rank):
    """What a backward says after DDP, and after an optimizer, are dropped, and when others have come."""
    found = []
    for make in (DDP, lambda model: ShardedAdamW(model.parameters())):
        model = nn.Linear(1, 1, bias=False)
        make(model)
        gc.collect()
        found.append(said(model.weight))
        model.weight.grad = None
        with make(model).no_sync():
            found.append(said(model.weight))
    return found


def test_gradients_that_nothing_averages_any_more_are_said(tmp_path):
    """Ranks would train apart, in silence."""
    for ddp, ddp_again, adamw, adamw_again in on_two_ranks(dropped, tmp_path):
        (message,), (other,) = ddp, adamw
        assert "the DDP that averaged this model's gradients over the ranks is gone" in message
        assert "keep the ShardedAdamW for as long as the model trains" in other
        assert ddp_again == adamw_again == []


def test_one_process_has_nothing_to_say(world):
    model = nn.Linear(1, 1)
    DDP(model)
    gc.collect()
    assert said(model.weight) == []
