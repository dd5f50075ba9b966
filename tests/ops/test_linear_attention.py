"""Linear attention and the gated delta rule: chunks and kernels against the recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336 import ops
from cs336.ops import chunked, registry

CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(1, 1, 1, 2, 3, 5), (2, 1, 2, 65, 24, 70), (1, 2, 2, 64, 16, 16), (1, 1, 2, 130, 70, 20)]  # B, G, H, T, K, V
if CUDA:
    # A decay's gradient adds up whole states, so that each head has one error and not one a token: of two heads of 256
    # features torch's own was 3.6e-6 to 1.1e-5, as it happened, and ours 3.5e-6 to 6.4e-6.
    SHAPES += [(2, 4, 4, 1000, 128, 128), (2, 1, 8, 513, 128, 64), (6, 2, 4, 300, 256, 256), (3, 2, 2, 129, 64, 128)]
NAMES = ("q", "k", "v", "g", "initial_state", "segments")


def inputs(shape, dtype, device, *, decay=True, segments=False):
    B, G, H, T, K, V = shape
    q, k = torch.randn(2, B, G, T, K, device=device)
    g = -torch.rand(B, H, T, device=device) * torch.tensor([0.02, 1.0], device=device)[torch.randint(2, (B, 1, 1))]
    some = torch.randint(0, 5, (B, T)).sort(-1).values.to(device)
    return {
        "q": q.to(dtype),
        "k": F.normalize(k, dim=-1).to(dtype),
        "v": torch.randn(B, T, H, V, device=device).to(dtype).transpose(1, 2),
        "beta": torch.rand(B, H, T, device=device),
        "g": g if decay else None,
        "initial_state": torch.randn(B, H, K, V, device=device),
        "segments": some if segments else None,
    }


def in_one_matrix(q, k, v, g, initial_state, segments):
    """The same in one score matrix, T by T, in v's dtype throughout: what plain torch would do."""
    H, T, dtype = v.shape[1], v.shape[2], v.dtype
    q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    c = torch.zeros_like(v[..., 0], dtype=torch.promote_types(dtype, F32)) if g is None else g.cumsum(-1)
    seen = torch.ones(T, T, dtype=torch.bool, device=v.device).tril()
    first = last = torch.ones(1, 1, T, dtype=torch.bool, device=v.device)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
        first, last = (segments[:, None] == segments[:, None, at : at + 1] for at in (0, T - 1))
    decay = torch.exp((c[..., :, None] - c[..., None, :]).masked_fill(~seen, -torch.inf)).to(dtype)
    into, out = (torch.exp(c) * first).to(dtype), (torch.exp(c[..., -1:] - c) * last).to(dtype)
    scale, through = q.shape[-1] ** -0.5, (torch.exp(c[..., -1]) * (first & last)[..., -1])[..., None, None]
    o = scale * (q @ k.transpose(-1, -2) * decay @ v + into[..., None] * (q @ initial_state.to(dtype)))
    state = through.to(dtype) * initial_state.to(dtype) + (k * out[..., None]).transpose(-1, -2) @ v
    return o, state.to(initial_state.dtype)


@pytest.fixture(params=[*registry.NAMESPACE, "chunks"])
def variant(request, device):
    """Each variant in turn, forced; and plain torch in chunks, which runs where there is no kernel."""
    if request.param == "chunks":
        yield "chunks"
        return
    x = inputs((1, 1, 1, 2, 3, 5), F32, device)
    args = (*(x[name] for name in NAMES), 1.0)
    for name, first in (("linear_attention_fwd", ()), ("linear_attention_bwd", (x["v"], None))):
        if reason := registry.why_not(name, request.param, *first, *args):
            pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def call(variant, x):
    """(o, state) of linear attention."""
    if variant == "chunks":
        return chunked.linear_attention(*(x[name] for name in NAMES), x["q"].shape[-1] ** -0.5)
    return ops.linear_attention(**{name: x[name] for name in NAMES}, return_state=True)


def leaves_of(x, dtype=None):
    """The same with gradients to be, in another dtype if one is given; and those that linear attention takes."""
    again = dict(x)
    for name, t in x.items():
        if t is not None and t.is_floating_point():
            again[name] = t.detach().to(dtype or t.dtype).requires_grad_()
    return again, [again[name] for name in NAMES if again[name] is not None and again[name].requires_grad]


