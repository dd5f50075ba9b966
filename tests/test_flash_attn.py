import inspect

import pytest
import torch
from ops.attentions import BF16, CUDA, F32, check, definition, packed, varlen_definition

import cs336
from cs336.ops import registry

DTYPE, D = (BF16, 64) if CUDA else (F32, 8)
CASES = [
    ({}, {}),
    ({"causal": True, "softmax_scale": 0.2}, {"causal": True, "scale": 0.2}),
    ({"window_size": (3, 1), "softcap": 4.0}, {"window": (3, 1), "softcap": 4.0}),
    ({"window_size": (4, -1), "causal": True, "deterministic": True}, {"window": (4, None), "causal": True}),
]


def by_token(*shape, device):
    return torch.randn(*shape, dtype=DTYPE, device=device, requires_grad=True)


def formula(**options):
    def f(q, k, v):
        o, lse = definition(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return o.transpose(1, 2), lse

    return f


@pytest.mark.parametrize(("given", "meant"), CASES, ids=str)
def test_func(device, given, meant):
    leaves = [by_token(2, n, H, D, device=device) for n, H in ((7, 4), (12, 2), (12, 2))]
    check(lambda *x: cs336.flash_attn_func(*x, **given, return_attn_probs=True)[:2], formula(**meant), leaves)
    out, lse, probabilities = cs336.flash_attn_func(*leaves, **given, return_attn_probs=True)
    assert torch.equal(cs336.flash_attn_func(*leaves, **given), out)
    assert (out.shape, lse.shape, probabilities) == ((2, 7, 4, D), (2, 4, 7), None)


def test_alibi(device):
    leaves = [by_token(2, n, 2, D, device=device) for n in (7, 12, 12)]
    slopes = torch.rand(2, 2, device=device)
    ours = lambda *x: cs336.flash_attn_func(*x, causal=True, alibi_slopes=slopes, return_attn_probs=True)[:2]  # noqa: E731
    check(ours, formula(causal=True, alibi_slopes=slopes), leaves)


@pytest.mark.parametrize(("given", "meant"), CASES, ids=str)
def test_varlen_func(device, given, meant):
    leaves, cus, lists = packed([3, 0, 5], [4, 2, 5], 4, 2, D, None, DTYPE, device)
    ours = lambda *x: cs336.flash_attn_varlen_func(*x, *cus, 5, 5, **given, return_attn_probs=True)[:2]  # noqa: E731
    check(ours, lambda *x: varlen_definition(*x, *lists, **meant), leaves)


def test_packed_forms_are_slices(device):
    qkv = by_token(2, 6, 3, 2, D, device=device)
    q, k, v = qkv.unbind(2)
    want = cs336.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(cs336.flash_attn_qkvpacked_func(qkv, causal=True), want)
    assert torch.equal(cs336.flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.0, None, True), want)
    (g,) = torch.autograd.grad(cs336.flash_attn_qkvpacked_func(qkv, causal=True).square().sum(), qkv)
    assert g.abs().sum((0, 1, 3, 4)).min() > 0
    cu = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)
    rows = qkv.flatten(0, 1)
    want = cs336.flash_attn_varlen_func(*rows.unbind(1), cu, cu, 7, 7, causal=True)
    assert torch.equal(cs336.flash_attn_varlen_qkvpacked_func(rows, cu, 7, causal=True), want)
    assert torch.equal(cs336.flash_attn_varlen_kvpacked_func(rows[:, 0], rows[:, 1:], cu, cu, 7, 7, causal=True), want)


def test_dropout_drops_and_follows_torchs_seed(device):
    q, k, v = (by_token(1, 9, 2, D, device=device) for _ in range(3))

    def run(seed):
        torch.manual_seed(seed)
        return cs336.flash_attn_func(q, k, v, 0.5)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.testing.assert_close(
        sum(run(n) for n in range(300)) / 300, cs336.flash_attn_func(q, k, v), atol=0.5, rtol=0.0
    )


