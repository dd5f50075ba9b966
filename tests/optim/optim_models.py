"""Small models, gradients that repeat, and a state through a file: for every optimizer's tests."""

import io

import torch
from torch import nn


class Tiny(nn.Module):
    """Embedding, norm, layers of three shapes (one standing, one lying, one square), a head."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 20)
        self.norm = nn.LayerNorm(20)
        self.down = nn.Linear(20, 8, bias=False)
        self.out = nn.Linear(8, 8, bias=False)
        self.gate = nn.Linear(8, 20, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.out(self.down(self.norm(self.up(x) * torch.sigmoid(self.gate(x))))))


def tiny(dtype=torch.float32, device="cpu", **kwargs):
    torch.manual_seed(7)
    return Tiny(**kwargs).to(device, dtype)


def set_gradients(models, step, size=1.0):
    """The same random gradients for all, of each one's dtype."""
    generator = torch.Generator().manual_seed(step)
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        g = size * torch.randn(parameters[0].shape, generator=generator)
        for p in parameters:
            p.grad = g.to(p.device, p.dtype)


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same_state(a, b):
    """Whether two optimizers hold the same state, bit for bit."""
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        for name in a[i]:
            assert a[i][name].dtype == b[i][name].dtype
            assert torch.equal(a[i][name], b[i][name]), (i, name)
