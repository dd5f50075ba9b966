"""The gated delta rule: its kernels, and the reference's own gradient, against the recurrence in float64."""

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref
from test_linear_attention import inputs

from cs336 import ops
from cs336.ops import chunked, registry
from cs336.ops.ref import gated_delta_rule as ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
CUDA = torch.cuda.is_available()
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
NAMES = ("q", "k", "v", "beta", "g", "initial_state")
CASES = [  # (B, G, H, T, K, V), dtype, decay, segments
    ((1, 1, 1, 2, 3, 5), F32, True, False),
    ((1, 1, 2, 130, 24, 70), F32, True, True),
    ((1, 1, 1, 65, 70, 20), BF16, True, False),
    ((2, 1, 1, 64, 16, 16), F16, False, False),
]
if CUDA:
    CASES += [((2, 4, 4, 1000, 128, 128), d, True, s) for d in (F32, BF16) for s in (False, True)]
    CASES += [((2, 1, 8, 513, 128, 64), BF16, True, False), ((1, 2, 2, 300, 64, 256), F16, True, True)]


def leaves_of(x, dtype=None):
    made = {n: None if x[n] is None else x[n].detach().to(dtype or x[n].dtype).requires_grad_() for n in NAMES}
    return made | {"segments": x["segments"]}, [t for t in made.values() if t is not None]


def token_by_token(q, k, v, beta, g, initial_state, segments):
    """In v's dtype throughout: what plain torch would do."""
    H, dtype = v.shape[1], v.dtype
    q, k = (t.repeat_interleave(H // t.shape[1], 1) for t in (q, k))
    S, os = initial_state.to(dtype), []
    for t in range(v.shape[2]):
        if segments is not None and t:
            S = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None, None], S, 0)
        if g is not None:
            S = S * torch.exp(g[:, :, t]).to(dtype)[..., None, None]
        k_t = k[:, :, t, :, None]
        missing = v[:, :, t, None] - k_t.transpose(-1, -2) @ S
        S = S + k_t @ (beta[:, :, t, None, None].to(dtype) * missing)
        os.append(q.shape[-1] ** -0.5 * (q[:, :, t, None] @ S)[..., 0, :])
    return torch.stack(os, 2), S.to(initial_state.dtype)


def in_chunks(q, k, v, beta, g, initial_state, segments):
    return chunked.linear_attention(q, k, v, g, initial_state, segments, q.shape[-1] ** -0.5, beta)


def outputs_and_gradients(function, x, grads, dtype=None):
    again, leaves = leaves_of(x, dtype)
    outs = function(**again)
    return *outs, *torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])


def rule(**x):
    return ops.gated_delta_rule(**x, return_state=True)


@pytest.mark.parametrize(("shape", "dtype", "decay", "segments"), CASES)
def test_kernels_against_fp64(device, shape, dtype, decay, segments):
    x = inputs(shape, dtype, device, decay=decay, segments=segments)
    args = (x["q"], x["k"], x["v"], x["beta"], x["g"], x["initial_state"], x["segments"], 1.0)
    if reason := registry.why_not("gated_delta_rule_fwd", "triton", *args):
        pytest.skip(reason)
    grads = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    with registry.use("ref"):
        want = outputs_and_gradients(rule, x, grads, F64)
    # In chunks too, which takes more roundings; 16 bits it would take for 32.
    torchs = outputs_and_gradients(in_chunks if dtype == F32 else token_by_token, x, grads)
    with registry.use("triton"):
        got = outputs_and_gradients(rule, x, grads)
    names = ["o", "state", *(name for name in NAMES if x[name] is not None)]
    for name, ours, wide, torchs_own in zip(names, got, want, torchs, strict=True):
        assert ours.dtype == torchs_own.dtype, name
        scale = wide.square().mean().sqrt().item()  # as in test_linear_attention.py
        if name == "g":
            scale = max(scale, (x["initial_state"] * grads[1]).abs().sum((-1, -2)).max().item())
        assert_close_to_ref(ours, wide, torchs_own, scale=scale)


