"""linear_few_rows in every variant that runs here: close to fp64, and refused by name."""

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64
from close import assert_close_to_ref
from launches_in_a_row import check_without_waiting

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
SIZES = [(1, 1, 8), (3, 9, 40), (8, 33, 104), (9, 16, 64), (17, 70, 72), (64, 40, 136)]
if CUDA:
    SIZES += [(M, N, K) for M in (1, 2, 7, 8, 16, 31, 33, 64) for N, K in ((2048, 2048), (1001, 3080), (32768, 136))]
    SIZES += [(1, 24576, 4096), (4, 4096, 12288), (64, 1024, 8192), (1, 1, 57344), (5, 151936, 1024)]


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    x = torch.zeros(1, 8, dtype=BF16, device="cuda" if CUDA else "cpu")
    if reason := registry.why_not("linear_few_rows", request.param, x, x):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def inputs(M, N, K, dtype, device):
    return [torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (N,))]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_against_fp64(variant, device, M, N, K, dtype):
    x, w, b = inputs(M, N, K, dtype, device)
    for bias in (None, b):
        args = [t for t in (x, w, bias) if t is not None]
        want, torchs = (torch.nn.functional.linear(*(t.to(d) for t in args)) for d in (F64, dtype))
        assert_close_to_ref(ops.linear_few_rows(x, w, bias), want, torchs, scale=K**0.5)


def test_strides_dims_and_what_must_not_be_read(variant, device):
    x, w, b = inputs(6, 24, 40, BF16, device)
    y = ops.linear_few_rows(x, w, b)
    assert torch.equal(ops.linear_few_rows(x.view(2, 3, 40), w, b), y.view(2, 3, 24))
    assert torch.equal(ops.linear_few_rows(torch.cat((x, x * torch.nan), 1)[:, :40], w, b), y)
    wide = torch.cat((w, torch.full((24, 24), torch.nan, dtype=BF16, device=device)), 1)
    assert torch.equal(ops.linear_few_rows(x, wide[:, :40], b), y)
    below = torch.cat((w, torch.full((9, 40), torch.nan, dtype=BF16, device=device)))
    assert torch.equal(ops.linear_few_rows(x, below[:24], b), y)
    assert torch.equal(ops.linear_few_rows(x, w.t().contiguous().t(), b), y)
    assert ops.linear_few_rows(x[:0], w, b).shape == (0, 24)
    assert ops.linear_few_rows(x, w[:0]).shape == (6, 0)


def test_a_nan_spoils_its_own_row(variant, device):
    x, w, _ = inputs(7, 24, 40, BF16, device)
    y = ops.linear_few_rows(x, w)
    x[3, 5] = torch.nan
    spoilt = ops.linear_few_rows(x, w)
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[[0, 1, 2, 4, 5, 6]], y[[0, 1, 2, 4, 5, 6]])


def test_gradients_are_those_of_the_plain_layer(variant, device):
    leaves = [t.requires_grad_() for t in inputs(6, 8, 16, F32, device)]
    dy = torch.randn(6, 8, device=device)
    got = torch.autograd.grad(ops.linear_few_rows(*leaves), leaves, dy)
    want = torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, dy)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    x, w, b = (t.detach() for t in leaves)
    _, slope = torch.func.jvp(lambda x: ops.linear_few_rows(x, w, b), (x,), (x + 1,))
    torch.testing.assert_close(slope, (x + 1) @ w.mT)


def test_refusals(variant, device):
    x, w, b = inputs(6, 8, 16, BF16, device)
    for args in ((x[:, :5], w, b), (x, w.half(), b), (x, w[0], b), (x, w, b[:3]), (x.long(), w, b), (x, w, b[None])):
        with pytest.raises(ValueError, match="must be"):
            ops.linear_few_rows(*args)
    with pytest.raises(ValueError, match="no dims"):
        ops.linear_few_rows(x[0, 0], w)


