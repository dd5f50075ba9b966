"""Experts' gated units against their definition in float64, row by row."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry
from cs336.ops.expert_swiglu import pays

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (7, 5, 2, 24, 40, F32),
    (40, 3, 1, 16, 17, BF16),
    (1, 8, 3, 33, 16, F16),
    (90, 2, 2, 20, 64, BF16),
]  # N E K M F
if torch.cuda.is_available():
    CASES += [(n, 16, 4, 256, 192, dtype) for n in (1, 33, 250, 2000) for dtype in (F16, BF16)]


def inputs(N, E, K, M, width, dtype, device):
    x = torch.randn(N, M + 3, device=device).to(dtype)[:, :M]  # rows apart
    gate, up = (torch.randn(E, width, M, device=device).to(dtype) / M**0.5 for _ in range(2))
    expert = torch.rand(N, E, device=device).topk(K).indices.flatten()
    order = expert.argsort(stable=True)
    return x, order // K, torch.bincount(expert, minlength=E), gate, up


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    if reason := registry.why_not("expert_swiglu", request.param, *inputs(2, 3, 1, 8, 8, F16, device)):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


@pytest.mark.parametrize(("N", "E", "K", "M", "width", "dtype"), CASES)
def test_against_fp64(variant, device, N, E, K, M, width, dtype):
    x, token, load, gate, up = inputs(N, E, K, M, width, dtype, device)
    if reason := registry.why_not("expert_swiglu", variant, x, token, load, gate, up):
        pytest.skip(reason)
    got = ops.expert_swiglu(x, token, load, gate, up)
    expert = torch.arange(E, device=device).repeat_interleave(load)

    def by_row(x, gate, up):
        rows = x[token][:, None]
        return (F.silu(rows @ gate[expert].mT) * (rows @ up[expert].mT))[:, 0]

    assert got.dtype == dtype
    assert_close_to_ref(got, by_row(x.double(), gate.double(), up.double()), by_row(x, gate, up))


def test_does_not_pay_where_kernels_are_forced_that_it_has_none_of(device):
    with registry.use("native"):
        assert not pays(*inputs(9, 3, 2, 16, 16, BF16, device))


def test_experts_without_rows_and_one_with_all(variant, device):
    x, gate, up = (torch.randn(n, 16, device=device).half() for n in (37, 96, 96))
    gate, up = (w.view(4, 24, 16) for w in (gate, up))
    token, load = torch.arange(37, device=device).flip(0), torch.tensor([0, 0, 37, 0], device=device)
    want = F.silu(x.flip(0) @ gate[2].T) * (x.flip(0) @ up[2].T)
    torch.testing.assert_close(ops.expert_swiglu(x, token, load, gate, up), want, atol=0.1, rtol=0.01)
    none = ops.expert_swiglu(x[:0], token[:0], torch.zeros_like(load), gate, up)
    assert none.shape == (0, 24)


def test_a_token_that_is_none_is_nan(device):
    x, token, load, gate, up = inputs(6, 3, 2, 16, 8, BF16, device)
    if reason := registry.why_not("expert_swiglu", "triton", x, token, load, gate, up):
        pytest.skip(reason)
    wrong = token.clone()
    wrong[3], wrong[7] = 6, -1
    with registry.use("triton"):
        want, got = (ops.expert_swiglu(x, t, load, gate, up) for t in (token, wrong))
    bad = torch.zeros(12, dtype=torch.bool, device=device)
    bad[3] = bad[7] = True
    assert got[bad].isnan().all()
    assert torch.equal(got[~bad], want[~bad])


def test_raw_op(variant, device):
    args = inputs(5, 3, 2, 16, 8, BF16, device)
    overload = registry.OPS["expert_swiglu"].overloads[variant]
    torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[0], "x must be"),
        ("gate", lambda g: g[..., :-1], "gate must be contiguous"),
        ("up", lambda u: u[:, :-1].contiguous(), "gate and up of one shape"),
        ("up", lambda u: u.half(), "up must be torch.float32"),
        ("token", lambda t: t.int(), "token must be 1-d int64"),
        ("load", lambda n: n[:-1], "a number an expert"),
    ],
)
def test_what_does_not_fit_is_refused(device, name, change, message):
    given = dict(zip(("x", "token", "load", "gate", "up"), inputs(5, 3, 2, 16, 8, F32, device), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.expert_swiglu(**given | {name: change(given[name])})
