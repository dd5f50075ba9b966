"""gram in every variant that runs here: close to fp64, symmetric to the bit."""

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
SIZES = [(1, 1, 1), (2, 5, 3), (2, 16, 32), (3, 40, 33), (1, 50, 70)]
SIZES += [(3, 768, 768), (2, 768, 2048), (2, 1000, 1500), (1, 129, 64), (1, 2560, 100)] if CUDA else []


@pytest.fixture(params=[(v, d) for v in registry.NAMESPACE for d in (F32, BF16, F16)], ids=str)
def variant(request, device):
    """Forced; gives the dtype."""
    name, dtype = request.param
    if reason := registry.why_not("gram", name, torch.zeros(1, 1, 1, dtype=dtype, device=device), None, 1.0, 1.0):
        pytest.skip(reason)
    with registry.use(name):
        yield dtype


def symmetric(B, M, device, dtype):
    c = torch.randn(B, M, M, device=device)
    return (c + c.mT).to(dtype)


@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize(("B", "M", "N"), SIZES)
def test_against_fp64(variant, device, B, M, N, with_c):
    x = torch.randn(B, M, N, device=device).to(variant)
    c = symmetric(B, M, device, variant) if with_c else None

    def product(dtype):
        y = 0.7 * (x.to(dtype) @ x.to(dtype).mT)
        return y if c is None else y - 1.3 * c.to(dtype)

    found = ops.gram(x, c, alpha=0.7, beta=-1.3)
    assert_close_to_ref(found, product(F64), product(variant), scale=N**0.5)
    assert torch.equal(found, found.mT)


def test_strides(variant, device):
    """Rows apart, batches in another order, and a matrix that is turned."""
    x = torch.randn(4, 24, 40, device=device).to(variant)
    want = ops.gram(x)
    wide = torch.randn(4, 24, 80, device=device).to(variant)
    wide[..., 7:47] = x
    assert torch.equal(ops.gram(wide[..., 7:47]), want)
    assert torch.equal(ops.gram(x[::2]), want[::2])
    assert torch.equal(ops.gram(x.mT.contiguous().mT), want)
    c = symmetric(4, 24, device, variant)
    apart = torch.zeros(4, 24, 30, device=device, dtype=variant)
    apart[..., :24] = c
    assert torch.equal(ops.gram(x, apart[..., :24]), ops.gram(x, c))
    assert ops.gram(x[:0]).shape == (0, 24, 24)
    assert ops.gram(x[:, :0]).shape == (4, 0, 0)
    assert torch.equal(ops.gram(x[..., :0], c), c)


def test_it_is_a_batch_of_products(variant, device):
    """Each matrix has its own bits, whatever stands beside it."""
    x = torch.randn(5, 40, 50, device=device).to(variant)
    assert torch.equal(ops.gram(x), torch.cat([ops.gram(m[None]) for m in x]))


def test_gradients_are_plain_torchs(device):
    x = torch.randn(2, 5, 7, device=device, requires_grad=True)
    c = symmetric(2, 5, device, F32).requires_grad_()
    dy = torch.randn(2, 5, 5, device=device)
    found = torch.autograd.grad(ops.gram(x, c, alpha=0.5, beta=2.0), (x, c), dy)
    want = torch.autograd.grad(0.5 * x @ x.mT + 2.0 * c, (x, c), dy)
    for f, w in zip(found, want, strict=True):
        torch.testing.assert_close(f, w)
    x, c, dx = x.detach(), c.detach(), torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: ops.gram(x, c), (x,), (dx,))
    torch.testing.assert_close(slope, dx @ x.mT + x @ dx.mT)


def test_refusals(variant, device):
    x, c = torch.randn(2, 6, 8, device=device).to(variant), symmetric(2, 6, device, variant)
    for args in ((x[0],), (x.long(),), (x, c[:1]), (x, c.double()), (x, c[:, :5])):
        with pytest.raises(ValueError, match="must be"):
            ops.gram(*args)
    raw = getattr(torch.ops, registry.NAMESPACE[registry.forced()]).gram
    with pytest.raises((ValueError, RuntimeError), match="last dim contiguous"):
        raw(x.mT.contiguous().mT, None, 1.0, 1.0)
