import pytest
import torch
import torch.nn.functional as F

from cs336 import ops
from cs336.nn import Linear
from cs336.nn.linear import side_by_side

BF16 = torch.bfloat16


def on_grid(t):
    """Whether bfloat16 holds it."""
    return torch.equal(t, t.to(BF16).float())


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
def test_is_the_product_of_rounded_weights(shape, device):
    x = torch.randn(shape, device=device, dtype=BF16, requires_grad=True)
    w = torch.randn(40, 24, device=device, requires_grad=True)
    y, want = ops.linear_cast(x, w, BF16), F.linear(x, w.to(BF16))
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert torch.equal(dx, torch.autograd.grad(want, x, dy)[0])
    assert dw.dtype == torch.float32
    exact = dy.double().reshape(-1, 40).T @ x.detach().double().reshape(-1, 24)
    torch.testing.assert_close(dw, exact.float(), rtol=1e-5, atol=1e-5)


def test_only_what_is_wanted_is_computed(device):
    x, w = torch.randn(3, 24, device=device), torch.randn(40, 24, device=device, requires_grad=True)
    ops.linear_cast(x, w, BF16).sum().backward()
    assert x.grad is None
    assert w.grad is not None


@pytest.mark.parametrize("together", [False, True])
def test_a_compiled_step_under_autocast_rounds_no_gradient(together, device):
    torch.compiler.reset()
    layers = [Linear(24, 40, device=device), Linear(24, 16, device=device)]
    x = torch.randn(5, 24, device=device)

    def step(x):
        y = side_by_side(x, layers) if together else None
        return torch.cat([layer(x) for layer in layers], -1) if y is None else y

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.autocast(device, BF16):
        ys = [compiled(x), step(x)]
    assert torch.equal(*ys)
    weights = [layer.weight for layer in layers]
    (one, other), eager = (torch.autograd.grad(y.float().square().sum(), weights) for y in ys)
    assert not on_grid(one)
    assert not on_grid(other)
    assert all(on_grid(g) for g in eager)
    torch.testing.assert_close((one, other), eager, rtol=2**-8, atol=2**-8)
    with torch.no_grad(), torch.autocast(device, BF16):
        assert torch.equal(compiled(x), step(x))
    torch.compiler.reset()
    assert compiled(x).dtype == torch.float32


def test_raw_op(device):
    dy, x = torch.randn(6, 4, device=device, dtype=BF16), torch.randn(6, 8, device=device, dtype=BF16)
    torch.library.opcheck(torch.ops.cs336.weight_gradient.default, (dy, x, torch.float32))
