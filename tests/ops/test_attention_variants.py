"""attention and attention_varlen in every variant that runs here, against the formula in fp64."""

import random

import pytest
import torch
from attentions import BF16, CUDA, F16, F32, F64, check, definition, leaves, packed, varlen_definition
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry
from cs336.ops.attention_autograd import new_seed
from cs336.ops.attention_raw import NATIVE_HEAD_DIMS
from cs336.ops.ref import attention as ref
from cs336.ops.ref.philox import philox

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "softcap": 3.0},
    {"window": (9, 4)},
    {"window": (9, None), "causal": True, "scale": 0.3},
]
if CUDA:
    LENGTHS = [(n, n) for n in (1, 2, 63, 64, 65, 127, 1000, 4097)] + [(1, 1000), (65, 200), (200, 65), (130, 4097)]
    HEADS, SHAPES = (1, 4, 2), NATIVE_HEAD_DIMS["backward"]
    MORE = [(80, 80), (33, 7)]
    DTYPES = [BF16]
else:
    LENGTHS = [(1, 1), (33, 33), (20, 5)]
    HEADS, SHAPES = (1, 1, 1), [(16, 16)]  # interpreted Triton is slow
    MORE = [(33, 7)]
    DTYPES = [F32]


@pytest.fixture(params=registry.NAMESPACE)
def variant(request):
    with registry.use(request.param):
        yield request.param


def skip_without(variant, q, k, v, name="attention_fwd", packing=(), scale=1.0, softcap=0.0, **_):
    """Skips with the reason why the variant does not take these arguments, forward or backward."""
    options = (scale, True, -1, -1, softcap)
    for suffix in ("fwd", "bwd"):
        args = (q, k, v, *packing, *options)
        if suffix == "bwd":
            o = q[..., :1].expand(*q.shape[:-1], v.shape[-1]).contiguous()
            args = (o, None, q, k, v, o, o[..., 0], *packing, *options, False)
        if reason := registry.why_not(name.replace("fwd", suffix), variant, *args):
            pytest.skip(reason)


def compare(variant, tensors, **options):
    skip_without(variant, *tensors, **options)

    def ours(q, k, v):
        return ops.attention(q, k, v, **options, return_lse=True)

    left, right = options.get("window") or (None, None)
    right = 0 if options.get("causal") else right
    seen = None if left is None or right is None else left + right + 1
    exact = lambda q, k, v: definition(q, k, v, **options)  # noqa: E731
    check(ours, exact, tensors, seen=seen, softmax_scale=options.get("scale"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("D", "E"), SHAPES)
@pytest.mark.parametrize(("S", "T"), LENGTHS)
def test_lengths(variant, device, S, T, D, E, options, dtype):
    compare(variant, leaves(*HEADS, S, T, D, E, dtype, device), **options)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (9, None)}], ids=str)
@pytest.mark.parametrize(("D", "E"), [*SHAPES, *MORE])
def test_head_dims_and_dtypes(variant, device, D, E, options, dtype):
    S, T = (130, 300) if CUDA else (5, 19)
    compare(variant, leaves(1, 2, 1, S, T, D, E, dtype, device), **options)


@pytest.mark.skipif(not CUDA, reason="native kernels need a GPU")
@pytest.mark.parametrize("S", [1, 65, 1000])
@pytest.mark.parametrize(("D", "E"), NATIVE_HEAD_DIMS["forward"])
def test_native_forward_with_whichever_backward(device, D, E, S):
    q, k, v = leaves(1, 4, 2, S, S + 13, D, E, BF16, device)
    if reason := registry.why_not("attention_fwd", "native", q, k, v, 1.0, True, -1, -1, 0.0):
        pytest.skip(reason)
    ours = lambda q, k, v: ops.attention(q, k, v, causal=True, return_lse=True)  # noqa: E731
    check(ours, lambda q, k, v: definition(q, k, v, causal=True), [q, k, v])


@pytest.mark.skipif(not CUDA, reason="native kernels need a GPU")
@pytest.mark.parametrize(("D", "E"), SHAPES)
def test_a_window_over_many_blocks(device, D, E):
    """Where the native backward takes turns unasked."""
    with registry.use("native"):
        compare("native", leaves(1, 24, 12, 2100, 2130, D, E, BF16, device), causal=True, window=(300, None))


