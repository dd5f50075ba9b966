"""linear_scaled: its three products are those of the rounded floats, and close to those of the others."""

import pytest
import torch
import torch.nn.functional as F
from attentions import BF16, F16, F32

from cs336 import ops


def wide(x, gradient=False):
    """What the products see of x, in float64."""
    rounded, _, scale = ops.fp8_copies(x.flatten(0, -2), gradient=gradient)
    return (rounded.double() * scale.double()).view(x.shape)


def close(found, want, room):
    assert (found.double() - want).norm() <= room * want.norm()


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "M"), [((16, 32), 48), ((2, 24, 64), 16), ((2, 2, 4, 160), 96)])
def test_products_and_gradients(device, shape, M, dtype, weight_dtype):
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(M, shape[-1], device=device, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(M, device=device, requires_grad=True)
    y = ops.linear_scaled(x, weight, bias)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    assert y.dtype == dx.dtype == dtype
    assert dw.dtype == weight_dtype
    exact = {"x": x.double(), "w": weight.double(), "dy": dy.double()}
    seen = {"x": wide(x), "w": wide(weight), "dy": wide(dy, gradient=True)}
    # Sums of few bits are cut off by fast tensor cores; bfloat16 results are rounded.
    for of, room in ((seen, 2e-3 if dtype == F32 else 5e-3), (exact, 0.09)):
        close(y, of["x"] @ of["w"].t() + bias.double(), room)
        close(dx, of["dy"] @ of["w"], room)
        close(dw, of["dy"].flatten(0, -2).t() @ of["x"].flatten(0, -2), room)
    torch.testing.assert_close(db, dy.float().flatten(0, -2).sum(0), rtol=1e-2, atol=1e-2)


def test_autocast_says_the_dtype(device):
    x, weight = torch.randn(16, 32, device=device), torch.randn(16, 32, device=device, requires_grad=True)
    with torch.autocast(x.device.type, BF16):
        y = ops.linear_scaled(x, weight)
    assert y.dtype == BF16
    assert torch.equal(y, ops.linear_scaled(x.bfloat16(), weight))
    y.sum().backward()
    assert weight.grad.dtype == F32


def test_only_what_is_wanted_is_computed(device):
    x = torch.randn(16, 32, device=device, requires_grad=True)
    weight = torch.randn(16, 32, device=device)
    ops.linear_scaled(x, weight).sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad is None


def test_compiled(device):
    torch.compiler.reset()
    x = torch.randn(2, 16, 32, device=device, requires_grad=True)
    weight = torch.randn(48, 32, device=device, requires_grad=True)
    eager, compiled = ops.linear_scaled(x, weight), torch.compile(ops.linear_scaled, fullgraph=True)(x, weight)
    assert torch.equal(compiled, eager)
    dy = torch.randn_like(eager)
    for got, want in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (compiled, eager)), strict=True):
        assert torch.equal(got, want)


def test_what_is_not_finite_is_seen(device):
    x, weight = torch.randn(16, 32, device=device), torch.randn(16, 32, device=device)
    x[3, 4] = float("inf")
    assert ops.linear_scaled(x, weight)[3].isnan().all()


def test_bad_input(device):
    x, weight = torch.randn(16, 32, device=device), torch.randn(48, 32, device=device)
    with pytest.raises(ValueError, match="multiples of 16, got 15 rows"):
        ops.linear_scaled(x[:15], weight)
    with pytest.raises(ValueError, match="multiples of 16"):
        ops.linear_scaled(x, weight[:40])
    with pytest.raises(ValueError, match="multiples of 16"):
        ops.linear_scaled(x[:, :24], weight[:, :24])
    for odd_x, odd_weight in ((x, weight.t()), (x, weight[None]), (x[0, 0], weight)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., K\) and weight \(M, K\)"):
            ops.linear_scaled(odd_x, odd_weight)
    with pytest.raises(TypeError, match="float16"):
        ops.linear_scaled(x.to(F16), weight)
    with pytest.raises(RuntimeError, match="backward"):
        torch.func.vmap(ops.linear_scaled, in_dims=(0, None))(x[None], weight)
    assert F.linear(x[:15], weight).shape == (15, 48)  # what the message says