def test_what_the_native_kernel_does_not_take_is_said():
    refuses = registry.OPS["linear_few_rows"].supports["native"]
    x, w = torch.zeros(64, 40, dtype=BF16), torch.zeros(8, 40, dtype=BF16)
    assert refuses(x, w, None) is None
    for args, reason in (
        ((x.float(), w.float()), "float16 and bfloat16, not torch.float32"),
        ((torch.zeros(65, 40, dtype=BF16), w), "up to 64 rows, not 65"),
        ((torch.zeros(1, 57352, dtype=BF16), torch.zeros(1, 57352, dtype=BF16)), "up to 57344 features, not 57352"),
        ((x[:, :0], w[:, :0]), "from 1 up to 57344 features, not 0"),
        ((x[:, :36], w[:, :36]), r"rows of x .* multiples of 16 bytes, not \(64, 36\)"),
        ((x[:, 1:33], w[:, :32]), "rows of x .* from element 1 on"),
        ((x[:, :32].contiguous(), w[:, 4:36]), "rows of weight .* from element 4 on"),
        ((x[:, :32].as_strided((2, 32), (44, 1)), w[:, :32].contiguous()), r"strides \(44, 1\)"),
    ):
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(refuses(*args, None))
    assert refuses(x[:1, :32].as_strided((1, 32), (44, 1)), w[:, :32], None) is None


def test_what_the_native_kernel_takes_is_found_out_while_compiling():
    refuses = registry.OPS["linear_few_rows"].supports["native"]
    x, w = torch.zeros(4, 40, dtype=BF16), torch.zeros(8, 40, dtype=BF16)
    taken = torch.compile(lambda x, w: x + (refuses(x, w) is None), fullgraph=True, backend="eager")
    assert taken(x, w).all()
    assert not taken(x[:, :36], w[:, :36]).any()


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_shapes_without_data(kind):
    x, w, b = (t.to(kind) for t in inputs(3, 8, 16, BF16, "cpu"))
    y = torch.ops.cs336_ref.linear_few_rows(x, w, b)
    assert (y.shape, y.dtype, y.device.type) == ((3, 8), BF16, kind)


def test_opcheck_and_compile(variant, device):
    x, w, b = inputs(3, 8, 16, BF16, device)
    torch.library.opcheck(registry.OPS["linear_few_rows"].overloads[variant], (x, w, b))
    with torch.no_grad():
        compiled = torch.compile(ops.linear_few_rows, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, w, b), ops.linear_few_rows(x, w, b))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("M", [1, 8, 16, 32, 64])
def test_the_same_bits_each_time_and_whatever_the_other_rows(variant, device, M):
    x, w, b = inputs(M, 4100, 2056, BF16, device)
    y = ops.linear_few_rows(x, w, b)
    for _ in range(5):
        assert torch.equal(ops.linear_few_rows(x, w, b), y)
    others = torch.cat((x[:1], torch.randn_like(x[1:]) * 100))
    assert torch.equal(ops.linear_few_rows(others, w, b)[0], y[0])
    turned = torch.arange(M, device=device).roll(1)
    assert torch.equal(ops.linear_few_rows(x[turned], w, b), y[turned])
    if variant == "native":
        assert torch.equal(ops.linear_few_rows(x[:1], w, b, constant=True)[0], y[0])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_chain_in_a_graph_on_another_stream_reads_what_was_just_written(variant, device):
    """The next kernel starts while the one before still runs: it must not read x, nor weights, too early."""
    N = 1024
    x, w = torch.randn(4, N, device=device).to(BF16), torch.randn(N, N, device=device).to(BF16) / N**0.5
    spare = torch.zeros_like(w)

    def chain(wait):
        y = x
        for step in range(20):
            torch.mul(w, 1 if step % 2 else -1, out=spare)
            wait()
            y = ops.linear_few_rows(ops.linear_few_rows(y, w, constant=True), spare)
            wait()
        return y

    check_without_waiting(chain, times=5)
