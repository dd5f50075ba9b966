"""rope, rope_qk and qk_norm_rope in every variant that runs here, against the textbook in fp64."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
B, HQ, HK = 2, 3, 2
# S, D, pairs: the last leaves features as they are
SHAPES = [(5, 8, 4), (1, 2, 1), (7, 11, 4)] + ([(1000, 128, 64), (130, 96, 16), (3, 1023, 500)] if CUDA else [])
CASES = [(F32, False), (BF16, True)] + ([(F32, True), (BF16, False), (F16, False)] if CUDA else [])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    x, table = torch.zeros(1, 1, 2, 8, device=device), torch.zeros(1, 2, 4, device=device)
    if reason := registry.why_not("rope_fwd", request.param, [x], table, table, None, False, False):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


@pytest.fixture
def norm_variant(variant, device):
    """One that qk_norm_rope has too."""
    x, w, table = (torch.zeros(*shape, device=device) for shape in ((1, 1, 2, 8), (8,), (1, 2, 4)))
    if reason := registry.why_not("qk_norm_rope_fwd", variant, x, x, w, w, table, table, None, False, 1.0):
        pytest.skip(reason)
    return variant


def inputs(S, D, dtype, device, pad=3):
    """q contiguous by token, k a slice of wider storage with NaN beside it."""
    q = torch.randn(B, S, HQ, D, device=device).to(dtype).transpose(1, 2)
    k = F.pad(torch.randn(B, HK, S, D, device=device).to(dtype), (0, pad), value=torch.nan)[..., :D]
    return [x.detach().requires_grad_() for x in (q, k)]


def tables(length, pairs, device):
    angles = 6.3 * torch.rand(length, pairs, dtype=F64)
    return angles.cos().to(device, F32), angles.sin().to(device, F32)


def textbook(x, cos, sin, positions, interleaved):
    """x cos + rotated(x) sin in x's dtype, each pair of features at its own place."""
    cos, sin = (t if positions is None else t[positions] for t in (cos, sin))
    cos, sin = (t[:, None].to(x.dtype) if t.dim() == 3 else t.to(x.dtype) for t in (cos, sin))
    pairs = cos.shape[-1]
    x, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        x1, x2 = x.chunk(2, -1)
        rotated = torch.cat((-x2, x1), -1)
    return torch.cat((x * cos + rotated * sin, rest), -1)


def check(ours, formula, leaves, scale=1.0):
    outs = ours(*leaves)
    dys = [torch.randn_like(y) for y in outs]
    got = *outs, *torch.autograd.grad(outs, leaves, dys)

    def plain(dtype):
        again = [t.detach().to(dtype).requires_grad_() for t in leaves]
        outs = formula(*again)
        return *outs, *torch.autograd.grad(outs, again, [dy.to(y.dtype) for dy, y in zip(dys, outs, strict=True)])

    for g, wide, torchs in zip(got, plain(F64), plain(leaves[0].dtype), strict=True):
        assert_close_to_ref(g, wide, torchs.to(g.dtype), scale)


@pytest.mark.parametrize(("dtype", "interleaved"), CASES)
@pytest.mark.parametrize("at", ["in order", "shared positions", "positions of each"])
@pytest.mark.parametrize(("S", "D", "pairs"), SHAPES)
def test_rope_qk(variant, device, S, D, pairs, at, interleaved, dtype):
    cos, sin = tables(S if at == "in order" else 50, pairs, device)
    shape = {"in order": None, "shared positions": (S,), "positions of each": (B, S)}[at]
    positions = None if shape is None else torch.randint(0, 50, shape, device=device)

    def ours(q, k):
        return ops.rope_qk(q, k, cos, sin, positions=positions, interleaved=interleaved)

    def formula(*xs):
        return tuple(textbook(x, cos, sin, positions, interleaved) for x in xs)

    for pad in (3, 8):  # rows that start anywhere, and at multiples of 16 bytes
        q, k = inputs(S, D, dtype, device, pad)
        check(ours, formula, [q, k], scale=2.0)
    assert torch.equal(ours(q, k)[1], ops.rope(k, cos, sin, positions=positions, interleaved=interleaved))


