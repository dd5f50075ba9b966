import pytest
import torch
import torch.nn.functional as F

from cs336 import ops
from cs336.nn import Linear
from cs336.nn.linear import joined, side_by_side

BF16 = torch.bfloat16


def on_grid(t):
    """Whether bfloat16 holds it."""
    return torch.equal(t, t.to(BF16).float())


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("rows", [(40,), (40, 8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_are_products_of_rounded_weights(shape, rows, dtype, device):
    x = torch.randn(shape, device=device, dtype=BF16, requires_grad=True)
    weights = [torch.randn(M, 24, device=device).to(dtype).requires_grad_() for M in rows]
    ys, wanted = ops.linears(x, weights, BF16), [F.linear(x, w.to(BF16)) for w in weights]
    assert all(torch.equal(*pair) for pair in zip(ys, wanted, strict=True))
    dys = [torch.randn_like(y) for y in ys]
    dx, *grads = torch.autograd.grad(ys, (x, *weights), dys)
    exact = sum(dy.double() @ w.to(BF16).double() for dy, w in zip(dys, weights, strict=True)).to(BF16)
    torch.testing.assert_close(dx, exact, rtol=2**-6, atol=2**-4)  # each term's sum is rounded
    for grad, dy, w in zip(grads, dys, weights, strict=True):
        assert grad.dtype == w.dtype
        exact = dy.double().reshape(-1, len(w)).T @ x.detach().double().reshape(-1, 24)
        room = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(grad.double(), exact, rtol=room, atol=room)


def test_only_what_is_wanted_is_computed(device):
    x, weights = torch.randn(3, 24, device=device), [torch.randn(40, 24, device=device) for _ in range(2)]
    weights[1].requires_grad_()
    sum(y.sum() for y in ops.linears(x, weights, BF16)).backward()
    assert x.grad is None
    assert weights[0].grad is None
    assert weights[1].grad is not None


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


@pytest.mark.parametrize("how", ["autocast", "bf16", "fp32", "bias", "frozen", "eager"])
def test_a_compiled_step_adds_the_gradients_of_x_by_products(how, device):
    torch.compiler.reset()
    dtype = BF16 if how == "bf16" else torch.float32
    layers = [Linear(24, M, bias=how == "bias", device=device, dtype=dtype) for M in (40, 16, 16)]
    layers[1].weight.requires_grad_(how != "frozen")
    x = torch.randn(2, 5, 24, device=device, dtype=dtype, requires_grad=True)
    calls = []

    def backend(graph, inputs):
        calls.append(str(graph.code).count("autograd_function_apply"))
        return graph

    step = lambda x: torch.cat(list(joined(x, layers)), -1)  # noqa: E731
    f = step if how == "eager" else torch.compile(step, backend=backend, fullgraph=True)
    with torch.autocast(device, BF16, enabled=how == "autocast"):
        ys = [f(x), step(x)]
    assert torch.equal(*ys)
    assert bool(sum(calls)) == (how in ("autocast", "bf16", "fp32"))
    leaves = [x, *(layer.weight for layer in layers if layer.weight.requires_grad)]
    got, want = (torch.autograd.grad(y.float().square().sum(), leaves) for y in ys)
    room = 1e-5 if how == "fp32" else 2**-5
    torch.testing.assert_close(got, want, rtol=room, atol=room)


def test_raw_ops(device):
    dy, x = torch.randn(6, 4, device=device, dtype=BF16), torch.randn(6, 8, device=device, dtype=BF16)
    torch.library.opcheck(torch.ops.cs336.wide_product.default, (dy, x, torch.float32))
    pairs = [dy, dy + 1], [torch.randn(4, 8, device=device, dtype=BF16) for _ in range(2)]
    torch.library.opcheck(torch.ops.cs336.sum_of_products.default, pairs)
