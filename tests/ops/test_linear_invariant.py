"""linear_invariant in every variant that runs here: close to fp64, and a row's bits whatever the batch."""

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
SIZES = [(1, 1, 1), (5, 7, 3), (33, 40, 70), (5, 3, 600)]
SIZES += [(1000, 384, 4096), (65, 4096, 1000), (1, 1024, 4097)] if CUDA else []


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    if reason := registry.why_not(
        "linear_invariant", request.param, torch.zeros(1, 1, device="cuda" if CUDA else "cpu")
    ):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def inputs(M, N, K, dtype, device):
    return [torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (N,))]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_against_fp64(variant, device, M, N, K, dtype):
    x, w, b = inputs(M, N, K, dtype, device)
    for bias in (None, b):
        args = [t for t in (x, w, bias) if t is not None]
        want, torchs = (torch.nn.functional.linear(*(t.to(d) for t in args)) for d in (F64, dtype))
        assert_close_to_ref(ops.linear_invariant(x, w, bias), want, torchs, scale=K**0.5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("N", "K"), [(17, 70)] + ([(4096, 4096), (1000, 14336)] if CUDA else []))
def test_a_row_has_the_same_bits_in_any_batch(variant, device, fixed_order, N, K, dtype):
    M = 1000 if CUDA else 24
    x, w, b = inputs(M, N, K, dtype, device)
    whole = ops.linear_invariant(x, w, b)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 19), slice(M - 1, M), slice(0, 64), slice(5, 70), slice(0, 257)):
        assert torch.equal(ops.linear_invariant(x[rows], w, b), whole[rows])
    order = torch.randperm(M, device=device)
    assert torch.equal(ops.linear_invariant(x[order], w, b), whole[order])
    others = x.clone()
    others[1:] = torch.randn_like(others[1:]) * 100
    assert torch.equal(ops.linear_invariant(others, w, b)[0], whole[0])


def test_any_number_of_dims_and_strides(variant, device):
    x, w, b = inputs(6, 8, 12, F32, device)
    y = ops.linear_invariant(x, w, b)
    assert torch.equal(ops.linear_invariant(x.view(2, 3, 12), w, b), y.view(2, 3, 8))
    assert torch.equal(ops.linear_invariant(x[0], w, b), y[0])
    assert torch.equal(ops.linear_invariant(x, w.t().contiguous().t(), b), y)
    assert torch.equal(ops.linear_invariant(torch.cat((x, x), 1)[:, :12], w, b), y)
    assert ops.linear_invariant(x[:0], w, b).shape == (0, 8)


def test_gradients(variant, device):
    leaves = [t.requires_grad_() for t in inputs(6, 8, 12, F32, device)]
    dy = torch.randn(6, 8, device=device)
    got = torch.autograd.grad(ops.linear_invariant(*leaves), leaves, dy)
    want = torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, dy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    frozen = [t.detach() for t in leaves]
    (dx,) = torch.autograd.grad(ops.linear_invariant(leaves[0], *frozen[1:]).sum(), leaves[:1])
    torch.testing.assert_close(dx, frozen[1].sum(0).expand(6, 12))


def test_refusals(variant, device):
    x, w, b = inputs(6, 8, 12, F32, device)
    for args in ((x[:, :5], w, b), (x, w.double(), b), (x, w[0], b), (x, w, b[:3]), (x.long(), w, b), (x, w, b[None])):
        with pytest.raises(ValueError, match="must be"):
            ops.linear_invariant(*args)


def test_opcheck_and_compile(device):
    x, w, b = inputs(6, 8, 12, F32, device)
    torch.library.opcheck(torch.ops.cs336_ref.linear_invariant, (x, w, b))
    compiled = torch.compile(ops.linear_invariant, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w, b), ops.linear_invariant(x, w, b))
