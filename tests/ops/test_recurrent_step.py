"""recurrent_step_ and causal_conv1d_step_ in every variant: token by token they are the ops of whole texts."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import registry

CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KINDS = ("plain", "constant", "token", "delta", "gated delta", "mamba2")
SHAPES = [(2, 1, 2, 5, 3), (1, 2, 2, 16, 40)]  # B, G, H, K, V
if CUDA:
    SHAPES += [(1, 8, 8, 128, 128), (2, 1, 32, 128, 64), (9, 2, 2, 100, 70), (2, 1, 1, 64, 256)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter


def tokens(shape, kind, dtype, device, T):
    """T steps' arguments: parts of one projection, as layers hand them over, and what all steps share."""
    B, G, H, K, V = shape
    sizes = (G * K, G * K, H * V, H * V, H, H)
    steps = []
    for _ in range(T):
        parts = torch.randn(B, sum(sizes), device=device).to(dtype).split(sizes, -1)
        q, k, v, gate = (x.unflatten(-1, (-1, n)) for x, n in zip(parts, (K, K, V, V), strict=False))
        step = {"q": q, "k": k, "v": v, "gate": gate}
        if kind == "constant":
            step["g"] = -torch.arange(1.0, H + 1, device=device).div(H).expand(B, H)
        elif kind not in ("plain", "delta"):
            step["g"] = parts[4]
        if "delta" in kind:
            step["beta"] = parts[5]
        steps.append(step)
    shared = {"eps": 1e-3}
    if kind in ("token", "gated delta", "mamba2"):
        shared |= {"A_log": torch.randn(H, device=device).to(dtype), "dt_bias": torch.randn(H, device=device) - 3}
    if kind == "mamba2":
        return steps, shared | {"D": torch.randn(H, device=device).to(dtype), "scale": 1.0}
    return steps, shared | {"norm": torch.rand(V, device=device).add(0.5).to(dtype)}


def whole(steps, shared, first):
    """The same of ops.linear_attention and ops.gated_delta_rule, (B, T, H, V), and the state after: in float64."""
    x = {name: torch.stack([step[name] for step in steps], 2).double() for name in steps[0]}
    gate, g, v, beta = x["gate"], x.get("g"), x["v"], x.get("beta")
    shared = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in shared.items()}
    if "A_log" in shared:
        dt = F.softplus(g + shared["dt_bias"][:, None])
        g = -torch.exp(shared["A_log"])[:, None] * dt
        v = v * dt[..., None] if "D" in shared else v
    options = {"g": g, "scale": shared.get("scale"), "initial_state": first.double(), "return_state": True}
    if beta is None:
        o, last = ops.linear_attention(x["q"], x["k"], v, **options)
    else:
        q, k = F.normalize(x["q"], dim=-1), F.normalize(x["k"], dim=-1)
        o, last = ops.gated_delta_rule(q, k, v, torch.sigmoid(beta), **options)
    if "D" in shared:
        o = o + shared["D"][:, None, None] * x["v"]
    if "norm" in shared:
        o = F.rms_norm(o, (o.shape[-1],), shared["norm"], shared["eps"])
    return (o * F.silu(gate)).transpose(1, 2), last


