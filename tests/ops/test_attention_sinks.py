"""A sink is one more score a head, of no value: every way to attend, and the gradients, against a softmax of all."""

import pytest
import torch
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
B, HQ, HKV, S, D = 2, 4, 2, 9, 16


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    with registry.use(request.param):
        yield request.param


def tensors(device, dtype=torch.float32):
    q, k, v = (torch.randn(B, h, S, D, device=device, dtype=dtype, requires_grad=True) for h in (HQ, HKV, HKV))
    sinks = torch.tensor([-3.0, 0.5, 2.0, 20.0], device=device).to(dtype).requires_grad_()  # of 20 nothing is left
    return q, k, v, sinks


def definition(q, k, v, sinks, window=None):
    """o and lse of causal attention."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    behind = torch.arange(S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    hidden = (behind < 0) | (behind > (S if window is None else window))
    scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(hidden, -torch.inf)
    scores = torch.cat((scores, sinks.view(1, HQ, 1, 1).expand(B, HQ, S, 1)), -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.logsumexp(-1)


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
    return torch.autograd.grad(total, leaves)


def compare(ours, leaves, **options):
    """ours(*leaves) gives o, or o and lse, as the definition does."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got, want, plain = ours(*leaves), definition(*wide, **options), definition(*leaves, **options)
    want, plain = want[: len(got)], plain[: len(got)]
    for x, y, z in zip((*got, *gradients(got, leaves)), (*want, *gradients(want, wide)),
                       (*plain, *gradients(plain, leaves)), strict=True):  # fmt: skip
        assert y.abs().max() > 1e-3
        assert_close_to_ref(x, y, z, scale=1.0)  # of the terms that are summed


@pytest.mark.parametrize("window", [None, 3])
def test_attention(variant, device, window):
    q, k, v, sinks = tensors(device)
    if reason := registry.why_not("attention_fwd", variant, q, k, v, 1.0, True, -1, -1, 0.0):
        pytest.skip(reason)
    options = {"causal": True, "window": None if window is None else (window, 0), "return_lse": True}
    compare(lambda q, k, v, s: ops.attention(q, k, v, sinks=s, **options), (q, k, v, sinks), window=window)


def test_packs(variant, device):
    q, k, v, sinks = tensors(device)
    if reason := registry.why_not("attention_fwd", variant, q, k, v, 1.0, True, -1, -1, 0.0):
        pytest.skip(reason)
    ends = torch.tensor([0, S, 2 * S], dtype=torch.int32, device=device)

    def packed(q, k, v, sinks):
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        o, lse = ops.attention_varlen(*rows, ends, causal=True, sinks=sinks, return_lse=True)
        return o.unflatten(0, (B, S)).transpose(1, 2), lse.unflatten(1, (B, S)).transpose(0, 1)

    compare(packed, (q, k, v, sinks))


def test_where_bits_do_not_depend_on_the_batch(device):
    ends = torch.tensor([0, S, 2 * S], dtype=torch.int32, device=device)

    def invariant(q, k, v, sinks):
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return (ops.attention_invariant(*rows, ends, S, sinks=sinks).unflatten(0, (B, S)).transpose(1, 2),)

    compare(invariant, tensors(device))


def test_a_query_without_keys_stays_zero(device):
    q, k, v, sinks = tensors(device)
    o = ops.attention(q, k, v, torch.zeros(S, S, dtype=torch.bool, device=device), sinks=sinks)
    assert (o == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(o.sum(), (q, v, sinks)))


def test_wrong_sinks_are_refused(device):
    q, k, v, sinks = tensors(device)
    for bad in (sinks[:3], sinks[None], sinks.long()):
        with pytest.raises(ValueError, match=r"sinks must be a floating-point number a query head, \(4,\)"):
            ops.attention(q, k, v, sinks=bad)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    with pytest.raises(ValueError, match="sinks must be"):
        ops.attention_varlen(*rows, torch.tensor([0, S], dtype=torch.int32, device=device), sinks=sinks[:2])
