import math

import optim_models
import pytest
import torch
from optim_models import set_gradients, tiny
from torch import nn

from cs336.optim import AdamW, Muon, join, muon_param_groups, split, stochastic_round

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 3.4e38, 1e-45, -1e-40, 1.00390625, 1.01171875])


def every_kind_of_float():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32)
    ties = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) * 65536 + 32768
    return torch.cat([SPECIAL, bits.view(torch.float32), ties.view(torch.float32)])


def test_split_and_join_are_exact(device):
    x = every_kind_of_float().to(device)
    rounded, remainder = split(x)
    assert (rounded.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    whole = join(rounded, remainder)
    number = ~x.isnan()
    assert torch.equal(whole.view(torch.int32)[number], x.view(torch.int32)[number])
    assert whole.isnan()[~number].all()
    assert rounded.isnan()[~number].all()


def test_split_rounds_to_nearest(device):
    x = torch.randn(100_000, device=device)
    x = x[x.view(torch.int32) & 0xFFFF != 0x8000]  # of ties torch makes the even one
    assert torch.equal(split(x)[0], x.to(torch.bfloat16))
    tie = torch.tensor([1.00390625, -1.00390625], device=device)  # between 1 and the next
    assert split(tie)[0].tolist() == [1.0078125, -1.0078125]


def test_a_nan_of_all_ones_stays_nan():
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert split(nan)[0].isnan().all()
    assert stochastic_round(nan).isnan().all()


def test_stochastic_rounding_is_right_on_average(device):
    torch.manual_seed(0)
    for value in (1 + 3 / 1024, -(1 + 3 / 1024), 1e-3, 3e4):
        x = torch.full((400_000,), value, device=device)
        low, high = sorted({*stochastic_round(x).float().tolist()})
        assert low < value < high
        assert high - low == pytest.approx(2.0 ** (math.floor(math.log2(abs(value))) - 7))
        error = stochastic_round(x).double().mean().item() - x[0].item()
        assert abs(error) < 5 * (high - low) / 2 / 400_000**0.5
    exact = SPECIAL.to(device).to(torch.bfloat16)
    assert torch.equal(stochastic_round(exact.float()), exact)


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_with_the_remainder_a_step_is_that_of_float32(device, make):
    """Bit for bit: bfloat16 parameters and remainders are the float32 parameters, at every step."""
    low, full = tiny(torch.bfloat16, device), tiny(torch.float32, device)
    full.load_state_dict(low.state_dict())
    options = {} if make is AdamW else {"ns_dtype": torch.float32}
    a = make(muon_param_groups(low, 0.1), lr=1e-4, rounding="remainder", **options)
    b = make(muon_param_groups(full, 0.1), lr=1e-4, **options)
    for step in range(12):
        set_gradients([low, full], step)
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            assert torch.equal(join(p, a.state[p]["remainder"]), q)
            assert torch.equal(p, split(q.detach())[0])


def steps_of_one(p, **options):
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, **options)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach().float().mean().item()


def test_small_steps_are_not_lost():
    """100 steps of 1e-4 from 1: to nearest the weight never moves."""
    torch.manual_seed(0)
    assert steps_of_one(nn.Parameter(torch.ones(3, dtype=torch.bfloat16))) == 1.0
    many = nn.Parameter(torch.ones(50_000, dtype=torch.bfloat16))
    assert steps_of_one(many, rounding="stochastic") == pytest.approx(0.99, abs=2e-4)
    exact = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert steps_of_one(exact, rounding="remainder") == pytest.approx(0.99, abs=0.002)


def test_moments_in_bfloat16_follow_those_in_float32(device):
    torch.manual_seed(0)
    low, full = tiny(device=device), tiny(device=device)
    a = AdamW(low.parameters(), lr=1e-3, state_dtype=torch.bfloat16)
    b = AdamW(full.parameters(), lr=1e-3)
    for step in range(60):
        set_gradients([low, full], step, size=1.0 if step < 20 else 0.01)
        a.step()
        b.step()
    start = tiny(device=device)
    for p, q, s in zip(low.parameters(), full.parameters(), start.parameters(), strict=True):
        assert {a.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        assert (p - q).norm() < 0.03 * (q - s).norm()
        # A second moment that only rounds to nearest would not fall by a thousandth a step.
        ratio = a.state[p]["exp_avg_sq"].float().sum() / b.state[q]["exp_avg_sq"].sum()
        assert ratio.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("options", [{"rounding": "remainder"}, {"rounding": "stochastic"}, {}])
def test_goes_on_bit_for_bit(options):
    whole, stopped = tiny(torch.bfloat16), tiny(torch.bfloat16)
    a, b = (AdamW(m.parameters(), state_dtype=torch.bfloat16, **options) for m in (whole, stopped))
    for step in range(4):
        if step == 2:
            saved = optim_models.through_a_file(b.state_dict())
            b = AdamW(stopped.parameters())
            b.load_state_dict(saved)
            optim_models.same_state(a, b)
        set_gradients([whole, stopped], step)
        for optimizer in (a, b):
            torch.manual_seed(step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), stopped.parameters(), strict=True))
    held = [t for s in b.state.values() for name, t in s.items() if name != "step"]
    assert b.state_bytes() == sum(t.nbytes for t in held)


def test_a_step_that_fails_halfway_counts_the_half_it_made(monkeypatch):
    monkeypatch.setattr("cs336.optim.adamw._parts", lambda bucket: ([row] for row in bucket))
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = AdamW(params, lr=0.25, rounding="stochastic")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3)
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match="must have the shape"):
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1, 1]
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, True]
    optimizer.state[params[1]]["exp_avg"] = kept
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 2, 2]


def test_a_state_of_torch_keeps_the_options(device):
    net = tiny(torch.bfloat16, device)
    theirs = torch.optim.AdamW(net.parameters(), lr=0.5)
    ours = AdamW(net.parameters(), rounding="remainder", state_dtype=torch.bfloat16)
    set_gradients([net], 0)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.param_groups[0]["lr"] == 0.5
    assert all({"remainder"} < s.keys() for s in ours.state.values())
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in ours.state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rounding": "up"}, "rounding must be nearest"), ({"state_dtype": torch.float16}, "state_dtype must be")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.ones(2))], **options)
