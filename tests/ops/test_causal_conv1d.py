"""The kernels of the short convolution against its definition in float64; more of it in test_convolutions.py."""

import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry
from cs336.ops.ref import causal_conv1d as ref

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [  # (B, S, C), K, dtype, bias, segments
    ((2, 1, 1), 4, F32, True, False),
    ((1, 3, 5), 7, F32, False, False),
    ((2, 130, 19), 4, F32, True, True),
    ((1, 64, 16), 2, BF16, True, False),
    ((2, 67, 33), 4, F16, False, True),
]
if torch.cuda.is_available():
    CASES += [((3, 1000, 3072), 4, dtype, bias, True) for dtype in (F32, BF16) for bias in (False, True)]


def inputs(shape, K, dtype, bias, segments, device):
    B, S, C = shape
    x = torch.randn(B, S, C + 3, device=device).to(dtype)[..., :C]  # rows apart, as a split leaves them
    weight, b = torch.randn(C, K, device=device).to(dtype), torch.randn(C, device=device) if bias else None
    some = torch.randint(0, 1 + S // 8, (B, S), device=device).sort(-1).values if segments else None
    return x, weight, b, some


@pytest.mark.parametrize(("shape", "K", "dtype", "bias", "segments"), CASES)
def test_kernels_against_fp64(device, shape, K, dtype, bias, segments):
    x, weight, b, some = inputs(shape, K, dtype, bias, segments, device)
    if reason := registry.why_not("causal_conv1d_fwd", "triton", x, weight, b, some):
        pytest.skip(reason)
    dy = torch.randn_like(x)

    def run(dtype):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, b) if t is not None]
        y = ops.causal_conv1d(*leaves[:2], leaves[2] if bias else None, some)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    with registry.use("triton"):
        got = run(None)
    with registry.use("ref"):
        want, torchs = run(torch.float64), run(None)
    for ours, wide, torchs_own in zip(got, want, torchs, strict=True):
        assert ours.dtype == torchs_own.dtype
        assert_close_to_ref(ours, wide, torchs_own, scale=wide.square().mean().sqrt().item())


@pytest.mark.parametrize("variant", ["triton", "ref"])
@pytest.mark.parametrize("shape", [(2, 9, 6), (0, 9, 6), (2, 0, 6)])
def test_raw_ops(device, variant, shape):
    x, weight, bias, segments = inputs(shape, 4, F32, True, True, device)
    if reason := registry.why_not("causal_conv1d_fwd", variant, x, weight, bias, segments):
        pytest.skip(reason)
    dy = torch.randn(shape, device=device)
    for name, args in (("fwd", (x, weight, bias, segments)), ("bwd", (dy, x, weight, segments))):
        overload = registry.OPS[f"causal_conv1d_{name}"].overloads[variant]
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


def test_no_nan_leaks_into_another_document(device):
    x, dy = torch.randn(1, 9, 3, device=device), torch.randn(1, 9, 3, device=device)
    x[:, 0] = dy[:, 0] = torch.nan
    weight, segments = torch.randn(3, 4, device=device), torch.tensor([[0] + [1] * 8], device=device)
    if reason := registry.why_not("causal_conv1d_fwd", "triton", x, weight, None, segments):
        pytest.skip(reason)
    leaves = [x[:, 1:].clone().requires_grad_(), weight.clone().requires_grad_()]
    with registry.use("ref"):
        want = ops.causal_conv1d(*leaves)
        dx, dtaps = torch.autograd.grad(want, leaves, dy[:, 1:])
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    with registry.use("triton"):
        got = ops.causal_conv1d(*leaves, None, segments)
        found, taps = torch.autograd.grad(got, leaves, dy)
    torch.testing.assert_close((got[:, 1:], found[:, 1:]), (want, dx))
    torch.testing.assert_close(taps[:, :-1], dtaps[:, :-1])  # the last meets each token itself


@pytest.mark.parametrize("variant", ["triton", "ref"])
def test_a_bias_with_gaps(device, variant):
    x, weight, bias, _ = inputs((2, 9, 6), 4, F32, True, False, device)
    if reason := registry.why_not("causal_conv1d_fwd", variant, x, weight, bias, None):
        pytest.skip(reason)
    apart = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
    with registry.use(variant):
        assert torch.equal(ops.causal_conv1d(x, weight, apart), ops.causal_conv1d(x, weight, bias))


def test_its_gradient_can_be_differentiated_again(device):
    x, weight = torch.randn(1, 5, 2, device=device).double().requires_grad_(), torch.randn(2, 3, device=device).double()
    torch.autograd.gradgradcheck(lambda x, w: ops.causal_conv1d(x, w), (x, weight.requires_grad_()))


def test_compiles_into_one_graph(device):
    x, weight = torch.randn(2, 40, 8, device=device, requires_grad=True), torch.randn(8, 4, device=device)
    want = torch.autograd.grad(ops.causal_conv1d(x, weight).square().sum(), x)
    compiled = torch.compile(ops.causal_conv1d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight).square().sum(), x), want)


def test_what_the_raw_ops_refuse(device):
    x, weight, bias, _ = inputs((2, 9, 6), 4, F32, True, False, device)
    fwd, bwd = (registry.OPS[f"causal_conv1d_{name}"].overloads["ref"] for name in ("fwd", "bwd"))
    for args, message in (
        ((x.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, None), "x must have its last dim contiguous"),
        ((x, weight.T.contiguous().T, bias, None), "weight must be contiguous"),
        ((x, weight, torch.zeros(6, 2, device=device)[:, 0], None), "bias must have"),
        ((x, weight, bias, torch.zeros(2, 9)), "segments must be integers on"),
        ((x, weight.long(), bias, None), "weight must be floating point on"),
    ):
        with pytest.raises(ValueError, match=message):
            fwd(*args)
    with pytest.raises(ValueError, match=r"dy must be like x, \(2, 9, 6\) torch.float32"):
        bwd(x[:, 1:], x, weight, None)
    wide = torch.zeros(1, 3, 2, device=device), torch.zeros(2, 17, device=device)
    with registry.use("triton"), pytest.raises(NotImplementedError, match=r"up to 16 taps, not 17|interpret it"):
        ops.causal_conv1d(*wide)
    assert torch.equal(ops.causal_conv1d(*wide), wide[0])
    assert ref.fwd(*wide, None, None).shape == (1, 3, 2)


def test_segments_alone_are_batched():
    x, weight, bias, _ = inputs((2, 7, 6), 4, F32, True, False, torch.device("cpu"))
    many = torch.randint(0, 2, (3, 2, 7)).sort(-1).values
    got = torch.vmap(lambda segments: ops.causal_conv1d(x, weight, bias, segments))(many)
    assert torch.equal(got, torch.stack([ops.causal_conv1d(x, weight, bias, segments) for segments in many]))