@pytest.fixture(params=registry.NAMESPACE)
def variant(request, device):
    memory, x = torch.zeros(1, 1, 1, 2, 2, device=device), torch.zeros(1, 1, 2, device=device)
    if reason := registry.why_not("recurrent_step_", request.param, memory, x, x, x, *[None] * 11):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_the_parallel_form(variant, device, shape, kind, dtype):
    B, _, H, K, V = shape
    steps, shared = tokens(shape, kind, dtype, device, 3)
    first = torch.randn(B, H, K, V, device=device)
    with registry.use("ref"):
        want, last = whole(steps, shared, first)
        wide, torchs = [], []  # ours in float64, and plain torch in this dtype
        states = [first.double()[:, None].clone(), first[:, None].clone()]
        for t, step in enumerate(steps):
            lengths = torch.full((B,), 7 + t, device=device)
            double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in (step | shared).items()}
            wide.append(ops.recurrent_step_(states[0], lengths=lengths, **double))
            torchs.append(ops.recurrent_step_(states[1], lengths=lengths, **step, **shared))
    torch.testing.assert_close(torch.stack(wide, 1), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(states[0][:, 0], last, atol=1e-9, rtol=1e-9)
    memory = first[:, None].clone()
    for t, step in enumerate(steps):
        y = ops.recurrent_step_(memory, lengths=torch.full((B,), 7 + t, device=device), **step, **shared)
        assert y.dtype == dtype
        assert_close_to_ref(y, want[:, t], torchs[t], scale=want.square().mean().sqrt().item())
    assert_close_to_ref(memory[:, 0], last, states[1][:, 0], scale=last.square().mean().sqrt().item())


@pytest.mark.parametrize("ints", [torch.int32, torch.int64])
def test_rows_lie_where_they_are_said_to(variant, device, ints):
    """Others stay as they are; a row of no tokens begins with zeros; a state kept for going back is read again."""
    steps, shared = tokens((3, 1, 2, 6, 5), "token", F32, device, 3)
    memory = torch.full((6, 2, 2, 6, 5), torch.nan, device=device)
    places, lengths = torch.tensor([[4, 0, 3], [2, 0, 5]], device=device, dtype=ints)
    memory[4, 0], memory[3, 1] = torch.randn(2, 2, 6, 5, device=device)
    begun = torch.stack((memory[4, 0], torch.zeros(2, 6, 5, device=device), memory[3, 1]))
    alone = begun[:, None].clone()
    kept = memory.clone()
    one = torch.ones(3, device=device, dtype=ints)
    for t, step in enumerate(steps):
        got = ops.recurrent_step_(memory, lengths=lengths + t, places=places, **step, **shared)
        want = ops.recurrent_step_(alone, lengths=one, **step, **shared)
        torch.testing.assert_close(got, want)
        rows = torch.arange(3, device=device)
        torch.testing.assert_close(memory[places.long(), (lengths.long() + t + 1) % 2], alone[rows, 0])
    assert memory[[1, 2, 5]].isnan().all()
    assert not memory[[0, 3, 4]].isnan().any()
    again = kept.clone()
    step = steps[0]
    first = ops.recurrent_step_(again, lengths=lengths, places=places, **step, **shared)
    ops.recurrent_step_(again, lengths=lengths + 1, places=places, **steps[1], **shared)
    ops.recurrent_step_(again, lengths=lengths + 1, places=places, **steps[2], **shared)  # in the second's place
    torch.testing.assert_close(first, ops.recurrent_step_(kept, lengths=lengths, places=places, **step, **shared))
    want = ops.recurrent_step_(kept, lengths=lengths + 1, places=places, **steps[2], **shared)
    row = places.long(), lengths.long() % 2
    torch.testing.assert_close(again[row], kept[row])
    assert want.isfinite().all()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("rollback", [0, 2])
@pytest.mark.parametrize(("C", "K", "dtype", "bias"), [(5, 4, F32, True), (300, 2, BF16, False), (17, 7, F16, True)])
def test_convolution_token_by_token(variant, device, C, K, dtype, bias, rollback, silu):
    x = torch.randn(3, 9, C + 2, device=device).to(dtype)[..., :C]
    weight, b = torch.randn(C, K, device=device), torch.randn(C, device=device) if bias else None
    with registry.use("ref"):
        want, torchs = (ops.causal_conv1d(t, w, u) for t, w, u in (
            (x.double(), weight.double(), None if b is None else b.double()), (x, weight, b)
        ))  # fmt: skip
        if silu:
            want, torchs = F.silu(want), F.silu(torchs)
    ring = torch.full((5, K - 1 + rollback, C), torch.nan, device=device, dtype=dtype)
    places = torch.tensor([4, 0, 2], device=device)
    for t in range(9):
        lengths = torch.full((3,), t, device=device)
        y = ops.causal_conv1d_step_(ring, x[:, t], weight, lengths, places, bias=b, silu=silu)
        assert_close_to_ref(y, want[:, t], torchs[:, t], scale=want.square().mean().sqrt().item())
    assert ring[[1, 3]].isnan().all()
    last = [(8 - k) % ring.shape[1] for k in range(min(9, ring.shape[1]))]
    assert torch.equal(ring[places][:, last], x[:, [8 - k for k in range(len(last))]])


def test_rows_that_are_not_there(variant, device):
    steps, shared = tokens((2, 1, 2, 4, 4), "token", F32, device, 1)
    memory, ring = torch.zeros(2, 1, 2, 4, 4, device=device), torch.zeros(2, 3, 5, device=device)
    lengths, x, weight = (
        torch.ones(2, device=device, dtype=torch.int64),
        torch.ones(2, 5, device=device),
        torch.ones(5, 4),
    )
    for places in ([1, 2], [-1, 1]):
        places = torch.tensor(places, device=device)
        calls = (
            lambda p: ops.recurrent_step_(memory, lengths=lengths, places=p, **steps[0], **shared),
            lambda p: ops.causal_conv1d_step_(ring, x, weight.to(device), lengths, p),
        )
        for call in calls:
            if device == "cpu":
                with pytest.raises(ValueError, match=r"places must be (below 2|0 or more)"):
                    call(places)
            elif variant != "ref":  # plain torch's indices are checked by the device
                call(places)
    if device != "cpu" and variant != "ref":
        assert not memory[0].any()
        assert not ring[0].any()
        assert memory[1].any()
        assert ring[1].any()


def test_no_rows(variant, device):
    steps, shared = tokens((0, 1, 2, 4, 4), "gated delta", F32, device, 1)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    memory = torch.ones(0, 1, 2, 4, 4, device=device)
    assert ops.recurrent_step_(memory, lengths=none, **steps[0], **shared).shape == (0, 2, 4)
    ring, weight = torch.ones(3, 3, 5, device=device), torch.ones(5, 4, device=device)
    assert ops.causal_conv1d_step_(ring, torch.zeros(0, 5, device=device), weight, none).shape == (0, 5)


def test_small_steps_stay_exact(variant, device):
    """softplus of a token that hardly moves the state: log(1 + y) would round it off."""
    one, H = torch.ones(1, 1, 4, device=device), torch.tensor([1.0], device=device)
    for bias in (-12.0, -30.0, 40.0):
        memory, log = torch.zeros(1, 1, 1, 4, 4, device=device), torch.full((1,), bias, device=device)
        v = one / max(bias, 1)
        args = {"g": torch.zeros(1, 1, device=device), "A_log": torch.zeros_like(log), "dt_bias": log, "D": 0 * H}
        y = ops.recurrent_step_(
            memory, one, one, v, torch.zeros(1, dtype=torch.int64, device=device), scale=1.0, **args
        )
        want = F.softplus(log.double(), threshold=100) * 4 * v.double()
        torch.testing.assert_close(y.double(), want.expand(1, 1, 4), rtol=2e-6, atol=0)


def test_what_is_refused():
    (step,), shared = tokens((2, 1, 2, 4, 3), "mamba2", F32, "cpu", 1)
    good = step | shared
    good |= {"memory": torch.zeros(2, 1, 2, 4, 3), "lengths": torch.zeros(2, dtype=torch.int64), "norm": torch.ones(3)}
    ops.recurrent_step_(**good)
    for name, bad, message in (
        ("q", torch.zeros(2, 4), "q and k must be one"),
        ("v", torch.zeros(2, 3, 2)[:, :, :0], "memory must be"),
        ("memory", torch.zeros(2, 1, 2, 3, 4).transpose(3, 4), "memory must be contiguous"),
        ("memory", torch.zeros(2, 1, 2, 4, 3).double(), "memory must be"),
        ("memory", torch.zeros(1, 1, 2, 4, 3), "the state has 1 rows, 2 were given"),
        ("lengths", torch.zeros(2), r"lengths must be \(2,\) int32 or int64"),
        ("lengths", torch.tensor([0, -1]), "lengths must be 0 or more, got -1"),
        ("gate", torch.zeros(2, 2, 3).double(), "gate must be"),
        ("beta", torch.zeros(2, 3), "beta must be"),
        ("norm", torch.ones(4), "norm must be"),
        ("A_log", None, "a decay of the token needs"),
        ("g", None, "a decay of the token needs"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.recurrent_step_(**good | {name: bad})
    with pytest.raises(ValueError, match="D is of a state whose steps"):
        ops.recurrent_step_(**good | {"A_log": None, "dt_bias": None})
    ring, x, weight, lengths = torch.zeros(2, 3, 5), torch.zeros(2, 5), torch.zeros(5, 4), torch.zeros(2).long()
    for args, message in (
        ((ring[:, :2], x, weight, lengths), r"ring must be \(N, 3 or more, 5\)"),
        ((ring.transpose(0, 1), x, weight, lengths), "ring must be"),
        ((ring, x[None], weight, lengths), "x must be"),
        ((ring, x, weight[:4], lengths), "weight must be"),
        ((ring, x, weight, lengths[:1]), "lengths must be"),
        ((ring[:1], x, weight, lengths), "the state has 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.causal_conv1d_step_(*args)
    x = torch.zeros(1, 1, 256)
    with registry.use("triton"), pytest.raises(NotImplementedError, match=r"up to 16384 numbers a head|interpret it"):
        ops.recurrent_step_(torch.zeros(1, 1, 1, 256, 256), x, x, x, torch.zeros(1).long())


def test_raw_ops(variant, device):
    steps, shared = tokens((2, 1, 2, 4, 3), "gated delta", F32, device, 1)
    memory, lengths = torch.zeros(3, 2, 2, 4, 3, device=device), torch.ones(2, dtype=torch.int32, device=device)
    step = {"A_log": None, "dt_bias": None, "D": None} | steps[0] | shared
    names = ("g", "A_log", "dt_bias", "beta", "D", "norm", "gate")
    args = memory, step["q"], step["k"], step["v"], lengths, lengths + 1, *(step[n] for n in names), 1.0, 1e-5
    torch.library.opcheck(registry.OPS["recurrent_step_"].overloads[variant], (args[0], *args[1:5], None, *args[6:]))
    ring, x, weight = (torch.randn(shape, device=device) for shape in ((2, 4, 5), (2, 5), (5, 4)))
    conv = registry.OPS["causal_conv1d_step_"].overloads[variant]
    torch.library.opcheck(conv, (ring, x, weight, None, lengths, None, True))


def test_compiles_and_runs_inside_inference_mode(variant, device):
    steps, shared = tokens((2, 2, 2, 8, 8), "gated delta", F32, device, 2)
    lengths = torch.ones(2, dtype=torch.int64, device=device)

    def two(memory):
        return [ops.recurrent_step_(memory, lengths=lengths + t, **step, **shared) for t, step in enumerate(steps)]

    with torch.inference_mode():
        memory = torch.randn(2, 1, 2, 8, 8, device=device)
        again = memory.clone()
        want = two(memory)
    again = again.clone()
    got = torch.compile(two, fullgraph=True, backend="aot_eager")(again)
    torch.testing.assert_close((*got, again), (*want, memory.clone()))
