"""causal_conv1d and long_conv against sums over taps in float64."""

import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops

OPS = {"short": (ops.causal_conv1d, 4), "whole": (ops.long_conv, 40), "long": (ops.long_conv, 9)}


@pytest.fixture(params=OPS)
def kind(request):
    return request.param


def call(kind, x, taps, segments=None):
    """taps: (C, K), the token's own last, as causal_conv1d has them."""
    if kind == "short":
        return ops.causal_conv1d(x, taps, segments=segments)
    return ops.long_conv(x, taps.flip(1).T, segments)


def by_hand(x, taps, segments=None):
    (B, T, _), K = x.shape, taps.shape[1]
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for k in range(min(K, t + 1)):
                if segments is None or segments[b, t] == segments[b, t - k]:
                    y[b, t] += taps[:, K - 1 - k] * x[b, t - k]
    return y


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("T", [1, 2, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_fp64(kind, device, dtype, T, segments):
    x = torch.randn(2, T, 5, device=device, dtype=dtype, requires_grad=True)
    taps = torch.randn(5, OPS[kind][1], device=device, dtype=dtype, requires_grad=True)
    some = torch.randint(0, 4, (2, T)).sort(-1).values.to(device) if segments else None
    dy = torch.randn_like(x)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, taps)]
        y = function(*leaves, some)
        return y, *torch.autograd.grad(y, leaves, dy.to(dtype))

    ours, wide = run(lambda *args: call(kind, *args), dtype), run(by_hand, torch.float64)
    for a, b, c in zip(ours, wide, run(by_hand, dtype), strict=True):
        assert_close_to_ref(a, b, c, scale=b.square().mean().sqrt().item())


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_in_float64(kind, bias):
    x, taps = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    args = [x.requires_grad_(), taps.requires_grad_()]
    if bias and kind == "short":
        args.append(torch.randn(3, dtype=torch.float64, requires_grad=True))
        torch.autograd.gradcheck(lambda x, w, b: ops.causal_conv1d(x, w, b, segments), args)
    torch.autograd.gradcheck(lambda x, w, *_: call(kind, x, w, segments), args[:2])


def test_documents_and_later_tokens(kind):
    x, taps = torch.randn(1, 12, 3), torch.randn(3, OPS[kind][1])
    segments = torch.tensor([[0] * 5 + [1] * 7])
    y = call(kind, x, taps, segments)
    torch.testing.assert_close(y[:, 5:], call(kind, x[:, 5:], taps), atol=1e-5, rtol=1e-5)
    changed = x.clone()
    changed[:, 9:] += 1
    torch.testing.assert_close(call(kind, changed, taps)[:, :9], call(kind, x, taps)[:, :9], atol=1e-5, rtol=1e-5)


def test_no_nan_leaks_into_another_document(device):
    x, taps, bias, dy = (torch.randn(*shape, device=device) for shape in ((1, 9, 3), (3, 4), (3,), (1, 9, 3)))
    x[:, 0] = torch.nan

    def run(x, dy, segments=None):
        leaves = [t.detach().clone().requires_grad_() for t in (x, taps, bias)]
        y = ops.causal_conv1d(*leaves, segments)
        return y, *torch.autograd.grad(y, leaves, dy)

    y, dx, dtaps, _ = run(x, dy, torch.tensor([[0] + [1] * 8], device=device))
    want_y, want_dx, want_dtaps, _ = run(x[:, 1:], dy[:, 1:])
    torch.testing.assert_close((y[:, 1:], dx[:, 1:]), (want_y, want_dx))
    torch.testing.assert_close(dtaps[:, :-1], want_dtaps[:, :-1])  # the last meets each token itself


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2)])
def test_nothing(kind, shape):
    assert call(kind, torch.zeros(shape), torch.zeros(2, 4)).shape == shape


def test_no_tokens_need_no_taps():
    x = torch.zeros(2, 0, 3, requires_grad=True)
    ops.long_conv(x, torch.zeros(0, 3)).sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(ValueError, match=r"filter must be \(L, 3\) to fit x \(2, 1, 3\), got \(0, 3\)"):
        ops.long_conv(torch.zeros(2, 1, 3), torch.zeros(0, 3))


def test_what_does_not_fit():
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"weight must be \(3, K\) to fit x \(2, 5, 3\), got \(4, 2\)"):
        ops.causal_conv1d(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"filter must be \(L, 3\) to fit x \(2, 5, 3\), got \(3, 4\)"):
        ops.long_conv(x, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"bias must be \(3,\), got \(2,\)"):
        ops.causal_conv1d(x, torch.zeros(3, 2), torch.zeros(2))
    for op, weight in ((ops.causal_conv1d, torch.zeros(3, 2)), (ops.long_conv, torch.zeros(2, 3))):
        with pytest.raises(ValueError, match=r"segments must be \(2, 5\) to fit x, got \(2, 4\)"):
            op(x, weight, segments=torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"x must be \(B, [ST], C\), floating point, got \(5, 3\)"):
            op(x[0], weight)
