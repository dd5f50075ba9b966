"""linear_normed and linear_swiglu in every variant that runs here: close to fp64, as the launches they stand for."""

import pytest
import torch
import torch.nn.functional as F
from attentions import BF16, CUDA, F16, F64
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry
from cs336.ops.linear_fused import pays_fused

SIZES = [(1, 1, 8), (3, 9, 40), (8, 33, 104), (5, 24, 72)]
if CUDA:
    SIZES += [(M, N, K) for M in (1, 2, 3, 7, 8) for N, K in ((3072, 2048), (1001, 3080), (16384, 136))]
    SIZES += [(1, 24576, 4096), (4, 4096, 12288), (8, 6144, 4096), (1, 9, 32768), (1, 2048, 8192)]


@pytest.fixture(params=["native", "ref"])
def variant(request):
    x = torch.zeros(1, 8, dtype=BF16, device="cuda" if CUDA else "cpu")
    if reason := registry.why_not("linear_swiglu", request.param, x, x, x):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def inputs(M, N, K, dtype, device):
    return [torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (M, K), (K,), (N, K))]


def normed(x, residual, norm, w, dtype, rounded):
    """rounded: what stands between, as x is."""
    total = (x.to(dtype) + residual.to(dtype)).to(rounded)
    y = F.rms_norm(total.to(dtype), norm.shape, norm.to(dtype), 1e-5)
    return F.linear(y, w.to(dtype)), total


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_normed_against_fp64(variant, device, M, N, K, dtype):
    args = inputs(M, N, K, dtype, device)
    y, total = ops.linear_normed(*args)
    (want, _), (torchs, sums) = (normed(*args, d, dtype) for d in (F64, dtype))
    assert torch.equal(total, sums)
    assert_close_to_ref(y, want, torchs, scale=K**0.5)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_swiglu_against_fp64(variant, device, M, N, K, dtype):
    gate, up, _, w = inputs(M, N, K, dtype, device)
    want, torchs = (F.linear(F.silu(gate.to(d)) * up.to(d), w.to(d)) for d in (F64, dtype))
    assert_close_to_ref(ops.linear_swiglu(gate, up, w), want, torchs, scale=K**0.5)


def test_strides_dims_and_rows_alone(variant, device):
    x, residual, norm, w = inputs(6, 24, 40, BF16, device)
    y, total = ops.linear_normed(x, residual, norm, w)
    for a, b in zip(ops.linear_normed(x.view(2, 3, 40), residual.view(2, 3, 40), norm, w), (y, total), strict=True):
        assert torch.equal(a, b.view(2, 3, -1))
    both = torch.cat((x, residual), 1)
    assert all(map(torch.equal, ops.linear_normed(*both.split(40, 1), norm, w), (y, total)))
    gated = ops.linear_swiglu(x, residual, w)
    assert torch.equal(ops.linear_swiglu(*both.split(40, 1), w), gated)
    assert ops.linear_swiglu(x[:0], residual[:0], w).shape == (0, 24)
    if variant == "native":  # of one plan, whatever the other rows are
        assert torch.equal(ops.linear_swiglu(x[4:5], residual[4:5], w)[0], gated[4])
        assert torch.equal(ops.linear_normed(x, residual, norm, w, constant=True)[0], y)


def test_a_nan_spoils_its_own_row(variant, device):
    x, residual, norm, w = inputs(7, 24, 40, BF16, device)
    for call in (lambda: ops.linear_normed(x, residual, norm, w)[0], lambda: ops.linear_swiglu(x, residual, w)):
        before = call()
        kept, x[3, 5] = x[3, 5].item(), torch.nan
        after = call()
        assert after[3].isnan().all()
        assert torch.equal(after[[0, 1, 2, 4, 5, 6]], before[[0, 1, 2, 4, 5, 6]])
        x[3, 5] = kept


def test_refusals(variant, device):
    x, residual, norm, w = inputs(6, 8, 16, BF16, device)
    for args in (
        (x[:, :8], residual, norm, w),
        (x, residual[:3], norm, w),
        (x, residual.half(), norm, w),
        (x, residual, norm[:8], w),
        (x, residual, norm.float(), w),
        (x, residual, norm, w[:, :8]),
        (x, residual, norm, w, -1.0),
        (x, residual, norm, w, torch.nan),
    ):
        with pytest.raises(ValueError, match=r"must (be|not be)"):
            ops.linear_normed(*args)
    for args in ((x[:, :8], residual, w), (x, residual.half(), w), (x, residual, w[:, :8]), (x, residual, w.half())):
        with pytest.raises(ValueError, match="must be"):
            ops.linear_swiglu(*args)


def test_what_the_native_kernel_does_not_take_is_said():
    refuses = registry.OPS["linear_swiglu"].supports["native"]
    x, w = torch.zeros(9, 40, dtype=BF16), torch.zeros(8, 40, dtype=BF16)
    assert refuses(x[:8], x[:8], w) is None
    assert "up to 8 rows, not 9" in refuses(x, x, w)
    assert "multiples of 16 bytes" in refuses(x[:4, :32].contiguous(), x[:4, 1:33], w[:, :32])
    assert not pays_fused(x[:8], x[:8], w)  # on a CPU


def test_opcheck_and_compile(variant, device):
    x, residual, norm, w = inputs(3, 8, 16, BF16, device)
    torch.library.opcheck(registry.OPS["linear_normed"].overloads[variant], (x, residual, norm, 1e-5, w))
    torch.library.opcheck(registry.OPS["linear_swiglu"].overloads[variant], (x, residual, w))
    compiled = torch.compile(ops.linear_swiglu, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, residual, w), ops.linear_swiglu(x, residual, w))
