import itertools

import numpy as np
import pytest
import torch
from attentions import definition as definition_and_lse
from close import assert_close_to_ref
from torch.nn.attention import SDPBackend, sdpa_kernel

from cs336 import flash_attn_func, ops
from cs336.ops import registry

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [  # (B, Hq, Hkv, S, T, D)
    (2, 4, 4, 33, 33, 16),
    (2, 4, 2, 33, 33, 16),  # grouped queries
    (1, 6, 1, 5, 37, 8),  # continues a cache
    (3, 2, 2, 1, 7, 4),  # decodes
    (1, 2, 1, 7, 3, 4),  # the first queries see nothing
    (1, 1, 1, 1, 1, 1),
    (0, 2, 1, 3, 3, 4),
    (1, 2, 1, 0, 3, 4),
    (1, 2, 1, 3, 0, 4),
]


@pytest.fixture(params=[None, "ref"])
def forced(request):
    with registry.use(request.param):
        yield request.param


def inputs(shape, dtype, device):
    B, Hq, Hkv, S, T, D = shape
    return [
        torch.randn(B, H, n, D, dtype=dtype, device=device, requires_grad=True)
        for H, n in ((Hq, S), (Hkv, T), (Hkv, T))
    ]


def definition(*args, **options):
    return definition_and_lse(*args, **options)[0]


def check(leaves, **options):
    out = ops.attention(*leaves, **options)
    do = torch.randn_like(out)
    got = (out, *torch.autograd.grad(out, leaves, do))

    def plain(dtype):
        again = [t.detach().to(dtype).requires_grad_() for t in leaves]
        o = definition(*again, **options)
        return (o, *torch.autograd.grad(o, again, do.to(dtype)))

    for name, *three in zip(("o", "dq", "dk", "dv"), got, plain(torch.float64), plain(leaves[0].dtype), strict=True):
        try:
            # Torch's own kernels round the partial sums of blocks and of the heads of a group: terms larger than sums.
            assert_close_to_ref(*three, scale=1.0 if registry.forced() == "ref" or "softcap" in options else 4.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(forced, device, shape, causal, dtype):
    check(inputs(shape, dtype, device), causal=causal)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"softcap": 1.5}, {"softcap": 2.0, "scale": 1.0}, {"window": (2, 5)}, {"window": (3, None)}],
)
def test_scale_softcap_and_window(forced, device, options):
    check(inputs((2, 4, 2, 9, 13, 8), F32, device), causal=True, **options)


@pytest.mark.parametrize("D", [128, 256] if torch.cuda.is_available() else [8])
def test_keys_that_no_query_sees(forced, device, D):
    """Most blocks of a backward meet no query, and wait for none; the other keys have the gradients they have alone."""
    S, T, cut, left = (70, 19270, 18560, 64) if device == "cuda" else (3, 40, 32, 2)
    q, k, v = inputs((1, 8, 4, S, T, D), BF16 if device == "cuda" else F32, device)
    do = torch.randn_like(q)

    def gradients(*leaves):
        return torch.autograd.grad(ops.attention(*leaves, causal=True, window=(left, 0)), leaves, do)

    dq, *d_keys = gradients(q, k, v)
    alone = gradients(q, *(x[:, :, cut:].detach().requires_grad_() for x in (k, v)))
    for got, want in zip((dq, *(x[:, :, cut:] for x in d_keys)), alone, strict=True):
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    assert all(x[:, :, -S:].any() and not x[:, :, : T - S - left].any() for x in d_keys)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 13), (9, 13), (2, 4, 9, 13), (1, 13), (13,)])
def test_mask(forced, device, mask_shape, causal, dtype):
    mask = torch.rand(mask_shape, device=device) > 0.6
    mask[..., -13:].view(-1, 13)[0] = False  # a query, or several, see nothing
    check(inputs((2, 4, 2, 9, 13, 8), dtype, device), causal=causal, mask=mask)


@pytest.mark.parametrize(("dtype", "mask_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 1.5}])
@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 13), (9, 13), (4, 9, 13)])
def test_mask_that_is_added(forced, device, mask_shape, options, dtype, mask_dtype):
    mask = torch.randn(mask_shape, device=device).masked_fill(torch.rand(mask_shape, device=device) > 0.6, -torch.inf)
    mask.view(-1, 13)[0] = -torch.inf  # a query, or several, see nothing
    check(inputs((2, 4, 2, 9, 13, 8), dtype, device), mask=mask.to(mask_dtype), **options)


def test_gradient_of_a_mask(forced, device):
    q, k, v = (t.detach() for t in inputs((2, 4, 2, 9, 13, 8), F32, device))
    mask = torch.randn(4, 9, 13, device=device)
    mask[:, 3] = mask[1, 2, 5] = -torch.inf
    (got,) = torch.autograd.grad(ops.attention(q, k, v, mask.requires_grad_()).square().sum(), mask)
    wide = mask.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(definition(*(t.double() for t in (q, k, v)), mask=wide).square().sum(), wide)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, (9, 13), (4, 9, 13), (2, 1, 1, 13), (3, 1, 1, 9, 13)])