@pytest.mark.parametrize(
    ("dtype", "decay", "segments"), [(F32, True, True), (F16, False, False), (BF16, True, False), (BF16, True, True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_against_fp64(variant, device, shape, dtype, decay, segments):
    x = inputs(shape, dtype, device, decay=decay, segments=segments)
    grads = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])

    def run(function, dtype=None):
        again, leaves = leaves_of(x, dtype)
        outs = function(again)
        return (*outs, *torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]))

    with registry.use("ref"):
        want = run(lambda x: call("ref", x), torch.float64)
    with registry.use(None):
        torchs = run(lambda x: in_one_matrix(**{name: x[name] for name in NAMES}))
    names = ["o", "state", *(name for name in NAMES[:5] if x[name] is not None)]
    for name, ours, wide, torchs_own in zip(names, run(lambda x: call(variant, x)), want, torchs, strict=True):
        assert ours.dtype == torchs_own.dtype, name
        # Sums of terms that cancel have the size of a typical row, not of one that happens to be small; a decay's
        # gradient adds up a whole state.
        scale = wide.square().mean().sqrt().item()
        if name == "g":
            scale = max(scale, (x["initial_state"] * grads[1]).abs().sum((-1, -2)).max().item())
        assert_close_to_ref(ours, wide, torchs_own, scale=scale)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("T", [2, 64, 65, 130])
def test_delta_rule_in_chunks(device, T, segments):
    x = inputs((2, 2, 4, T, 8, 6), torch.float64, device, segments=segments)
    x |= {name: x[name].double() for name in ("beta", "g", "initial_state")}
    grads = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])

    def run():
        again, leaves = leaves_of(x)
        outs = ops.gated_delta_rule(**again, return_state=True)
        return *outs, *torch.autograd.grad(outs, [*leaves, again["beta"]], grads)

    ours = run()
    with registry.use("ref"):
        want = run()
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_delta_rule_replaces_what_a_key_holds():
    q = k = F.normalize(torch.randn(1, 1, 2, 8), dim=-1)[:, :, :1].expand(-1, -1, 2, -1)
    v = torch.randn(1, 1, 2, 5)
    full, half = (ops.gated_delta_rule(q, k, v, torch.full((1, 1, 2), b), scale=1.0) for b in (1.0, 0.5))
    torch.testing.assert_close(full, v)
    torch.testing.assert_close(half[:, :, 1], 0.25 * v[:, :, 0] + 0.5 * v[:, :, 1])


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_a_state_goes_on(device, op):
    x = inputs((2, 1, 2, 100, 8, 6), F32, device)
    if op == "linear_attention":
        del x["beta"]
    want, last = getattr(ops, op)(**x, return_state=True)
    state, parts = x.pop("initial_state"), []
    for a, b in ((0, 1), (1, 70), (70, 71), (71, 100)):
        part = {name: t[:, :, a:b] for name, t in x.items() if t is not None}
        o, state = getattr(ops, op)(**part, initial_state=state, return_state=True)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


def test_what_is_later_or_another_document_is_not_seen(variant, device):
    """Bit for bit."""
    x = inputs((2, 1, 2, 150, 8, 6), F32, device)
    x["segments"] = (torch.arange(150, device=device) >= 70).int().expand(2, -1)
    want = call(variant, x)[0]
    spoilt = {name: t.clone() if torch.is_tensor(t) else t for name, t in x.items()}
    for name in ("q", "k", "v", "g"):
        spoilt[name][:, :, 100:] *= 3
        spoilt[name][:, :, :70] *= 0.3
    got = call(variant, spoilt | {"initial_state": -x["initial_state"]})[0]
    assert torch.equal(got[:, :, 70:100], want[:, :, 70:100])
    assert not torch.isclose(got[:, :, 100:], want[:, :, 100:]).all(-1).any()
    assert not torch.isclose(got[:, :, :70], want[:, :, :70]).all(-1).any()


