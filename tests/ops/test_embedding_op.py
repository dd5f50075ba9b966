import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


SHAPES = [(1, 1, 1), (64, 5, 8), (65, 70, 3), (200, 11, 33)] + ([(5000, 999, 1500)] if CUDA else [])


@pytest.fixture(params=["triton", "ref"])
def variant(request, device):
    args = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device), 3
    if reason := registry.why_not("embedding_bwd", request.param, *args):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


IDS = {
    "mixed": lambda N, V: torch.randint(0, V, (N,)),
    "one id": lambda N, V: torch.full((N,), V - 1),
    "two ids": lambda N, V: (torch.arange(N) * 3 >= N).long() * (V - 1),  # runs over many parts, and a border between
    "all different": lambda N, V: torch.arange(N) % V,
}


@pytest.mark.parametrize("how", IDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("N", "V", "D"), [(1, 1, 1), (64, 5, 8), (65, 70, 3), (200, 11, 33), *([(5000, 999, 1500)] if CUDA else [])]
)
def test_against_fp64(variant, device, N, V, D, dtype, how):
    ids = IDS[how](N, V).to(device)
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    y = ops.embedding(ids, weight)
    assert torch.equal(y, weight[ids])
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, weight, dy)[0]

    def plain(dtype):  # one after the other, in their order
        total = torch.zeros(V, D, dtype=dtype, device=device)
        return total.index_add_(0, ids, dy.to(dtype))

    assert_close_to_ref(got, plain(F64), plain(F32).to(dtype))


def test_the_same_bits_twice(variant, device):
    if variant == "ref" and device == "cuda":
        pytest.skip("plain torch does not promise it")
    weight, ids = torch.randn(7, 40, device=device, requires_grad=True), torch.randint(0, 7, (500,), device=device)
    dy = torch.randn(500, 40, device=device)
    grads = [torch.autograd.grad(ops.embedding(ids, weight), weight, dy)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_layouts_and_dtypes_of_ids(variant, device):
    weight, ids = torch.randn(9, 6, device=device, requires_grad=True), torch.randint(0, 9, (4, 5), device=device)
    dy = torch.randn(5, 4, 6, device=device).transpose(0, 1)
    want = torch.autograd.grad(F.embedding(ids, weight), weight, dy)[0]
    for given in (ids, ids.int(), ids.T.contiguous().T):
        torch.testing.assert_close(torch.autograd.grad(ops.embedding(given, weight), weight, dy)[0], want)


def test_second_derivative(variant, device):
    weight, ids = torch.randn(5, 4, device=device, requires_grad=True), torch.tensor([0, 3, 3], device=device)
    (g,) = torch.autograd.grad(ops.embedding(ids, weight).pow(3).sum(), weight, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), weight)
    times = torch.tensor([1.0, 0, 0, 2, 0], device=device)[:, None]
    torch.testing.assert_close(h, 6 * times * weight.detach())


def test_no_ids_and_no_gradient(variant, device):
    weight = torch.randn(5, 4, device=device, requires_grad=True)
    y = ops.embedding(torch.zeros(0, 2, dtype=torch.long, device=device), weight)
    assert y.shape == (0, 2, 4)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()
    assert not ops.embedding(torch.zeros(2, dtype=torch.long, device=device), weight.detach()).requires_grad


def test_compiles_whole(variant, device):
    torch.compiler.reset()
    weight, ids = torch.randn(5, 4, device=device, requires_grad=True), torch.tensor([0, 3, 3], device=device)
    compiled = torch.compile(ops.embedding, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(ids, weight).square().sum(), weight)[0] for f in (compiled, ops.embedding)]
    torch.testing.assert_close(*grads)


def test_ids_outside_the_table_write_nowhere(variant, device):
    if variant == "ref":
        pytest.skip("plain torch refuses them")
    dy, ids = torch.randn(6, 4, device=device), torch.tensor([1, -2, 3, 1, 2**40, -(2**40)], device=device)
    want = torch.zeros(3, 4, device=device)
    want[1] = dy[0] + dy[3]
    torch.testing.assert_close(registry.OPS["embedding_bwd"].overloads[variant](dy, ids, 3), want)


def test_raw_op(variant, device):
    dy, ids = torch.randn(3, 4, device=device), torch.tensor([1, 0, 1], device=device)
    overload = registry.OPS["embedding_bwd"].overloads[variant]
    torch.library.opcheck(overload, (dy, ids, 2), test_utils=("test_schema", "test_faketensor"))
    other = "cpu" if device == "cuda" else "meta"
    for bad in (
        (dy[0], ids, 2),
        (dy.int(), ids, 2),
        (dy, ids[:2], 2),
        (dy, ids.int(), 2),
        (dy, ids.to(other), 2),
        (dy, ids, 0),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            overload(*bad)


def test_bad_arguments():
    ids, weight = torch.tensor([0, 1]), torch.zeros(3, 4)
    for args, error, message in (
        ((ids.float(), weight), ValueError, "ids must be int64 or int32"),
        ((ids, weight[0]), ValueError, r"weight must be \(V, D\)"),
        ((ids, weight.long()), ValueError, "floating point"),
        ((ids + 2, weight), IndexError, "out of range"),
    ):
        with pytest.raises(error, match=message):
            ops.embedding(*args)
