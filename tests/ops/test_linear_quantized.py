"""linear_int8, linear_int4 and linear_fp8 in every variant that runs here: against fp64 of the dequantised weights."""

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64
from close import assert_close_to_ref
from launches_in_a_row import check_without_waiting

from cs336 import ops
from cs336.inference.quantization import round_to_nearest
from cs336.ops import registry
from cs336.ops.ref.linear_quantized import dequantize_fp8, dequantize_int4, dequantize_int8, pack_int4

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
OPS = {"int8": (ops.linear_int8, dequantize_int8), "int4": (ops.linear_int4, dequantize_int4)}
OPS["fp8"] = ops.linear_fp8, dequantize_fp8
SIZES = [(1, 5, 34, 8), (17, 40, 200, 128), (3, 33, 64, 32), (2, 3, 6, 128), (0, 3, 8, 8), (5, 7, 70, 70)]
SIZES += [(64, 1000, 4096, 128), (1, 4096, 4096, 128), (300, 384, 1000, 64)] if CUDA else []
SIZES += [
    (M, 1001, K, group) for M in (1, 5, 8, 9, 16, 40) for K, group in ((1184, 128), (4096, 256), (320, 320))
] * CUDA
SIZES += [  # of both tiles of the kernel of many rows, and what hangs over them
    (M, 515, K, group)
    for M in (17, 31, 32, 33, 63, 64, 65, 100, 128, 200, 300)
    for K, group in ((128, 128), (1184, 128), (4096, 256), (320, 320))
] * CUDA
SIZES += [(64, 24576, 4096, 128), (1000, 2048, 2048, 128), (17, 151, 58368, 128), (70, 1002, 640, 64)] * CUDA


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    kind = "cuda" if CUDA else "cpu"
    if reason := registry.missing("linear_int8", request.param, torch.device(kind, 0) if CUDA else torch.device(kind)):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def skip_refused(variant, method, *args):
    if reason := registry.why_not(f"linear_{method}", variant, *args):
        pytest.skip(reason)


def inputs(M, N, K, group, dtype, device, method):
    x, w, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (N,)))
    return x, *round_to_nearest(w, method, group), b


@pytest.mark.parametrize("method", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("M", "N", "K", "group"), SIZES)
def test_against_fp64_of_the_dequantised_weights(variant, device, M, N, K, group, dtype, method):
    op, dequantize = OPS[method]
    x, q, scales, b = inputs(M, N, K, group, dtype, device, method)
    skip_refused(variant, method, x, q, scales, b, group)
    zero = torch.randint(-8, 9, scales.shape, dtype=torch.int16, device=device)
    for bias, more in ((None, {}), (b, {}), (b, {"zeros": zero} if method != "fp8" else {})):
        w = dequantize(q, scales.double(), group, **({"zeros_NG": zero} if more else {}))
        want = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
        torchs = torch.nn.functional.linear(x, w.to(dtype), bias)
        assert want.dtype == F64
        assert_close_to_ref(op(x, q, scales, bias, group=group, **more), want, torchs, scale=K**0.5)


def test_what_the_numbers_mean():
    q = torch.tensor([[-128, 0, 1, 127, 3]], dtype=torch.int8)
    scales = torch.tensor([[0.5, 2.0, 3.0]])
    assert dequantize_int8(q, scales, 2).tolist() == [[-64, 0, 2, 254, 9]]
    zeros = torch.tensor([[1, -2, 3]], dtype=torch.int16)
    assert dequantize_int8(q, scales, 2, zeros).tolist() == [[-64.5, -0.5, 6, 258, 0]]
    packed = torch.tensor([[0xF0, 0x98]], dtype=torch.uint8)
    assert dequantize_int4(packed, scales[:, :2], 2).tolist() == [[-4, 3.5, 0, 2]]


CODES = torch.arange(256)