@pytest.mark.parametrize("weight_dtype", [F32, None])
@pytest.mark.parametrize(("dtype", "interleaved"), CASES)
@pytest.mark.parametrize(("S", "D", "pairs"), SHAPES)
def test_qk_norm_rope(norm_variant, device, S, D, pairs, interleaved, dtype, weight_dtype):
    leaves = inputs(S, D, dtype, device)
    leaves += [torch.randn(D, device=device).to(weight_dtype or dtype).requires_grad_() for _ in range(2)]
    cos, sin = tables(50, pairs, device)
    positions = torch.randint(0, 50, (B, S), device=device)

    def ours(q, k, q_weight, k_weight):
        return ops.qk_norm_rope(
            q, k, q_weight, k_weight, cos, sin, positions=positions, interleaved=interleaved, eps=1e-3
        )

    def formula(q, k, *weights):
        normed = (F.rms_norm(x, (D,), None, 1e-3) * w for x, w in zip((q, k), weights, strict=True))
        return tuple(textbook(x, cos, sin, positions, interleaved) for x in normed)

    check(ours, formula, leaves, scale=8.0 if D < 8 else 2.0)  # few features: terms cancel


def test_tables_of_each_sequence(variant, device):
    q, _ = inputs(5, 8, F32, device)
    cos, sin = (t.view(B, 1, 5, 4) for t in tables(5 * B, 4, device))
    y = ops.rope(q, cos, sin)
    for b in range(B):
        torch.testing.assert_close(y[b], ops.rope(q[b], cos[b, 0], sin[b, 0]))


