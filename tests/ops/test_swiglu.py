import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry


@pytest.fixture(params=[None, "ref"])
def forced(request):
    with registry.use(request.param):
        yield request.param


def swiglu_by_hand(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def silu_by_hand(x):
    return x / (1 + torch.exp(-x))


def check(op, by_hand, leaves):
    y = op(*leaves)
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, leaves, dy))

    def plain(dtype):
        again = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = by_hand(*again)
        return (out, *torch.autograd.grad(out, again, dy.to(dtype)))

    for three in zip(got, plain(torch.float64), plain(leaves[0].dtype), strict=True):
        assert_close_to_ref(*three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 257), (0, 4), (1,), ()])
def test_against_fp64(forced, device, shape, dtype):
    gate, up = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    check(ops.swiglu, swiglu_by_hand, [gate, up])
    check(ops.silu, silu_by_hand, [gate])


def test_far_from_zero(forced, device):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    torch.testing.assert_close(ops.silu(x), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4], device=device))
    torch.testing.assert_close(ops.swiglu(x, x), ops.silu(x) * x)


def test_is_torchs_function(forced, device):
    gate, up = torch.randn(2, 40, device=device)
    torch.testing.assert_close(ops.silu(gate), F.silu(gate))
    torch.testing.assert_close(ops.swiglu(gate, up), F.silu(gate) * up)


def test_compiles_whole(forced):
    gate, up = torch.randn(2, 40)
    for op, args in ((ops.swiglu, (gate, up)), (ops.silu, (gate,))):
        torch.testing.assert_close(torch.compile(op, backend="aot_eager", fullgraph=True)(*args), op(*args))


def test_bad_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="gate must be floating point"):
        ops.swiglu(x.int(), x)
    for bad in (x[:2], x.bfloat16()):
        with pytest.raises(ValueError, match="up must be like gate"):
            ops.swiglu(x, bad)
    with pytest.raises(ValueError, match="x must be floating point"):
        ops.silu(x.long())
