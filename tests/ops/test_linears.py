import pytest
import torch
import torch.nn.functional as F

from cs336 import ops
from cs336.nn import Linear
from cs336.nn.linear import joined

BF16 = torch.bfloat16


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("rows", [(40,), (40, 8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_are_products(shape, rows, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(M, 24, device=device, dtype=dtype, requires_grad=True) for M in rows]
    ys, wanted = ops.linears(x, weights), [F.linear(x, w) for w in weights]
    assert all(torch.equal(*pair) for pair in zip(ys, wanted, strict=True))
    dys = [torch.randn_like(y) for y in ys]
    dx, *grads = torch.autograd.grad(ys, (x, *weights), dys)
    exact = sum(dy.double() @ w.double() for dy, w in zip(dys, weights, strict=True))
    room = 1e-5 if dtype == torch.float32 else 2**-6  # each term's sum is rounded
    torch.testing.assert_close(dx.double(), exact, rtol=room, atol=4 * room)
    for grad, want in zip(grads, torch.autograd.grad(wanted, weights, dys), strict=True):
        torch.testing.assert_close(grad, want, rtol=room, atol=room)


def test_only_what_is_wanted_is_computed(device):
    x, weights = torch.randn(3, 24, device=device), [torch.randn(40, 24, device=device) for _ in range(2)]
    weights[1].requires_grad_()
    sum(y.sum() for y in ops.linears(x, weights)).backward()
    assert x.grad is None
    assert weights[0].grad is None
    assert weights[1].grad is not None


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
    if how == "autocast":  # as torch's own: rounded where the product ends
        assert all(torch.equal(*pair) for pair in zip(got[1:], want[1:], strict=True))
    with torch.no_grad(), torch.autocast(device, BF16, enabled=how == "autocast"):
        assert torch.equal(f(x), step(x))


def test_raw_op(device):
    dy = torch.randn(6, 4, device=device, dtype=BF16)
    pairs = [dy, dy + 1], [torch.randn(4, 8, device=device, dtype=BF16) for _ in range(2)]
    torch.library.opcheck(torch.ops.cs336.sum_of_products.default, pairs)