def test_backward_turns_back_and_again(variant, device):
    """A rotation's gradient is the inverse rotation: differentiable as often as one likes."""
    x, (cos, sin) = torch.randn(1, 1, 3, 8, device=device, requires_grad=True), tables(3, 4, device)
    (g,) = torch.autograd.grad(ops.rope(x, cos, sin).pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    y = ops.rope(x, cos, sin)
    want = ops.rope(6 * y * ops.rope(torch.ones_like(y), cos, sin), cos, -sin)
    torch.testing.assert_close(h, want)


@pytest.mark.parametrize("name", ["rope_fwd", "qk_norm_rope_fwd", "qk_norm_rope_bwd"])
def test_opcheck(variant, device, name):
    q, k = (x.detach() for x in inputs(5, 8, F32, device))
    w, (cos, sin) = torch.rand(8, device=device), tables(9, 3, device)
    positions = torch.randint(0, 9, (1, 5), device=device)
    rstds = torch.rand(B, HQ, 5, device=device), torch.rand(B, HK, 5, device=device)
    args = {
        "rope_fwd": ([q, k], cos, sin, positions, True, False),
        "qk_norm_rope_fwd": (q, k, w, w, cos, sin, positions, False, 1e-5),
        "qk_norm_rope_bwd": (q, k, q, k, w, w, *rstds, cos, sin, positions, False),
    }[name]
    if reason := registry.why_not(name, variant, *args):
        pytest.skip(reason)
    torch.library.opcheck(registry.OPS[name].overloads[variant], args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("positions", [False, True])
def test_rope_compiles_whole(variant, device, positions):
    q, k = inputs(5, 8, F32, device)
    cos, sin = tables(5, 4, device)
    at = torch.tensor([3, 0, 4, 1, 1], device=device) if positions else None
    compiles_whole(lambda q, k: ops.rope_qk(q, k, cos, sin, positions=at), q, k)


def test_qk_norm_rope_compiles_whole(norm_variant, device):
    q, k = inputs(5, 8, F32, device)
    (qw, kw), (cos, sin) = torch.rand(2, 8, device=device), tables(5, 4, device)
    compiles_whole(lambda q, k: ops.qk_norm_rope(*ops.rope_qk(q, k, cos, sin), qw, kw, cos, sin), q, k)


def compiles_whole(both, q, k):
    compiled = torch.compile(both, backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad([y.square().sum() for y in f(q, k)], (q, k)) for f in (compiled, both))
    for g, expected in zip(got, want, strict=True):
        torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("outside", [9, -1])
def test_positions_outside_the_tables(variant, device, outside):
    """An error where the host sees them, else NaN: never what lies beside the tables in memory."""
    x, (cos, sin) = torch.ones(1, 1, 2, 8, device=device), tables(9, 4, device)
    positions = torch.tensor([[3, outside]], device=device)
    if variant == "ref":
        if device == "cpu":
            w = torch.ones(8)
            for call in (
                lambda: ops.rope(x, cos, sin, positions=positions),
                lambda: ops.rope_qk(x, x, cos, sin, positions=positions),
                lambda: ops.qk_norm_rope(x, x, w, w, cos, sin, positions=positions),
                lambda: registry.call("rope_fwd", [x], cos, sin, positions, False, False),
            ):
                with pytest.raises(IndexError, match="positions must be 0 to 8, got some from"):
                    call()
        return
    y = ops.rope(x, cos, sin, positions=positions)
    assert y[0, 0, 0].isfinite().all()
    assert y[0, 0, 1].isnan().all()


def test_qk_norm_rope_is_differentiable_again():
    q, k = (torch.randn(1, heads, 2, 4, dtype=F64, requires_grad=True) for heads in (2, 1))
    cos, sin = tables(2, 1, "cpu")
    inputs = q, k, torch.rand(2, 4, dtype=F64, requires_grad=True)

    def turned(q, k, weights):
        return ops.qk_norm_rope(q, k, *weights, cos, sin, eps=1e-3)

    assert torch.autograd.gradcheck(turned, inputs)
    assert torch.autograd.gradgradcheck(turned, inputs)
    _, slopes = torch.func.jvp(turned, inputs, inputs)
    for n, slope in enumerate(slopes):
        dy = torch.randn_like(slope)
        grads = torch.autograd.grad(turned(*inputs)[n], inputs, dy, materialize_grads=True)
        torch.testing.assert_close((slope * dy).sum(), sum((g * x).sum() for g, x in zip(grads, inputs, strict=True)))


def test_the_raw_op_refuses(variant, device):
    x, (cos, sin) = torch.zeros(2, 3, 5, 8, device=device), tables(5, 4, device)
    at, double = torch.zeros(1, 5, dtype=torch.long, device=device), cos[None].double()
    bad = [
        ([], cos[None], sin[None], None),
        ([x, x, x], cos[None], sin[None], None),
        ([x[0]], cos[None], sin[None], None),
        ([x, x[:, :, :4]], cos[None], sin[None], None),
        ([x, x.half()], cos[None], sin[None], None),
        ([x.transpose(2, 3)], cos[None], sin[None], None),
        ([x.int()], cos[None], sin[None], None),
        ([x], cos, sin, None),
        ([x], cos[None, :4], sin[None, :4], None),
        ([x], double, double, None),
        ([x], cos[None], sin[None, :, :3], None),
        ([x[..., :7]], cos[None], sin[None], None),
        ([x], cos[None], sin[None], at),
        ([x], cos, sin, at[:, :4]),
        ([x], cos, sin, at.float()),
    ]
    for args in bad:
        with pytest.raises((ValueError, RuntimeError, NotImplementedError, IndexError)):
            registry.call("rope_fwd", *args, False, False)


X, TABLE = torch.zeros(2, 3, 5, 8), torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.zeros(4, dtype=torch.long)}, r"positions must be \(5,\) or \(2, 5\)"),
        ({"positions": torch.zeros(5)}, "int64 or int32"),
        ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, "2 P <= 8"),
        ({"cos": TABLE[None], "sin": TABLE[None]}, r"cos must be \(L, P\) beside positions"),
        ({"k": X.double()}, "k must be .* like q"),
        ({"k": X[:, :, :4]}, "k must be .* like q"),
        ({"q_weight": torch.ones(7)}, r"q_weight must be \(8,\)"),
        ({"k_weight": torch.ones(8).half()}, "k_weight must be"),
    ],
)
def test_bad_arguments(change, message):
    args = {"q": X, "k": X, "cos": TABLE, "sin": TABLE, "positions": torch.zeros(5, dtype=torch.long)}
    args |= {"q_weight": torch.ones(8), "k_weight": torch.ones(8)} | change
    with pytest.raises(ValueError, match=message):
        ops.qk_norm_rope(**args)
