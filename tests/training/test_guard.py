import pytest
import torch
from torch import nn

from cs336.training.guard import first_non_finite


class Net(nn.Module):
    def __init__(self, break_at=None):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 1)
        self.break_at = break_at

    def forward(self, x):
        x = self.body(self.first(x))
        return self.last(x / 0 if self.break_at == "before last" else x)


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * torch.inf


def test_all_finite():
    net = Net()
    assert first_non_finite(net, lambda: net(torch.randn(2, 3)).sum()) is None
    assert all(p.grad is None for p in net.parameters())
    assert not net.first._forward_hooks
    assert not net.first.weight._post_accumulate_grad_hooks


def test_innermost_module_that_finishes_first():
    net = Net("before last")
    assert "the output of last (Linear), its inputs at most inf" in first_non_finite(
        net, lambda: net(torch.ones(2, 3)).sum()
    )
    net = Net()
    for layer, value in ((net.first, 1.0), (net.body[1], 3e38)):
        nn.init.constant_(layer.weight, value)
    assert "the output of body.1 (Linear), its inputs at most" in first_non_finite(
        net, lambda: net(torch.ones(2, 3)).sum()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_parameter(bad):
    net = Net()
    net.last.bias.data.fill_(bad)
    assert first_non_finite(net, lambda: net(torch.ones(2, 3)).sum()) == "the parameter last.bias"


def test_loss_itself():
    net = Net()
    assert "the loss" in first_non_finite(net, lambda: net(torch.ones(2, 3)).sum() * torch.inf)


def test_gradient_that_the_backward_reaches_first():
    net = Net()
    found = first_non_finite(net, lambda: net.last(BadGradient.apply(net.body(net.first(torch.ones(2, 3))))).sum())
    assert found.startswith("the gradient of body.1.")
    assert all(p.grad is None for p in net.parameters())


def test_an_error_in_the_loss_leaves_no_hook():
    net = Net()
    with pytest.raises(RuntimeError):
        first_non_finite(net, lambda: net(torch.ones(2, 7)))
    assert not net.first._forward_hooks
