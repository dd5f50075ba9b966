import math

import pytest
import torch

from cs336.optim import AdamW, clip_grad_norm_, clip_scale, grad_norm

SHAPES = [(), (0,), (7,), (4096,), (3, 4099), (5, 6, 7)]


def params_with_grads(device, dtype=torch.float32, size=1.0):
    params = [torch.zeros(s, dtype=dtype, device=device) for s in SHAPES]
    for p in params:
        p.grad = (size * torch.randn(p.shape, device=device)).to(dtype)
    return [*params, torch.zeros(3, device=device)]  # the last one has no gradient


def norm64(params):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params if p.grad is not None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_grad_norm(device, dtype):
    params = params_with_grads(device, dtype)
    norm = grad_norm(params)
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.device.type == device
    assert norm.item() == pytest.approx(norm64(params), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_grad_norm_of_mixed_dtypes(device):
    params = [p for dtype in (torch.float32, torch.bfloat16, torch.float16) for p in params_with_grads(device, dtype)]
    assert grad_norm(iter(params)).item() == pytest.approx(norm64(params), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_norm_of_a_large_tensor(device, dtype):
    """One running fp32 sum would be 1 % off here."""
    p = torch.zeros(1 << 25, dtype=dtype, device=device)
    p.grad = torch.full_like(p, 0.1)
    assert grad_norm(p).item() == pytest.approx(p.grad[0].item() * math.sqrt(p.numel()), rel=2e-5)


def test_grad_norm_of_strided_gradients(device):
    p, q = torch.zeros(128, 96, device=device), torch.zeros(128, 96, device=device)
    p.grad, q.grad = torch.randn(96, 128, device=device).t(), torch.randn(128, 192, device=device)[:, ::2]
    assert grad_norm([p, q]).item() == pytest.approx(norm64([p, q]), rel=1e-6)


def test_grad_norm_of_nothing():
    assert grad_norm([]).item() == 0
    assert grad_norm(torch.zeros(3)).item() == 0
    assert clip_grad_norm_([], 1.0).item() == 0


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clips_as_torch(device, dtype, max_norm):
    ours = params_with_grads(device, dtype)
    torchs = [p.clone() for p in ours]
    for p, q in zip(ours, torchs, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm, want = clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(torchs, max_norm)
    torch.testing.assert_close(norm, want)
    for p, q in zip(ours, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clips_low_precision_with_a_float32_factor(device, dtype):
    """Only the products are rounded: a factor rounded to bfloat16 would be 0.2 % off everywhere."""
    params = params_with_grads(device, dtype)
    before = [p.grad.clone() for p in params[:-1]]
    scale = clip_scale(clip_grad_norm_(params, 1.2345), 1.2345)
    for p, g in zip(params, before, strict=False):
        assert torch.equal(p.grad, (g.float() * scale).to(dtype))
    assert grad_norm(params).item() == pytest.approx(1.2345, rel=1e-3)


def test_scale_in_the_optimizer_equals_clipping_before_it(device):
    torch.manual_seed(1)
    first = params_with_grads(device, size=30.0)
    second = [p.clone() for p in first]
    for p, q in zip(first, second, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    AdamW(first).step(grad_scale=clip_scale(grad_norm(first), 1.0))
    clip_grad_norm_(second, 1.0)
    AdamW(second).step()
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite(device, bad):
    p = torch.zeros(3, device=device)
    p.grad = torch.tensor([1.0, bad, 2.0], device=device)
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad[0] == 1.0
    assert not clip_grad_norm_([p], 1.0).isfinite()
    assert torch.equal(p.grad.isnan(), torch.tensor([math.isnan(bad), True, math.isnan(bad)], device=device))


def test_clip_scale():
    assert clip_scale(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25)
    assert clip_scale(torch.tensor(0.5), 1.0).item() == 1.0
    assert clip_scale(torch.tensor(0.0), 1.0).item() == 1.0
    assert clip_scale(torch.tensor(math.inf), 1.0).item() == 0.0
    assert clip_scale(torch.tensor(math.nan), 1.0).isnan()


def test_bad_input():
    p = torch.zeros(3)
    p.grad = torch.ones(3)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must not be negative"):
            clip_grad_norm_(p, max_norm)
    assert torch.equal(p.grad, torch.ones(3))
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        grad_norm(embedding.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation needs a GPU")
def test_the_host_does_not_wait(device):
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in params_with_grads(device, dtype)]
    optimizer = AdamW(params)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(grad_scale=clip_scale(grad_norm(params), 1.0))
        clip_grad_norm_(params, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