@pytest.mark.parametrize("segments", [False, True])
def test_the_references_backward_is_the_gradient_of_its_forward(segments):
    x = inputs((2, 1, 2, 7, 4, 3), F64, "cpu", segments=segments)
    x |= {name: x[name].double() for name in ("beta", "g", "initial_state")}
    made, leaves = leaves_of(x)
    o, last = ref.fwd(*(made[name] for name in NAMES), made["segments"], 0.5)
    do, dlast = torch.randn_like(o), torch.randn_like(last)
    want = torch.autograd.grad((o, last), leaves, (do, dlast))
    got = ref.bwd(do, dlast, *(x[name] for name in NAMES), x["segments"], 0.5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("grad_of", [0, 1])
def test_a_gradient_of_one_output_alone(device, grad_of):
    x, leaves = leaves_of(inputs((1, 1, 1, 66, 8, 6), F32, device))
    found = []
    for variant in ("triton", "ref"):
        args = (*(x[name] for name in NAMES), x["segments"], 1.0)
        if reason := registry.why_not("gated_delta_rule_fwd", variant, *args):
            pytest.skip(reason)
        with registry.use(variant):
            found.append(torch.autograd.grad(rule(**x)[grad_of].sum(), leaves, allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_keys_that_repeat_do_not_blow_up(device):
    """The worst case for an inverse by powers: each token replaces all that the ones before wrote."""
    k = F.normalize(torch.ones(1, 1, 1, 16, device=device), dim=-1).expand(1, 1, 64, 16)
    v = torch.randn(1, 1, 64, 16, device=device)
    x = {"q": k, "k": k, "v": v, "beta": torch.ones(1, 1, 64, device=device), "scale": 1.0}
    if reason := registry.why_not("gated_delta_rule_fwd", "triton", k, k, v, x["beta"], None, None, None, 1.0):
        pytest.skip(reason)
    with registry.use("triton"):
        torch.testing.assert_close(ops.gated_delta_rule(**x), v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["triton", "ref"])
def test_raw_ops(variant, device):
    x = inputs((1, 1, 2, 66, 8, 6), F32, device, segments=True)
    args = (*(x[name] for name in NAMES), x["segments"], 0.5)
    if reason := registry.why_not("gated_delta_rule_fwd", variant, *args):
        pytest.skip(reason)
    overloads = registry.OPS["gated_delta_rule_fwd"].overloads, registry.OPS["gated_delta_rule_bwd"].overloads
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(overloads[0][variant], args, test_utils=tests)
    torch.library.opcheck(overloads[1][variant], (x["v"], x["initial_state"], *args), test_utils=tests)


def test_bad_arguments(device):
    x = inputs((1, 1, 2, 5, 8, 6), F32, device)
    with pytest.raises(ValueError, match=r"beta must be \(1, 2, 5\) on .* to fit v, got \(1, 2, 4\)"):
        ops.gated_delta_rule(**x | {"beta": x["beta"][:, :, :4]})
    wide = inputs((1, 1, 1, 5, 129, 6), F32, device)
    with registry.use("triton"), pytest.raises(NotImplementedError, match="keys of up to 128 features, not 129"):
        ops.gated_delta_rule(**wide)


def test_bad_gradients(device):
    x = inputs((1, 1, 2, 5, 8, 6), F32, device)
    overload = registry.OPS["gated_delta_rule_bwd"].overloads["ref"]
    args, do, dstate = (*(x[name] for name in NAMES), None, 0.5), torch.zeros_like(x["v"]), x["initial_state"]
    for bad, message in (
        ((do[:, :, 1:], dstate), r"do must be \(1, 2, 5, 6\) torch.float32 on"),
        ((do, dstate.double()), r"dstate must be \(1, 2, 8, 6\) torch.float32 on"),
        ((do.transpose(-1, -2).contiguous().transpose(-1, -2), dstate), "do must have its last dim contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            overload(*bad, *args)