@pytest.mark.parametrize("boolean", [True, False])
def test_any_number_of_batch_dims(forced, device, mask, boolean):
    q, k, v = torch.randn(3, 2, 9, 4, 8, device=device).transpose(2, 3), *torch.randn(2, 3, 2, 2, 13, 8, device=device)
    if mask is not None:
        mask = torch.randn(mask, device=device)
        mask = mask > 0 if boolean else mask
    o = ops.attention(q, k, v, mask)
    assert o.shape == (3, 2, 4, 9, 8)
    whole = None if mask is None else mask.expand(3, 2, 4, 9, 13)
    for i, j in itertools.product(range(3), range(2)):
        m = None if whole is None else whole[i, j]
        torch.testing.assert_close(o[i, j], ops.attention(q[i, j], k[i, j], v[i, j], m))
        for h in range(4):
            alone = q[i, j, h], k[i, j, h // 2], v[i, j, h // 2]
            torch.testing.assert_close(o[i, j, h], ops.attention(*alone, None if m is None else m[h]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("E", [1, 12])
def test_values_of_another_width(forced, device, E, causal):
    q, k, _ = inputs((2, 4, 2, 5, 7, 8), F32, device)
    check([q, k, torch.randn(2, 2, 7, E, device=device, requires_grad=True)], causal=causal)


@pytest.mark.parametrize("S", [1, 4])
def test_a_query_that_sees_nothing_gives_zeros(forced, device, S):
    q, k, v = inputs((2, 2, 1, S, 6, 8), F32, device)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool, device=device)
    mask[1] = False
    o = ops.attention(q, k, v, mask=mask)
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert o[0].abs().min() > 0
    for g in (dq, dk, dv):
        assert torch.equal(g[1], torch.zeros_like(g[1]))


def test_later_keys_do_not_matter(forced, device):
    q, k, v = inputs((1, 2, 2, 6, 9, 8), F32, device)
    with torch.no_grad():
        before = ops.attention(q, k, v, causal=True)
        k[:, :, 7:] = 100.0
        v[:, :, 7:] = 100.0
        after = ops.attention(q, k, v, causal=True)
    assert torch.equal(before[:, :, :4], after[:, :, :4])  # query s stands at key s + 3
    assert (before[:, :, 4:] != after[:, :, 4:]).any(-1).all()


def test_query_heads_share_keys_in_order(forced, device):
    q, k, v = inputs((1, 4, 2, 3, 3, 4), F32, device)
    o = ops.attention(q, k, v)
    alone = [ops.attention(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1], v[:, h // 2 : h // 2 + 1]) for h in range(4)]
    torch.testing.assert_close(o, torch.cat(alone, 1))


def test_large_scores_do_not_overflow(forced, device):
    q, k, v = (1e3 * t for t in inputs((1, 1, 1, 5, 5, 8), F32, device))
    assert ops.attention(q, k, v).isfinite().all()


def test_strided_inputs(forced, device):
    packed = torch.randn(2, 7, 3, 4, 8, device=device)
    q, k, v = packed.unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    torch.testing.assert_close(ops.attention(q, k, v), ops.attention(*(t.contiguous() for t in (q, k, v))))


def test_uses_torchs_kernels_on_a_cpu():
    """With every kernel of torch's but one forbidden, that one runs; the reference would not notice."""
    q, k, v = (t.detach() for t in inputs((1, 2, 2, 4, 4, 8), F32, "cpu"))
    with sdpa_kernel(SDPBackend.OVERRIDEABLE), pytest.raises(RuntimeError):
        ops.attention(q, k, v)
    with sdpa_kernel(SDPBackend.OVERRIDEABLE), registry.use("ref"):
        ops.attention(q, k, v)


def test_the_reference_keeps_fp32_under_autocast(device):
    q, k, v = (t.detach().bfloat16() for t in inputs((2, 4, 2, 9, 13, 8), F32, device))
    with registry.use("ref"):
        want = ops.attention(q, k, v)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(ops.attention(q, k, v), want)


@pytest.mark.parametrize(("options", "forced"), itertools.product(({}, {"softcap": 5.0}), (None, "ref")))
def test_compiles_whole(device, options, forced):
    q, k, v = inputs((2, 4, 2, 5, 9, 8), F32, device)
    with registry.use(forced):
        compiled = torch.compile(ops.attention, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, **options), ops.attention(q, k, v, **options))


def test_compiles_whole_for_any_shape(device):
    compiled = torch.compile(ops.attention, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((2, 4, 2, 5, 9, 8), (2, 4, 4, 9, 9, 8)):
        q, k, v = (t.detach() for t in inputs(shape, F32, device))
        torch.testing.assert_close(compiled(q, k, v, causal=True), ops.attention(q, k, v, causal=True))


def test_a_window_of_a_shape_or_of_numpy():
    """Integers that are no int: half of a dynamic length in an exported program, and NumPy's."""

    class Halves(torch.nn.Module):
        def forward(self, q):
            return ops.attention(q, q, q, window=(q.shape[2] // 2, 0))

    q = torch.randn(1, 2, 8, 8)
    program = torch.export.export(Halves(), (q,), dynamic_shapes=({2: torch.export.Dim("S", min=4, max=64)},))
    q = torch.randn(1, 2, 12, 8)
    want, six = ops.attention(q, q, q, window=(6, 0)), np.int64(6)
    torch.testing.assert_close(program.module()(q), want)
    torch.testing.assert_close(ops.attention(q, q, q, window=(six, 0)), want)
    by_token = q.transpose(1, 2)
    torch.testing.assert_close(
        flash_attn_func(by_token, by_token, by_token, window_size=(six, 0)).transpose(1, 2), want
    )


Q = torch.zeros(2, 4, 3, 8)
KV = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q must be \(\.\.\., Hq, S, D\)"),
        ({"q": Q[0, 0, 0], "k": KV[0, 0, 0], "v": KV[0, 0, 0]}, r"q must be \(\.\.\., Hq, S, D\)"),
        ({"q": Q.int()}, "q must be floating point of 16, 32 or 64 bits, got torch.int32"),
        ({name: x.to(torch.float8_e4m3fn) for name, x in (("q", Q), ("k", KV), ("v", KV))}, "q must be floating point"),
        ({"q": Q[:1]}, "k must have q's batch"),
        ({"q": Q[..., :4]}, "head dim"),
        ({"q": Q[:, :3]}, "multiple of key-value heads, got 3 and 2"),
        ({"v": KV[:, :, :4]}, "v must have k's shape but for its last dim"),
        ({"v": KV[0]}, "v must have k's shape but for its last dim"),
        ({"k": KV.bfloat16()}, "k must be torch.float32"),
        ({"v": KV.to("meta")}, "v must be torch.float32 on cpu"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"softcap": float("inf")}, "softcap must be positive and finite"),
        ({"softcap": float("nan")}, "softcap must be positive"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"scale": -float("inf")}, "scale must be finite, got -inf"),
        ({"alibi_slopes": torch.tensor(0.5)}, "alibi_slopes must be .* got a number"),
        ({"window": 5}, "window must be .left, right., .* got 5"),
        ({"window": (-2, 3)}, "window's left must be an integer of at least 0, or None .* got -2"),
        ({"window": ("3", 1)}, "window's left must be an integer of at least 0, or None .* got '3'"),
        ({"window": (3, -1)}, "window's right must be an integer of at least 0"),
        ({"window": (1.5, 2)}, "window's left must be an integer .* got 1.5"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must be \(4,\) or \(2, 4\) torch.float32"),
        ({"alibi_slopes": torch.ones(4).double()}, "alibi_slopes must be"),
        ({"mask": torch.ones(3, 5).double()}, "mask must be bool .* got torch.float64"),
        ({"mask": torch.ones(3, 5, dtype=torch.long)}, "mask must be bool"),
        ({"mask": torch.ones(3, 5, device="meta")}, "on cpu, got torch.float32 on meta"),
        (
            {"mask": torch.ones(3, 4, dtype=torch.bool)},
            r"S, T\) = \(2, 4, 3, 5\), got \(3, 4\)",
        ),
        ({"mask": torch.ones(1, 1, 1, 3, 5, dtype=torch.bool)}, "mask must broadcast"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**({"q": Q, "k": KV, "v": KV} | change))


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize(
    "attend",
    [
        lambda q_THD: ops.attention(*[q_THD.transpose(0, 1)] * 3, causal=True),
        lambda q_THD: ops.attention_varlen(q_THD, q_THD, q_THD, torch.tensor([0, 2, 5], dtype=torch.int32)),
        lambda q_THD: flash_attn_func(*[q_THD[None]] * 3, alibi_slopes=torch.tensor([0.5, 0.25])),
    ],
    ids=["batch", "packed", "flash_attn"],
)
def test_torch_func_takes_what_no_variant_is_forced_for(attend):
    q = torch.randn(2, 5, 2, 8)

    def loss(q):
        return attend(q).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(map(loss, leaf)), leaf)
    torch.testing.assert_close(grads, expected, atol=1e-5, rtol=1e-5)
    _, slope = torch.func.jvp(loss, (q[0],), (q[1],))
    torch.testing.assert_close(slope, (expected[0] * q[1]).sum(), atol=1e-4, rtol=1e-4)


def test_packs_are_checked_under_torch_func_too():
    q, cu = torch.randn(5, 2, 8), torch.tensor([0, 3, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to q's 5 tokens"):
        torch.func.grad(lambda q: ops.attention_varlen(q, q, q, cu).sum())(q)