@pytest.mark.parametrize("method", OPS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_weight_there_is_is_exact(variant, device, method, dtype):
    """The products of rows with a single 1 are the weights themselves."""
    number = CODES.to(torch.uint8)
    number = {"int8": number.view(torch.int8), "fp8": number.view(torch.float8_e4m3fn)}.get(method)
    q = (pack_int4((CODES % 16 - 8).to(torch.int8)[None]) if number is None else number[None]).expand(24, -1)
    q = q.contiguous().to(device)
    q.view(torch.uint8)[1:] = q.view(torch.uint8)[0].roll(1)
    if method == "fp8":
        q.view(torch.uint8)[(q.view(torch.uint8) & 127) == 127] = 0  # no NaN
    op, dequantize = OPS[method]
    scales = torch.full((24, 1), 0.5, device=device)
    want = dequantize(q, scales, 256)
    for first in range(0, 256, 64):
        x = torch.zeros(64, 256, dtype=dtype, device=device)
        x[torch.arange(64), torch.arange(first, first + 64)] = 1
        y = op(x, q, scales, group=256)
        assert torch.equal(y.float(), want[:, first : first + 64].t())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("M", [17, 40, 64, 200])
@pytest.mark.parametrize("method", OPS)
def test_the_same_bits_each_time_and_whatever_the_other_rows(variant, device, method, M):
    x, q, scales, b = inputs(M, 4100, 2048, 128, BF16, device, method)
    op = OPS[method][0]
    y = op(x, q, scales, b, group=128)
    for constant in (False, True) * 3:
        assert torch.equal(op(x, q, scales, b, group=128, constant=constant), y)
    others = torch.cat((x[:1], torch.randn_like(x[1:]) * 100))
    assert torch.equal(op(others, q, scales, b, group=128)[0], y[0])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("M", [4, 64, 200])
@pytest.mark.parametrize("method", OPS)
def test_a_chain_in_a_graph_on_another_stream_reads_what_was_just_written(variant, device, method, M):
    """The next kernel starts while the one before still runs: it must not read x, nor weights, too early."""
    N = 1024
    x, q, scales, _ = inputs(M, N, N, 128, BF16, device, method)
    scales = scales / N**0.5
    spare, op = torch.zeros_like(scales), OPS[method][0]

    def chain(wait):
        y = x
        for step in range(20):
            torch.mul(scales, 1 if step % 2 else -1, out=spare)
            wait()
            y = op(op(y, q, scales, group=128, constant=True), q, spare, group=128)
            wait()
        return y

    check_without_waiting(chain, times=5)


@pytest.mark.parametrize("zero", [-128, -1, 0, 127, 128])
def test_every_zero_is_exact(variant, device, zero):
    q = CODES.to(torch.uint8).view(torch.int8).expand(9, -1).contiguous().to(device)
    x = torch.zeros(2, 256, dtype=BF16, device=device)
    x[0, 0], x[1, 128] = 1, 1
    y = ops.linear_int8(
        x, q, torch.ones(9, 1, device=device), group=256, zeros=torch.full((9, 1), zero, device=device).short()
    )
    assert y.tolist() == [[-zero] * 9, [-128 - zero] * 9]


def test_what_the_native_kernels_do_not_take_is_said():
    x, q, scales, _ = inputs(3, 4, 256, 32, BF16, "cpu", "int8")
    refuses = registry.OPS["linear_int8"].supports["native"]
    assert "groups of a multiple of 64 features, or all 256, not 32" in refuses(x, q, scales, None, 32)
    assert "scales in float32, float16 and bfloat16" in refuses(x, q, scales.double(), None, 64)
    assert "float16 and bfloat16, not torch.float32" in refuses(x.float(), q, scales, None, 64)
    assert refuses(x.repeat(99, 1), q, scales, None, 64) is None
    assert "not one that is expanded" in refuses(x[:1].expand(99, -1), q, scales, None, 64)
    assert refuses(x, q, scales, None, 64) is refuses(x, q, scales, None, 300) is None
    q = inputs(3, 4, 256, 64, BF16, "cpu", "int4")[1]
    assert "a multiple of 128 features" in registry.OPS["linear_int4"].supports["native"](x, q, scales, None, 64)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_rounding_is_to_the_nearest(method):
    half = {"int8": 127.5, "int4": 7.5}[method]
    w = torch.randn(9, 50)
    w[3, 16:32] = 0
    q, scales = round_to_nearest(w, method, 16)
    assert scales.shape == (9, 4)
    off = (OPS[method][1](q, scales, 16) - w).abs()
    step = (torch.nn.functional.pad(w, (0, 14)).view(9, 4, 16).abs().amax(-1) / half).repeat_interleave(16, 1)[:, :50]
    assert (off <= step / 2 * 1.0001).all()
    assert off[3, 16:32].max() == 0


@pytest.mark.parametrize("method", OPS)
def test_gradients_and_dims(variant, device, method):
    if variant == "native":
        pytest.skip("the native kernels take no float32")
    op, dequantize = OPS[method]
    x, q, scales, b = inputs(6, 5, 12, 4, F32, device, method)
    x, b = x.view(2, 3, 12).requires_grad_(), b.requires_grad_()
    want = torch.nn.functional.linear(x, dequantize(q, scales, 4), b)
    y = op(x, q, scales, b, group=4)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, (x, b), dy), torch.autograd.grad(want, (x, b), dy), strict=True):
        torch.testing.assert_close(got, expected)


