import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import activation, registry
from cs336.ops.activation import Kind

CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


@pytest.fixture(params=[None, *registry.NAMESPACE])
def variant(request, device):
    """The variant that is chosen, and each in turn, forced."""
    x = torch.zeros(1, 2, device=device)
    if request.param and (reason := registry.why_not("activation_fwd", request.param, x, x, 0)):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def gelu_by_hand(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh_by_hand(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


OPS = {  # ours, by hand, tensors
    "swiglu": (ops.swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, 2),
    "geglu": (ops.geglu, lambda gate, up: gelu_by_hand(gate) * up, 2),
    "geglu tanh": (lambda *a: ops.geglu(*a, approximate="tanh"), lambda gate, up: gelu_tanh_by_hand(gate) * up, 2),
    "relu2": (ops.relu2, lambda x: x.clamp(min=0) ** 2, 1),
    "silu": (ops.silu, lambda x: x / (1 + torch.exp(-x)), 1),
}
SHAPES = [(3, 257), (0, 4), (4, 0), (1,), (), (2, 3, 2049)] + ([(70, 11008), (5000, 7)] if CUDA else [])


def check(name, leaves):
    op, by_hand, _ = OPS[name]
    y = op(*leaves)
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, leaves, dy))

    def plain(dtype):
        again = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = by_hand(*again)
        return (out, *torch.autograd.grad(out, again, dy.to(dtype)))

    for three in zip(got, plain(F64), plain(leaves[0].dtype), strict=True):
        assert_close_to_ref(*three)


def draw(name, shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(OPS[name][2])]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(variant, device, shape, dtype, name):
    check(name, draw(name, shape, dtype, device))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("N", "dtype"), [(96, BF16), (33, F32)])
def test_layouts(variant, device, N, dtype, name):
    """Halves of one matmul's result, and an odd start: NaN beside them stays out."""
    together = torch.randn(5, 2 * N, device=device).to(dtype)
    check(name, [t.requires_grad_() for t in together.chunk(2, -1)][: OPS[name][2]])
    odd = [F.pad(t.reshape(-1), (1, 0), value=torch.nan)[1:].view(5, N) for t in together.chunk(2, -1)]
    check(name, [t.requires_grad_() for t in odd][: OPS[name][2]])
    columns = [F.pad(t[..., None], (0, 1), value=torch.nan)[..., 0] for t in together.chunk(2, -1)]
    check(name, [t.requires_grad_() for t in columns][: OPS[name][2]])


GATED = {
    Kind.SILU: ops.swiglu,
    Kind.GELU: ops.geglu,
    Kind.GELU_TANH: lambda gate, up: ops.geglu(gate, up, approximate="tanh"),
}


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("shape", [(3, 2 * 257), (5, 2 * 96), (0, 4), (2, 3, 2)])
def test_gate_and_up_side_by_side(variant, device, shape, kind):
    """As if they were two tensors, bit for bit; what is beside the rows stays out."""
    both = F.pad(torch.randn(shape, device=device).to(BF16), (0, 6), value=torch.nan)[..., :-6].requires_grad_()
    y, want = activation.gated(both, kind), GATED[kind](*both.chunk(2, -1))
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, both, dy)[0] for out in (y, want)))

    def penalty(f):
        (g,) = torch.autograd.grad(f(wide).square().sum(), wide, create_graph=True)
        return torch.autograd.grad(g.square().sum(), wide)[0]

    wide = both.detach().float().requires_grad_()
    torch.testing.assert_close(
        penalty(lambda x: activation.gated(x, kind)), penalty(lambda x: GATED[kind](*x.chunk(2, -1)))
    )


def test_far_from_zero(variant, device):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device, requires_grad=True)
    for op in (ops.silu, lambda x: ops.swiglu(x, torch.ones_like(x)), lambda x: ops.geglu(x, torch.ones_like(x))):
        y = op(x)
        torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4], device=device))
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0], device=device)
        )
    assert ops.relu2(torch.tensor([torch.nan], device=device)).isnan().all()


def test_is_torchs_function(variant, device):
    gate, up = torch.randn(2, 40, device=device)
    torch.testing.assert_close(ops.silu(gate), F.silu(gate))
    torch.testing.assert_close(ops.swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(ops.geglu(gate, up), F.gelu(gate) * up)
    torch.testing.assert_close(ops.geglu(gate, up, approximate="tanh"), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(ops.relu2(gate), F.relu(gate).square())


@pytest.mark.parametrize("name", OPS)
def test_higher_derivatives_and_transforms(variant, device, name):
    op, by_hand, count = OPS[name]
    leaves = [torch.rand(3, 4, device=device).add_(0.1).requires_grad_() for _ in range(count)]  # not where relu bends

    def penalty(f):
        (g,) = torch.autograd.grad(f(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaves)

    torch.testing.assert_close(penalty(op), penalty(by_hand))
    for got, want in zip(
        *((torch.func.vmap(f)(*leaves), torch.func.jvp(f, tuple(leaves), tuple(leaves))[1]) for f in (op, by_hand)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(variant, device, name):
    torch.compiler.reset()
    leaves = draw(name, (4, 24), BF16, device)
    compiled = torch.compile(OPS[name][0], backend="inductor" if CUDA else "aot_eager", fullgraph=True)
    outs = [f(*leaves) for f in (compiled, OPS[name][0])]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in outs))


def raw_args(name, gated, kind, device):
    x, up, dy = torch.randn(3, 4, 6, device=device)
    if name == "gated_bwd":
        return torch.cat((x, up), -1), dy, kind
    return (x, up if gated else None, kind) if name == "activation_fwd" else (x, up if gated else None, dy, kind)


@pytest.mark.parametrize("name", ["activation_fwd", "activation_bwd", "gated_bwd"])
def test_raw_ops(variant, device, name):
    overload = registry.OPS[name].overloads[variant or "ref"]
    for gated in (False, True):
        args = raw_args(name, gated, 1, device)
        torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))
        spoilt = {
            "int32": lambda t: t.int(),
            "one dim more": lambda t: t[None],
            "shorter": lambda t: t[:, :-1],
            "last dim strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
            "another device": lambda t: t.to("cpu" if device == "cuda" else "meta"),
        }
        for (i, arg), how in itertools.product(enumerate(args), spoilt):
            alone = name == "activation_fwd" and not gated and how in ("shorter", "another device")
            if isinstance(arg, torch.Tensor) and not alone:
                bad = (*args[:i], spoilt[how](arg), *args[i + 1 :])
                with pytest.raises((ValueError, RuntimeError)):
                    pytest.fail(f"argument {i} with {how} was taken: {overload(*bad)}")
        with pytest.raises((ValueError, RuntimeError)):
            overload(*args[:-1], len(Kind))


def test_bad_arguments():
    x = torch.zeros(3, 4)
    for op in (ops.swiglu, ops.geglu):
        with pytest.raises(ValueError, match="gate must be floating point"):
            op(x.int(), x)
        for bad in (x[:2], x.bfloat16(), x.to("meta")):
            with pytest.raises(ValueError, match="up must be like gate"):
                op(x, bad)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        ops.geglu(x, x, approximate="erf")
    for bad, kind, what in ((x[:, :3], Kind.SILU, "both must be"), (x, Kind.RELU2, "kind must be that of a gated")):
        with pytest.raises(ValueError, match=what):
            activation.gated(bad, kind)
    for op in (ops.silu, ops.relu2):
        with pytest.raises(ValueError, match="x must be floating point"):
            op(x.long())
