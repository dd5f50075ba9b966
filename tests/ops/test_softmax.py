import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry


@pytest.fixture(params=[None, "ref"])
def forced(request):
    with registry.use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 257), -1), ((5, 257), 0), ((2, 3, 4), 1), ((1,), 0), ((), -1), ((0, 3), 1)]
)
def test_against_fp64(forced, device, shape, dim, dtype):
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    y = ops.softmax(x, dim)

    def plain(dtype):
        x_ = x.detach().to(dtype).requires_grad_()
        e = x_.exp()
        y_ = e / e.sum(dim, keepdim=True)
        return y_, *torch.autograd.grad(y_, x_, dy.to(dtype))

    got = y, *torch.autograd.grad(y, x, dy)
    for three in zip(got, plain(torch.float64), plain(dtype), strict=True):
        assert_close_to_ref(*three)


def test_stable(forced, device):
    x = torch.tensor([[1e4, 1e4, -1e4], [-torch.inf, 0.0, 0.0], [3e38, -3e38, 0.0]], device=device)
    want = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], device=device)
    torch.testing.assert_close(ops.softmax(x), want)
    assert ops.softmax(torch.full((3,), -torch.inf, device=device)).isnan().all()


def test_default_is_the_last_dim(forced):
    torch.testing.assert_close(ops.softmax(torch.randn(3, 5)).sum(-1), torch.ones(3))


def test_compiles_whole(forced):
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.compile(ops.softmax, backend="aot_eager", fullgraph=True)(x, 0), ops.softmax(x, 0))


def test_bad_arguments():
    with pytest.raises(ValueError, match="floating point"):
        ops.softmax(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dim must be a dim of x \(3,\), got 1"):
        ops.softmax(torch.zeros(3), 1)
