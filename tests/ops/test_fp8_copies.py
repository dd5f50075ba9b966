"""fp8_copies in every variant that runs here: the nearest floats of 8 bits, twice, and their scale."""

import math

import pytest
import torch
from attentions import BF16, CUDA, F16, F32

from cs336 import ops
from cs336.ops import registry

FORMATS = {False: torch.float8_e4m3fn, True: torch.float8_e5m2}
SIZES = [(16, 16), (32, 48), (128, 16), (144, 272)]
SIZES += [(1008, 1600), (4096, 8208)] if CUDA else []


@pytest.fixture(params=list(registry.NAMESPACE), ids=str)
def variant(request, device):
    if reason := registry.why_not("fp8_copies", request.param, torch.zeros(16, 16, device=device), False):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def numbers(gradient):
    """All finite ones of a format."""
    found = torch.arange(256, dtype=torch.uint8).view(FORMATS[gradient]).double()
    return found[found.isfinite()].unique()


def nearest(x, gradient):
    """Of float64 x: the nearest number, of two the one whose last bit is 0."""
    grid = numbers(gradient)
    right = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    low, high = grid[right - 1], grid[right]
    even = high.to(FORMATS[gradient]).view(torch.uint8) % 2 == 0
    up = (x - low > high - x) | ((x - low == high - x) & even)
    return torch.where(up, high, low)


@pytest.mark.parametrize("gradient", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SIZES)
def test_nearest_and_turned(variant, device, shape, dtype, gradient):
    x = (torch.randn(shape, device=device) * 10.0 ** torch.randint(-4, 2, shape, device=device)).to(dtype)
    rounded, turned, scale = ops.fp8_copies(x, gradient=gradient)
    most = torch.finfo(FORMATS[gradient]).max
    assert rounded.dtype == turned.dtype == FORMATS[gradient]
    assert rounded.is_contiguous()
    assert turned.is_contiguous()
    assert torch.equal(turned.float(), rounded.float().t())
    largest = x.abs().max().item()
    assert scale.item() == pytest.approx(largest / most, rel=1e-7)
    assert rounded.float().abs().max().item() == most
    factor = torch.tensor(most, dtype=F32) / torch.tensor(largest, dtype=F32)
    assert torch.equal(rounded.cpu().double(), nearest((x.cpu().float() * factor).double(), gradient))


@pytest.mark.parametrize("gradient", FORMATS)
def test_every_number_and_what_lies_between(variant, device, gradient):
    grid = numbers(gradient)
    x = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).float()
    x = torch.nn.functional.pad(x, (0, -len(x) % 16)).expand(16, -1).contiguous()
    found = ops.fp8_copies(x.to(device), gradient=gradient)[0]
    assert torch.equal(found.cpu().double(), nearest(x.double(), gradient))


def test_zeros_and_what_is_not_finite(variant, device):
    x = torch.zeros(32, 16, device=device)
    rounded, _, scale = ops.fp8_copies(x)
    assert not rounded.float().any()
    assert 0 < scale.item() < 1e-10
    for bad in (math.nan, math.inf, -math.inf):
        x[3, 5] = bad
        rounded, turned, scale = ops.fp8_copies(x)
        assert (rounded.float() * scale).isnan().any()
        assert torch.equal(turned.float().isnan(), rounded.float().isnan().t())


def test_any_shape_and_stride(device):
    """Where a native kernel takes none, the definition does."""
    for shape in [(1, 1), (33, 65), (0, 16), (16, 0)]:
        rounded, turned, scale = ops.fp8_copies(torch.randn(shape, device=device))
        assert rounded.shape == shape
        assert turned.shape == shape[::-1]
        assert scale.shape == ()
    x = torch.randn(64, 96, device=device)
    for view in (x.t(), x[::2], x[:, :32], x.flatten()[1:1025].view(32, 32)):
        got, want = ops.fp8_copies(view), ops.fp8_copies(view.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))


def test_bad_input(device):
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        ops.fp8_copies(torch.randn(2, 3, 4, device=device))
    with pytest.raises(TypeError, match="int64"):
        ops.fp8_copies(torch.ones(16, 16, device=device, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        torch.ops.cs336_ref.fp8_copies(torch.randn(16, 32, device=device).t(), False)


def test_opcheck(variant, device):
    op = getattr(torch.ops, registry.NAMESPACE[variant]).fp8_copies.default
    torch.library.opcheck(op, (torch.randn(16, 32, device=device), True))