@pytest.mark.skipif(not CUDA, reason="native kernels need a GPU")
@pytest.mark.parametrize("D", [64, 128])
def test_turns_through_a_window_of_a_long_text(device, D):
    """Of more queries than L2 holds: as without turns but for the order of sums, and the same twice."""
    q, k, v = (t.detach() for t in leaves(1, 8, 2, 70_000, 70_000, D, None, BF16, device))
    options = (D**-0.5, True, 3000, -1, 0.0)
    with registry.use("native"):
        o, lse = registry.call("attention_fwd", q, k, v, *options)
        any_order, *turns = (
            registry.call("attention_bwd", o, None, q, k, v, o, lse, *options, deterministic)
            for deterministic in (False, True, True)
        )
    for want, first, second in zip(any_order, *turns, strict=True):
        assert torch.equal(first, second)
        assert (first.double() - want.double()).norm() < 1e-3 * want.double().norm()


@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_groups(variant, device, Hkv):
    S, T = (100, 140) if CUDA else (4, 9)
    compare(variant, leaves(1, 6, Hkv, S, T, 64 if CUDA else 8, None, BF16, device), causal=True)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 3, 64), (1, 2, 1, 0, 3, 64), (1, 2, 1, 3, 0, 64), (1, 2, 1, 9, 3, 64)])
def test_no_tokens_and_queries_without_keys(variant, device, shape):
    compare(variant, leaves(*shape, dtype=BF16, device=device), causal=True)


@pytest.mark.parametrize("batched", [False, True])
def test_alibi(variant, device, batched):
    slopes = torch.rand((2, 4) if batched else (4,), device=device)
    tensors = leaves(2, 4, 2, *((150, 200) if CUDA else (6, 9)), 64 if CUDA else 8, None, BF16, device)
    if variant == "native":
        q, k, v = tensors
        args = (q, k, v, None, None, 0, 0, 1.0, True, -1, -1, 0.0, slopes, 0.0, None)
        pytest.skip(registry.why_not("attention_general_fwd", variant, *args))
    compare(variant, tensors, alibi_slopes=slopes, softcap=5.0)


@pytest.mark.parametrize("dtype", [BF16, F32] if CUDA else [BF16])
def test_dropout(variant, device, dtype):
    """The kernels make the reference's draw, whatever their tiles, and make it again in the backward."""
    if variant == "native":
        pytest.skip("dropout has no native kernel: test_alibi asks why")
    B, Hq, Hkv, S, T, D = (2, 4, 2, 150, 200, 64) if CUDA else (2, 2, 1, 5, 18, 8)
    tensors = leaves(B, Hq, Hkv, S, T, D, None, dtype, device)
    torch.manual_seed(7)
    kept = ref._dropout(new_seed(torch.device(device)), 0.3, 0, (B, Hq, S, T))
    assert abs((kept == 0).double().mean().item() - 0.3) < 4 * (0.21 / kept.numel()) ** 0.5
    assert kept.max().item() == pytest.approx(1 / 0.7)

    def ours(q, k, v):
        torch.manual_seed(7)
        return ops.attention(q, k, v, causal=True, dropout_p=0.3, return_lse=True)

    check(ours, lambda q, k, v: definition(q, k, v, causal=True, kept=kept), tensors)


PACKS = [([5, 0, 1, 12], [5, 3, 0, 12]), ([2, 3], [20, 1])]
if CUDA:
    PACKS += [([1000, 1, 65, 64, 0, 127], [1000, 1, 65, 64, 0, 127]), ([1, 1, 130], [4097, 63, 200])]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 2.0, "window": (9, 0)}], ids=str)
@pytest.mark.parametrize("pack", PACKS, ids=str)
@pytest.mark.parametrize(("D", "E"), SHAPES if CUDA else [(8, 8)])
def test_varlen(variant, device, D, E, pack, options):
    tensors, cus, lists = packed(*pack, 4 if CUDA else 2, 2 if CUDA else 1, D, E, BF16, device)
    packing = *cus, max(pack[0]), max(pack[1])
    skip_without(variant, *tensors, "attention_varlen_fwd", packing, **options)

    def ours(q, k, v):
        return ops.attention_varlen(q, k, v, *packing, **options, return_lse=True)

    check(ours, lambda q, k, v: varlen_definition(q, k, v, *lists, **options), tensors)