def test_refuses_what_does_not_fit(variant, device):
    x, q, scales, b = inputs(3, 4, 16, 8, F32, device, "int8")
    _, packed, _, _ = inputs(3, 4, 16, 8, F32, device, "int4")
    for op, args, message in (
        (ops.linear_int8, (x, packed, scales), r"weight must be \(N, K\) torch.int8"),
        (ops.linear_int4, (x, q, scales), r"weight must be \(N, K / 2\) torch.uint8"),
        (ops.linear_int8, (x[:, :8], q, scales), "weight must be"),
        (ops.linear_int8, (x, q, scales[:, :1]), r"scales must be \(4, 2\)"),
        (ops.linear_int8, (x, q, scales.int()), "scales must be"),
        (ops.linear_int8, (x, q, scales, b[:3]), "bias must be"),
        (ops.linear_int8, (x, q, scales, b.double()), "bias must be"),
        (ops.linear_int8, (x.int(), q, scales), "x must be"),
        (ops.linear_int8, (x, q.t().contiguous().t(), scales), "weight must be contiguous"),
        (ops.linear_fp8, (x, q, scales), r"weight must be \(N, K\) torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*args, group=8)
    with pytest.raises(ValueError, match=r"zeros must be int16 and as scales, \(4, 2\), got \(4, 1\)"):
        ops.linear_int8(x, q, scales, group=8, zeros=torch.zeros(4, 1, dtype=torch.int16, device=device))
    with pytest.raises(ValueError, match="group is even, got 3"):
        ops.linear_int4(x, packed, scales, group=3)
    with pytest.raises(ValueError, match="group must be 1 or more"):
        ops.linear_int8(x, q, scales, group=0)
    with pytest.raises(ValueError, match="group must be 1 or more"):
        ops.linear_fp8(x, q.to(torch.float8_e4m3fn), torch.ones(4, 16, device=device), group=0)


@pytest.mark.parametrize("method", OPS)
def test_op_is_registered_as_torch_wants_it(method):
    x, q, scales, b = inputs(3, 4, 16, 8, F32, "cpu", method)
    if method != "fp8":  # opcheck adds up its inputs, which torch does not do in fp8
        torch.library.opcheck(getattr(torch.ops.cs336_ref, f"linear_{method}").default, (x, q, scales, b, 8))
    op = OPS[method][0]
    compiled = torch.compile(lambda x: op(x, q, scales, b, group=8), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), op(x, q, scales, b, group=8))