@pytest.mark.parametrize("with_alibi", [False, True])
def test_deterministic_reaches_the_backward(device, monkeypatch, with_alibi):
    q, k, v = (by_token(1, 5, 2, D, device=device) for _ in range(3))
    name, place = ("attention_general_bwd", -4) if with_alibi else ("attention_bwd", -1)
    asked, overloads = [], registry.OPS[name].overloads
    run = overloads["ref"]
    monkeypatch.setitem(overloads, "ref", lambda *args: (asked.append(args[place]), run(*args))[1])
    slopes = torch.ones(2, device=device) if with_alibi else None
    with registry.use(None if not CUDA else "ref"):
        for deterministic in (True, False):
            cs336.flash_attn_func(q, k, v, alibi_slopes=slopes, deterministic=deterministic).sum().backward()
    assert asked == [True, False]


def test_flash_attns_own_order_and_defaults():
    names = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    parameters = inspect.signature(cs336.flash_attn_func).parameters
    assert list(parameters) == names.split()
    defaults = [p.default for p in parameters.values()][3:]
    assert defaults == [0.0, None, False, (-1, -1), 0.0, None, False, False]
    names = (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
    )
    names += "alibi_slopes deterministic return_attn_probs block_table"
    assert list(inspect.signature(cs336.flash_attn_varlen_func).parameters) == names.split()


def test_refusals(device):
    q = torch.zeros(1, 4, 2, 8, device=device)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"k_cache must be \(P, page, Hkv, D\)"):
        cs336.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, block_table=cu)
    with pytest.raises(ValueError, match=r"window_size must be .* got \(-2, 0\)"):
        cs336.flash_attn_func(q, q, q, window_size=(-2, 0))
    for bad in (3, (None, 0), (1.5, 2), ("1", 2), "12", ([1], 2)):
        with pytest.raises(ValueError, match="window_size must be two lengths"):
            cs336.flash_attn_func(q, q, q, window_size=bad)
    with pytest.raises(ValueError, match="softcap must be positive and finite"):
        cs336.flash_attn_func(q, q, q, softcap=float("nan"))
    with pytest.raises(ValueError, match="qkv must have 5 dims, the third from last 3"):
        cs336.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="kv must have 4 dims"):
        cs336.flash_attn_varlen_kvpacked_func(q[0], q, cu, cu, 4, 4)
    with pytest.raises(ValueError, match="dropout_p must be"):
        cs336.flash_attn_func(q, q, q, 1.5)
    with pytest.raises(ValueError, match=r"v must be torch.float32 on .* like q, got .* torch.float64"):
        cs336.flash_attn_func(q, q, q.double())
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be a tensor .* got None"):
        cs336.flash_attn_varlen_func(q[0], q[0], q[0], cu, None, 4, 4)


def test_refusals_name_the_callers_shapes(device):
    """Tokens before heads, as they were given."""
    q = torch.zeros(2, 4, 3, 8, device=device)
    nested = torch.nested.nested_tensor([q[0], q[1]])
    for args, match in (
        ((q[0], q[0], q[0]), r"q must be \(batch, tokens, heads, features\), got shape \(4, 3, 8\)"),
        ((q[0, 0], q, q), r"q must be \(batch, .* got shape \(3, 8\)"),
        ((q, q, q[..., :0]), r"v must be \(batch, .* got shape \(2, 4, 3, 0\)"),
        ((nested, nested, nested), "q must be .* got a nested tensor: flash_attn_varlen_func"),
        ((q, q[:1], q[:1]), r"must fit each other, got \(2, 4, 3, 8\), \(1, 4, 3, 8\), \(1, 4, 3, 8\)"),
        ((q, q[..., :4], q), r"must fit each other, got .*, \(2, 4, 3, 4\)"),
        ((q, q, q[:, :3]), r"must fit each other, got .*, \(2, 3, 3, 8\)"),
    ):
        with pytest.raises(ValueError, match=match):
            cs336.flash_attn_func(*args)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"q must be \(tokens, heads, features\), got shape \(2, 4, 3, 8\)"):
        cs336.flash_attn_varlen_func(q, q, q, cu, cu, 4, 4)
    with pytest.raises(ValueError, match=r"must fit each other, got .*, \(4, 3, 8\), \(3, 3, 8\)"):
        cs336.flash_attn_varlen_func(q[0], q[0], q[0, :3], cu, cu, 4, 4)