def test_varlen_alibi_and_dropout(variant, device):
    if variant == "native":
        pytest.skip("ALiBi and dropout have no native kernel: test_alibi asks why")
    tensors, cus, lists = packed([5, 0, 9], [7, 3, 18], 2, 1, 16, None, F32, device)
    slopes = torch.rand(3, 2, device=device)
    torch.manual_seed(7)
    seed = new_seed(torch.device(device))
    kept = [ref._dropout(seed, 0.25, n, (1, 2, s, t)) for n, (s, t) in enumerate([(5, 7), (0, 3), (9, 18)])]

    def ours(q, k, v):
        torch.manual_seed(7)
        return ops.attention_varlen(q, k, v, *cus, alibi_slopes=slopes, dropout_p=0.25, return_lse=True)

    check(ours, lambda q, k, v: varlen_definition(q, k, v, *lists, alibi_slopes=slopes, kept=kept), tensors)


def test_varlen_is_attention_of_each(variant, device):
    """Bit for bit: a sequence's output does not depend on its neighbours in a pack or in a batch.

    In a pack and in a batch tiles may differ, and rounding with them.
    """
    if variant == "ref":
        pytest.skip("plain torch does not promise it")
    n = 100 if CUDA else 18
    q, k, v = leaves(3, 2, 1, n, n, 64 if CUDA else 8, None, BF16, device)
    skip_without(variant, q, k, v)
    with torch.no_grad():
        whole = ops.attention(q, k, v, causal=True)
        assert torch.equal(ops.attention(q[1:2], k[1:2], v[1:2], causal=True), whole[1:2])
        rows = [x.transpose(1, 2).reshape(3 * n, x.shape[1], -1) for x in (q, k, v)]
        cu = torch.tensor([0, n, 2 * n, 3 * n], dtype=torch.int32, device=device)
        pack = ops.attention_varlen(*rows, cu, cu, n, n, causal=True)
        exact, plain = (definition(*(x.to(dtype) for x in (q, k, v)), causal=True)[0] for dtype in (F64, BF16))
        for o in (whole, pack.view(3, n, 2, -1).transpose(1, 2)):
            assert_close_to_ref(o, exact, plain, scale=4 * n**-0.5)
        alone = ops.attention_varlen(*(x[n : 2 * n] for x in rows), cu[:2], cu[:2], n, n, causal=True)
        assert torch.equal(alone, pack[n : 2 * n])


@pytest.mark.parametrize("starts", [[3, 50, 50, 97], [0, 70, 30, 120], [0, 60, 120, 121]], ids=str)
@pytest.mark.parametrize(("D", "E"), SHAPES)
def test_tokens_that_no_sequence_holds(variant, device, D, E, starts):
    """Zeros, and lse -inf; where starts decrease or overrun nothing is touched outside, and no gradient is left."""
    if variant != "native" or not CUDA:
        pytest.skip("the native kernels alone take them: on a CPU starts are read, and refused")
    q, k, v = (torch.randn(120, *s, dtype=BF16, device=device, requires_grad=True) for s in ((4, D), (2, D), (2, E)))
    cu = torch.tensor(starts, dtype=torch.int32, device=device)
    skip_without(variant, q, k, v, "attention_varlen_fwd", (cu, cu, 60, 60))
    del_me = [torch.full_like(x, torch.nan) for x in (q, q, k, v) for _ in range(4)]  # what is allocated next is NaN
    del del_me
    o, lse = ops.attention_varlen(q, k, v, cu, cu, 60, 60, causal=True, return_lse=True)
    grads = torch.autograd.grad(o.float().square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (o, *grads))
    if sorted(starts) != starts or starts[-1] > 120:
        assert not any(x.any() for x in grads)
    else:
        for outside in (slice(0, starts[0]), slice(starts[-1], None)):
            assert not any(x[outside].any() for x in (o, *grads))
            assert (lse[:, outside] == -torch.inf).all()
        assert lse[:, starts[0] : starts[-1]].isfinite().all()


def test_tiles_outside_the_window_are_not_read(variant, device):
    """They are NaN, keys and values: even a probability of 0 would spread it."""
    if variant == "ref":
        pytest.skip("the whole score matrix is made")
    far = 1000 if CUDA else 32
    q, k, v = leaves(1, 2, 1, 16, far + 300 if CUDA else far + 48, 64 if CUDA else 8, None, BF16, device)
    skip_without(variant, q, k, v)
    with torch.no_grad():
        want = ops.attention(q, k, v, causal=True, window=(8, None))
        k[:, :, :far] = v[:, :, :far] = torch.nan
        assert torch.equal(ops.attention(q, k, v, causal=True, window=(8, None)), want)


