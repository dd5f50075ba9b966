import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry
from cs336.ops.ref import dropout as ref

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    x, seed = torch.zeros(2, device=device), torch.zeros((), dtype=torch.long, device=device)
    if reason := registry.why_not("dropout_fwd", request.param, x, None, seed, 0.5):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


@pytest.fixture
def seed(device):
    return torch.tensor(0x123456789ABCDEF, device=device)


def test_words_are_philox():
    """The known answers of Random123, for a counter of zeros and a key of zeros."""
    want = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ref.words(5, torch.tensor(0)).tolist()[:4] == want


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(3, 257), (0,), (), (5,), (4, 24), *([(3000, 1111)] if CUDA else [])])
def test_every_variant_drops_the_same(variant, device, seed, shape, dtype, p):
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    y = ops.dropout(leaves[0], p, residual=leaves[1], seed=seed)
    dy = torch.randn_like(y)
    got = y, *torch.autograd.grad(y, leaves, dy)
    kept = ref.words(x.numel(), seed).view(x.shape) >= round(p * 2**32)

    def plain(dtype):
        return torch.where(kept, x.to(dtype) / (1 - p), 0) + residual.to(dtype), torch.where(
            kept, dy.to(dtype) / (1 - p), 0
        )

    for ours, want, torchs in zip(got, plain(F64), plain(dtype), strict=False):
        assert_close_to_ref(ours, want, torchs)
    assert torch.equal(got[2], dy)
    assert torch.equal(ops.dropout(x, p, seed=seed) == 0, ~kept | (x == 0))


@pytest.mark.parametrize("layout", ["unaligned", "transposed"])
def test_layouts(variant, device, seed, layout):
    x = torch.randn(6, 33, device=device)
    laid = F.pad(x.reshape(-1), (1, 0))[1:].view(6, 33) if layout == "unaligned" else x.T.contiguous().T
    assert torch.equal(ops.dropout(laid, 0.3, seed=seed), ops.dropout(x, 0.3, seed=seed))


def test_share_and_independence(variant, device):
    x = torch.ones(20000, device=device)
    masks = [ops.dropout(x, 0.25, seed=torch.tensor(s, device=device)) != 0 for s in (1, 2, 2**40 + 1)]
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.75, abs=0.02)
    for a, b in ((0, 1), (0, 2)):  # both halves of the seed count
        assert (masks[a] & masks[b]).float().mean().item() == pytest.approx(0.75**2, abs=0.02)


def test_the_generator_seeds_it(variant, device):
    def draw():
        torch.manual_seed(3)
        return ops.dropout(torch.ones(100, device=device), 0.5), ops.dropout(torch.ones(100, device=device), 0.5)

    first, second = draw(), draw()
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])


def test_ends_of_p_and_evaluation(variant, device, seed):
    x, residual = torch.randn(2, 40, device=device)
    assert torch.equal(ops.dropout(x, 0.5, training=False, seed=seed), x)
    assert torch.equal(ops.dropout(x, 0.0, residual=residual), x + residual)
    assert torch.equal(ops.dropout(x, 1.0), torch.zeros_like(x))


def test_second_derivative(variant, device, seed):
    x = torch.randn(40, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(ops.dropout(x, 0.5, seed=seed).pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    kept = ops.dropout(torch.ones_like(x), 0.5, seed=seed)
    torch.testing.assert_close(h, 6 * kept**3 * x)


def test_compiles_whole(variant, device, seed):
    torch.compiler.reset()
    x = torch.randn(4, 24, device=device, requires_grad=True)
    f = lambda x: ops.dropout(x, 0.5, residual=2 * x, seed=seed)  # noqa: E731
    outs = [g(x) for g in (torch.compile(f, backend="inductor" if CUDA else "aot_eager", fullgraph=True), f)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in outs))


def test_raw_op(variant, device, seed):
    x = torch.randn(3, 6, device=device)
    overload = registry.OPS["dropout_fwd"].overloads[variant]
    torch.library.opcheck(overload, (x, x.clone(), seed, 0.5), test_utils=("test_schema", "test_faketensor"))
    for bad in (
        (x.int(), None, seed, 0.5),
        (x.T, None, seed, 0.5),
        (x, x[:2], seed, 0.5),
        (x, x.half(), seed, 0.5),
        (x, None, seed.int(), 0.5),
        (x, None, seed.expand(2), 0.5),
        (x, None, seed.to("cpu" if device == "cuda" else "meta"), 0.5),
        (x, None, seed, 1.0),
        (x, None, seed, -0.1),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            overload(*bad)


def test_bad_arguments():
    x = torch.zeros(3)
    for args, options, message in (
        ((x, 1.5), {}, r"p must be in \[0, 1\], got 1.5"),
        ((x.long(),), {}, "x must be floating point"),
        ((x,), {"residual": x[:2]}, "residual must be like x"),
        ((x,), {"seed": torch.tensor(1.0)}, "seed must be one int64"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.dropout(*args, **options)


def test_a_compiled_one_has_its_gradient(device):
    x, seed = torch.randn(5, 8, device=device, requires_grad=True), torch.tensor(3, device=device)
    (want,) = torch.autograd.grad(ops.dropout(x, 0.5, seed=seed).sum(), x)
    compiled = torch.compile(lambda x: ops.dropout(x, 0.5, seed=seed).sum(), backend="aot_eager", fullgraph=True)
    assert want.any()
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], want)
