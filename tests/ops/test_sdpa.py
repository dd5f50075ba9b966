"""F.scaled_dot_product_attention under cs336.enable()."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref
from torch.nn.attention import SDPBackend, sdpa_kernel

from cs336.backend import Backend
from cs336.ops import sdpa

Q, K, DO = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 4))


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of our attention's calls."""
    seen, attention = [], sdpa.attention
    monkeypatch.setattr(sdpa, "attention", lambda *args, **kwargs: (seen.append(kwargs), attention(*args, **kwargs))[1])
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "scale": 0.3},
        {"enable_gqa": True},
        {"scale": 0.1, "dropout_p": 0.0},
    ],
)
def test_ours_runs_and_gives_what_torch_gives(device, calls, options):
    q = Q.to(device).requires_grad_()
    key = K if options.get("enable_gqa") else Q.flip(2)
    k, v = (x.to(device).requires_grad_() for x in (key, key.flip(3)))
    do = DO.to(device)  # of unit size, as all that is added up: that of o^2 would make terms of 100 cancel

    def run(*tensors):
        o = F.scaled_dot_product_attention(*tensors, **options)
        return o, *torch.autograd.grad((o * do.to(o.dtype)).sum(), tensors)

    torchs = run(q, k, v)
    exact = run(*(x.detach().double().requires_grad_() for x in (q, k, v)))
    assert not calls
    with Backend():
        ours = run(q, k, v)
    assert calls == [{"causal": options.get("is_causal", False), "scale": options.get("scale")}]
    for o, e, t in zip(ours, exact, torchs, strict=True):
        assert_close_to_ref(o, e, t, scale=4.0)


def test_the_rest_goes_to_torch(device, calls):
    q = Q.to(device)
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).tril()
    for args, options in (
        ((q, q, q, mask), {}),
        ((q, q[:, :, :3], q[:, :, :3]), {"is_causal": True}),  # torch's stands at the first key, ours at the last
        ((q[0], q[0], q[0]), {}),
        ((q, q, q), {"dropout_p": 1e-9}),
        ((q[:0], q[:0], q[:0]), {}),
        ((q, q, q[..., :0]), {}),
        ((q, q, q), {"scale": float("inf")}),
    ):
        want = F.scaled_dot_product_attention(*args, **options)
        with Backend():
            assert torch.equal(F.scaled_dot_product_attention(*args, **options).nan_to_num(9), want.nan_to_num(9))
    with Backend():
        torch.func.vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(q[None])
    with Backend(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, q[..., :4], q)
    assert not calls


def test_ours_does_not_call_itself():
    """On a CPU ours is torch's own kernel: not the function that it replaces."""
    with Backend(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(Q, Q, Q)


def test_compiles_whole(device, calls):
    q = Q.to(device)
    with Backend():
        compiled = torch.compile(
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_multihead_attention_module(device, calls):
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True, device=device)
    x = torch.randn(2, 5, 16, device=device)
    want = module(x, x, x, need_weights=False)[0]
    with Backend():
        torch.testing.assert_close(module(x, x, x, need_weights=False)[0], want)
    assert len(calls) == 1