def test_graphs_name_the_op(device):
    x, _ = leaves_of(inputs((1, 1, 2, 70, 8, 6), F32, device))
    with registry.use("triton"):
        assert ops.gated_delta_rule(**x).grad_fn.name() == "_GatedDeltaRuleBackward"
        del x["beta"]
        assert ops.linear_attention(**x).grad_fn.name() == "_LinearAttentionBackward"


@pytest.mark.parametrize("grad_of", [0, 1])
def test_a_gradient_of_one_output_alone(variant, device, grad_of):
    x, leaves = leaves_of(inputs((1, 1, 2, 70, 8, 6), F32, device))
    got = torch.autograd.grad(call(variant, x)[grad_of].sum(), leaves, allow_unused=True)
    with registry.use("ref"):
        want = torch.autograd.grad(call("ref", x)[grad_of].sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "chunk"), [(F32, 64), (BF16, 128)])
def test_long_walks_in_parts(device, dtype, chunk, monkeypatch):
    x = inputs((1, 1, 3, 5 * chunk - 20, 16, 70), dtype, device)
    x["g"] = x["g"] / 100  # so that the state before a part counts after it
    if reason := registry.why_not("linear_attention_fwd", "triton", *(x[name] for name in NAMES), 1.0):
        pytest.skip(reason)

    def run():
        again, leaves = leaves_of(x)
        outs = ops.linear_attention(**{name: again[name] for name in NAMES}, return_state=True)
        return *outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    with registry.use("triton"):
        want = run()
        monkeypatch.setattr("cs336.ops.triton.linear_attention.MOST_TOKENS", 2 * chunk)
        monkeypatch.setattr("cs336.ops.triton.linear_attention.PART", 2 * chunk)
        got = run()
    assert not torch.equal(got[1], want[1])  # sums in another order
    for ours, other in zip(got, want, strict=True):
        error = (ours - other).abs().max().item()
        assert error <= (1e-5 if dtype == F32 else 2e-2) * max(1.0, other.abs().max().item())


def test_nothing(device):
    x = inputs((2, 1, 2, 5, 4, 3), F32, device)
    none = {name: x[name][:, :, :0] for name in ("q", "k", "v", "g", "beta")}
    for op in (ops.gated_delta_rule, ops.linear_attention):
        o, state = op(**none, initial_state=x["initial_state"], return_state=True)
        assert o.shape == (2, 2, 0, 3)
        assert torch.equal(state, x["initial_state"])
        none.pop("beta", None)


def test_raw_ops(variant, device):
    if variant == "chunks":
        pytest.skip("the raw ops have variants")
    x = inputs((1, 1, 2, 70, 8, 6), F32, device, segments=True)
    args = (*(x[name] for name in NAMES), 0.5)
    overloads = registry.OPS["linear_attention_fwd"].overloads, registry.OPS["linear_attention_bwd"].overloads
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(overloads[0][variant], args, test_utils=tests)
    torch.library.opcheck(overloads[1][variant], (x["v"], x["initial_state"], *args), test_utils=tests)


