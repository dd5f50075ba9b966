import pytest
import torch

from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=registry.NAMESPACE)
def scale_(request, device):
    args = torch.zeros(1, device=device), None, torch.ones((), device=device)
    if reason := registry.why_not("scale_", request.param, *args):
        pytest.skip(reason)
    with registry.use(request.param):
        yield lambda *args: registry.call("scale_", *args)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (8, 64), *([(1000, 4099)] if CUDA else [])])
@pytest.mark.parametrize(("x_dtype", "dtype"), [(F32, F32), (BF16, BF16), (F32, BF16), (F32, F16), (F16, F32)])
def test_is_rounded_once(scale_, device, shape, x_dtype, dtype):
    x, scale = torch.randn(shape, device=device).to(x_dtype), torch.tensor(0.3, device=device)
    out = torch.full(shape, torch.nan, device=device, dtype=dtype)
    scale_(out, x, scale)
    assert torch.equal(out, (x.float() * scale).to(dtype))
    if x_dtype == dtype:
        version = x._version
        scale_(x, None, scale)
        assert torch.equal(x, out)
        assert x._version > version


@pytest.mark.parametrize(("dtype", "bits"), [(F32, torch.int32), (BF16, torch.int16)])
def test_one_changes_nothing(scale_, device, dtype, bits):
    x = torch.tensor([1.0, torch.nan, -torch.nan, -torch.inf, -0.0], device=device, dtype=dtype)
    x.view(bits)[2] -= 2  # a NaN that no multiplication makes
    before = x.clone()
    scale_(x, None, torch.ones((), device=device))
    assert torch.equal(x.view(bits), before.view(bits))


def test_unaligned(scale_, device):
    x = torch.randn(65, device=device)
    out = torch.zeros(65, device=device)
    scale_(out[1:], x[1:], torch.tensor(2.0, device=device))
    assert torch.equal(out[1:], 2 * x[1:])
    assert out[0] == 0


def test_refuses(scale_, device):
    x, one = torch.zeros(3, 4, device=device), torch.ones((), device=device)
    for bad in ((x.T, None, one), (x, x[:2], one), (x, x.int(), one), (x, None, one.expand(2)), (x, None, one.half())):
        with pytest.raises((ValueError, RuntimeError)):
            scale_(*bad)