@pytest.mark.parametrize(("D", "E"), SHAPES)
def test_gradients_are_deterministic(variant, device, D, E):
    n = 700 if CUDA else 20
    tensors = leaves(1, 2, 1, n, n, D, E, BF16, device)
    skip_without(variant, *tensors)
    with registry.determinism(True):
        first, second = (
            torch.autograd.grad(ops.attention(*tensors, causal=True).square().sum(), tensors) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def random_case(rng, variant, device):
    """Leaves and options: any combination of what attention has."""
    native = variant == "native"
    D, E = rng.choice(NATIVE_HEAD_DIMS["backward"]) if native else (rng.randint(1, 48), rng.randint(1, 48))
    longest = 300 if CUDA else 24
    Hkv, group = rng.randint(1, 2), rng.randint(1, 3 if CUDA else 2)
    dtype = rng.choice([BF16, F16] if native else [BF16, F16, F32])
    options = {"causal": rng.random() < 0.5}
    if rng.random() < 0.4:
        options["window"] = tuple(rng.choice([None, rng.randint(0, longest)]) for _ in range(2))
    if rng.random() < 0.3:
        options["softcap"] = rng.uniform(1, 30)
    if rng.random() < 0.3:
        options["scale"] = rng.uniform(-0.5, 1)
    if not native and rng.random() < 0.2:
        options["alibi_slopes"] = torch.rand(Hkv * group, device=device)
    S, T = rng.randint(1, longest), rng.randint(1, longest)
    return leaves(rng.randint(1, 2 if CUDA else 1), Hkv * group, Hkv, S, T, D, E, dtype, device), options


@pytest.mark.parametrize("number", range(200 if CUDA else 8))
def test_random_cases(variant, device, number):
    tensors, options = random_case(random.Random(number), variant, device)
    compare(variant, tensors, **options)


# ---- the comparison itself ----


class Float32(torch.autograd.Function):
    """One head of attention in float32; the backward's dS goes through `round_ds`."""

    @staticmethod
    def forward(ctx, q, k, v, round_ds):
        o, lse = definition(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.round_ds = round_ds
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = torch.exp(scale * q @ k.mT - lse[..., None])
        delta = (do * o).sum(-1, keepdim=True) - dlse[..., None]
        ds = ctx.round_ds(scale * p * (do @ v.mT - delta))
        return ds @ k, ds.mT @ q, p.mT @ do, None


def to_tf32(x):
    return ((x.view(torch.int32) + 4096) & ~8191).view(F32)


@pytest.mark.parametrize(("S", "T", "D", "E"), [(40, 2000, 256, 256), (40, 90, 16, 45)])
def test_a_tf32_gradient_of_the_scores_is_wrong(S, T, D, E):
    tensors = leaves(1, 1, 1, S, T, D, E, F32)
    check(lambda *x: Float32.apply(*x, lambda ds: ds), definition, tensors)
    with pytest.raises(AssertionError, match=r"d[qk]: "):
        check(lambda *x: Float32.apply(*x, to_tf32), definition, tensors)


# ---- the reference's own two passes ----


@pytest.mark.parametrize(
    "options",
    [
        (0.4, False, -1, -1, 0.0),
        (0.4, True, 3, -1, 2.0),
        (0.4, False, 2, 1, 0.0, torch.rand(4), 0.3, torch.tensor([5])),
    ],
)
def test_the_references_backward_is_the_gradient_of_its_forward(options):
    q, k, v = leaves(2, 4, 2, 5, 9, 3, 6, F64)
    o, lse = ref.fwd(q, k, v, *options)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    want = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
    with torch.no_grad():
        got = ref.bwd(do, dlse, q, k, v, o, lse, *options[:5], False, *options[5:])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    tensors = leaves(1, 2, 1, 3, 5, 4, 2, F64)
    slopes = torch.rand(2)
    for options in ({"causal": True}, {"window": (2, 1), "softcap": 2.0, "return_lse": True}, {"alibi_slopes": slopes}):
        assert torch.autograd.gradcheck(lambda q, k, v, o=options: ops.attention(q, k, v, **o), tensors)
    tensors, cus, _ = packed([2, 3], [3, 4], 2, 1, 4, 2, F64)
    assert torch.autograd.gradcheck(lambda q, k, v: ops.attention_varlen(q, k, v, *cus, causal=True), tensors)


def test_philox_is_random123s():
    """The known answers of Philox4x32-10 in Random123's own tests: counter and key all zeros, and all ones."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    assert philox(zero, [zero] * 4, rounds=10)[0].item() == 0x6627E8D5
    assert philox(zero - 1, [ones] * 4, rounds=10)[0].item() == 0x408F276D