def test_raw_ops_refuse_bad_tensors(variant, device):
    """Each tensor argument spoilt in each way: an error, never a crash nor a result."""
    if variant == "chunks":
        pytest.skip("the raw ops have variants")
    x = inputs((1, 1, 2, 5, 8, 6), F32, device, segments=True)
    args = (*(x[name] for name in NAMES), 0.5)
    spoilt = {
        "int16": lambda t: t.short() if t.dtype.is_floating_point else t.float(),
        "one dim more": lambda t: t[None],
        "a row less": lambda t: t[:, :, :-1] if t.dim() > 2 else t[:, :-1],
        "last dim strided": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t is x["q"] else t[0],
        "another device": lambda t: t.to("cpu" if device == "cuda" else "meta"),
    }
    for name, given in (("fwd", args), ("bwd", (torch.zeros_like(x["v"]), x["initial_state"], *args))):
        overload = registry.OPS[f"linear_attention_{name}"].overloads[variant]
        overload(*given)
        for i, arg in enumerate(given):
            for how, spoil in spoilt.items() if isinstance(arg, torch.Tensor) else ():
                bad = (*given[:i], spoil(arg), *given[i + 1 :])
                with pytest.raises((ValueError, RuntimeError)):
                    pytest.fail(f"{name}'s argument {i} with {how} was taken: {overload(*bad)}")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    q, beta = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="scale must be finite, got"):
        ops.linear_attention(q, q, q, scale=scale)
    with pytest.raises(ValueError, match="scale must be finite, got"):
        ops.gated_delta_rule(q, q, q, beta, scale=scale)


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_a_decay_to_nothing(variant, device, op):
    """exp(-inf) = 0: what was before is forgotten, and nothing else changes."""
    x, leaves = leaves_of(inputs((1, 1, 2, 70, 8, 6), F32, device))
    with torch.no_grad():
        x["g"][:, :, [9, 10, 66]] = -torch.inf
    if op == "linear_attention":
        del x["beta"]
        leaves = [leaf for leaf in leaves if any(leaf is given for given in x.values())]
    results = []
    for forced in ("ref", None if variant == "chunks" else variant):
        with registry.use(forced):
            o, state = getattr(ops, op)(**x, return_state=True)
            results.append([o, state, *torch.autograd.grad(o.square().sum() + state.sum(), leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_decays_to_nothing_cost_what_follows_no_digits(device, op):
    """Of 30 in a chunk the sum is -3120, and float32 has its digits no finer than 2e-4."""
    x, leaves = leaves_of(inputs((1, 1, 2, 130, 8, 6), F32, device))
    if reason := registry.why_not("linear_attention_fwd", "triton", *(x[name] for name in NAMES), 1.0):
        pytest.skip(reason)
    with torch.no_grad():
        x["g"][:, :, 1:60:2] = -torch.inf
    if op == "linear_attention":
        del x["beta"]

    def run(forced, x, leaves):
        with registry.use(forced):
            o, state = getattr(ops, op)(**x, return_state=True)
            return [o, state, *torch.autograd.grad(o.sum() + state.sum(), leaves)]

    wide = {name: t.detach().double().requires_grad_() if torch.is_tensor(t) else t for name, t in x.items()}
    want = run("ref", wide, [wide[name] for name in NAMES[:5]])
    for ours, exact in zip(run("triton", x, leaves), want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
@pytest.mark.parametrize("forced", [None, "triton"])
def test_compiles_whole(device, op, forced):
    if forced == "triton" and (op == "gated_delta_rule" or registry.TRITON_MISSING):
        pytest.skip(registry.TRITON_MISSING or "the delta rule is in plain torch")
    x, leaves = leaves_of(inputs((1, 1, 2, 70, 8, 6), F32, device))
    if op == "linear_attention":
        del x["beta"]
    with registry.use(forced):
        want = torch.autograd.grad(getattr(ops, op)(**x).square().sum(), leaves)
        compiled = torch.compile(lambda x: getattr(ops, op)(**x).square().sum(), backend="aot_eager", fullgraph=True)
        for a, b in zip(torch.autograd.grad(compiled(x), leaves), want, strict=True):
            torch.testing.assert_close(a, b)


def test_what_does_not_fit():
    x = inputs((2, 2, 4, 5, 8, 6), F32, "cpu")
    q, k, v, g = (x[name] for name in NAMES[:4])
    for args, message in (
        ((q, k[..., :3], v), r"q and k must be one \(B, G, T, K\), floating point"),
        ((q, k, v[:, :3]), r"v must be \(2, a multiple of 2, 5, V\) to fit q \(2, 2, 5, 8\), got \(2, 3, 5, 6\)"),
        ((q, k, v.double()), "q, k and v must have one dtype and device"),
        ((q, k, v, g[..., :1]), r"g must be \(2, 4, 5\) torch.float32 on cpu, got \(2, 4, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear_attention(*args)
    with pytest.raises(ValueError, match=r"segments must be \(2, 5\) integers"):
        ops.linear_attention(q, k, v, segments=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"state must be \(2, 4, 8, 6\)"):
        ops.linear_attention(q, k, v, initial_state=torch.zeros(2, 4, 8, 5))
    with pytest.raises(ValueError, match=r"beta must be \(2, 4, 5\) on cpu to fit v"):
        ops.gated_delta_rule(q, k, v, g[:, :1])
