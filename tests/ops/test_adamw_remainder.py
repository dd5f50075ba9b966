"""adamw_ of bfloat16 weights beside their remainders: a step of the float32 weights, bit for bit."""

import math

import pytest
import torch

from cs336.ops import adamw_, registry
from cs336.ops.ref.rounding import join, split
from cs336.optim import AdamW

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -1e-40, 1.00390625, 1.99999988, 1e-30]


@pytest.fixture(params=["native", "ref"])
def variant(request, device):
    if reason := registry.missing("adamw_remainder_", request.param, torch.device(device)):
        pytest.skip(reason)
    with registry.use(request.param):
        yield request.param


def make(shapes, device, g_dtype):
    """Weights, gradients, moments: some weights special, and those that a step moves over a tie."""
    weights = [torch.randn(shape, device=device) for shape in shapes]
    for w in weights:
        few = min(w.numel(), len(SPECIAL))
        w.view(-1)[:few] = torch.tensor(SPECIAL[:few], device=device)
    grads = [torch.randn_like(w).to(g_dtype) for w in weights]
    return weights, grads, [0.1 * torch.randn_like(w) for w in weights], [torch.rand_like(w) for w in weights]


def assert_same(weights, halves):
    for w, (p, remainder) in zip(weights, halves, strict=True):
        whole, nan = join(p, remainder), w.isnan()
        assert torch.equal(nan, p.isnan())
        assert not remainder[nan].any()
        assert torch.equal(whole.view(torch.int32)[~nan], w.view(torch.int32)[~nan])
        assert torch.equal(split(w)[0].view(torch.int16)[~nan], p.view(torch.int16)[~nan])


@pytest.mark.parametrize("g_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shapes", [[(), (0,), (7,), (2, 127), (4097,), (3, 4096)], [(3,)] * 600], ids=["few", "many"])
def test_a_step_is_that_of_float32_weights(variant, device, g_dtype, shapes):
    weights, grads, *moments = make(shapes, device, g_dtype)
    own_moments = [[m.clone() for m in ms] for ms in moments]
    halves = [split(w) for w in weights]
    params, remainders = (list(column) for column in zip(*halves, strict=True))
    scale = torch.tensor(0.37, device=device)
    for step in (1, 2, 3):
        adamw_(weights, grads, *moments, **HYPER, step=step, grad_scale=scale)
        adamw_(params, grads, *own_moments, **HYPER, step=step, grad_scale=scale, remainders=remainders)
        assert_same(weights, halves)
    for kind, own in zip(moments, own_moments, strict=True):
        assert all(torch.equal(m.nan_to_num(), o.nan_to_num()) for m, o in zip(kind, own, strict=True))


def test_weights_that_lie_anywhere(variant, device):
    weights, grads, *moments = make([(130,)], device, BF16)
    halves = [[torch.nn.functional.pad(t, (1, 1), value=7)[1:-1] for t in split(w)] for w in weights]
    own_moments = [[torch.nn.functional.pad(t, (1, 1), value=7)[1:-1] for t in ms] for ms in moments]
    adamw_(weights, grads, *moments, **HYPER, step=2)
    params, remainders = ([half[i] for half in halves] for i in (0, 1))
    adamw_(params, grads, *own_moments, **HYPER, step=2, remainders=remainders)
    assert_same(weights, halves)
    assert all(t._base[[0, -1]].tolist() == [7, 7] for t in (*params, *remainders, own_moments[0][0]))


def test_the_optimizer_makes_these_steps(device):
    """With state that is saved and loaded between; CPUs make them in float32 copies."""
    torch.manual_seed(0)
    start = [torch.randn(5, 13, device=device), torch.randn(3, device=device)]
    start = [join(p, torch.zeros_like(p, dtype=torch.int16)) for p in (w.bfloat16() for w in start)]
    wide, low = [w.clone() for w in start], [w.bfloat16() for w in start]
    of_wide = AdamW(wide, lr=1e-3, weight_decay=0.1)
    of_low = AdamW(low, lr=1e-3, weight_decay=0.1, rounding="remainder")
    for step in range(4):
        for w, p in zip(wide, low, strict=True):
            p.grad = torch.randn_like(p)
            w.grad = p.grad.float()
        of_wide.step()
        of_low.step()
        assert_same(wide, [(p, of_low.state[p]["remainder"]) for p in low])
        if step == 1:
            saved = of_low.state_dict()
            of_low = AdamW(low, lr=1e-3, weight_decay=0.1, rounding="remainder")
            of_low.load_state_dict(saved)


def test_what_does_not_fit_is_refused(variant, device):
    weights, grads, *moments = make([(4, 6)], device, F32)
    p, remainder = split(weights[0])
    good = {"params": [p], "remainders": [remainder]}
    spoilt = [
        {"params": [weights[0]]},
        {"params": [p.half()]},
        {"remainders": [remainder.int()]},
        {"remainders": [remainder[:2]]},
        {"remainders": [remainder.t().contiguous().t()]},
        {"remainders": []},
        {"remainders": [remainder.to("meta")]},
    ]
    for wrong in spoilt:
        arguments = good | wrong
        with pytest.raises((ValueError, RuntimeError), match=r"params|remainders"):
            adamw_(
                arguments["params"], grads, *moments, **HYPER, step=1, remainders=arguments["remainders"]
            )  # fmt: skip
    assert torch.equal(join(p, remainder)[~weights[0].isnan()], weights[0][~weights[0].isnan()])


def test_raw_op(variant, device):
    _, grads, *moments = make([(4, 6)], device, F32)
    p, remainder = split(torch.randn(4, 6, device=device))
    numbers = torch.tensor(3.0, device=device), torch.tensor(1e-2, device=device)
    args = [p], [remainder], grads, *moments, [numbers[0]], numbers[1], None, 0.9, 0.95, 1e-8, 0.1
    torch.library.opcheck(
        registry.OPS["adamw_remainder_"].overloads[variant], args, test_utils=("test_schema", "test_faketensor")
    )
