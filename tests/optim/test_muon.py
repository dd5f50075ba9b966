import copy

import optim_models
import pytest
import torch
from close import assert_close_to_ref
from optim_models import set_gradients, tiny
from torch import nn

from cs336.models import Transformer, TransformerConfig
from cs336.ops import registry
from cs336.optim import AdamW, Muon, clip_scale, muon_param_groups, orthogonalize

MATRICES = ("up.weight", "down.weight", "out.weight", "gate.weight")


def polar(x):
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def with_singular_values(s, rows, columns):
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    return u * s @ v


# ---- orthogonalize ----


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (1, 4), (2, 3, 6, 4), (0, 3, 4)])
def test_polar_express_converges_to_the_polar_factor(device, shape):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    found = orthogonalize(x, steps=10, method="polar_express")
    assert found.shape == x.shape
    torch.testing.assert_close(found, polar(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "low", "high"), [("newton_schulz", 0.68, 1.21), ("polar_express", 0.85, 1.13)])
def test_singular_values_come_near_one(method, low, high):
    """Those of 0.01 to 1 of the norm, in the five steps that Muon makes; the vectors stay."""
    s = torch.logspace(-1.5, 0, 24, dtype=torch.float64)
    x = with_singular_values(s, 24, 40)
    stretch = orthogonalize(x, method=method) @ polar(x).mT  # symmetric where the vectors are x's
    torch.testing.assert_close(stretch, stretch.mT)
    found = torch.linalg.eigvalsh(stretch)
    assert low < found.min()
    assert found.max() < high


def test_each_polynomial_is_the_best_for_what_the_ones_before_it_leave():
    """Errors that are equal, of alternating sign, inside the interval and at its ends: Chebyshev's criterion.

    The first three are for an interval that begins higher, which the paper calls cushioning.
    """
    from cs336.optim.muon import POLAR_EXPRESS

    low = None
    x = torch.linspace(0, 2.5, 200_001, dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS[3:7]:
        y = a * x + b * x**3 + c * x**5
        rising = (y[1:] - y[:-1]).sign()
        highest, lowest = (y[1:-1][rising[1:] != rising[:-1]] - 1).tolist()
        assert highest == pytest.approx(-lowest, rel=1e-3)
        if low is not None:
            assert a * low + b * low**3 + c * low**5 - 1 == pytest.approx(lowest, rel=1e-3)
        low = 1 + lowest
    assert abs(lowest) < 1e-8


def test_a_batch_is_its_matrices(device):
    x = torch.randn(4, 6, 9, device=device, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x), torch.stack([orthogonalize(m) for m in x]))


def test_zeros_stay_zeros_and_scale_does_not_matter(device):
    assert torch.equal(orthogonalize(torch.zeros(3, 4, device=device)), torch.zeros(3, 4, device=device))
    x = torch.randn(5, 6, device=device, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(1e-4 * x), orthogonalize(1e4 * x), rtol=1e-3, atol=1e-3)


def test_what_is_no_matrix_is_refused():
    for x in (torch.ones(3), torch.ones(2, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., rows, columns\)"):
            orthogonalize(x)
    assert orthogonalize(torch.ones(0, 3, 2)).shape == (0, 3, 2)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="newton_schulz or polar_express, got 'svd'"):
        orthogonalize(torch.eye(2), method="svd")
    with pytest.raises(ValueError, match="newton_schulz or polar_express, got 'svd'"):
        Muon([nn.Parameter(torch.eye(2))], method="svd")


# ---- a step ----


def reference_step(p, g, m, *, lr, decay, momentum=0.95, nesterov=True, steps=5):
    """One matrix, float64, straight from the definition."""
    m.copy_(momentum * m + (1 - momentum) * g)
    u = momentum * m + (1 - momentum) * g if nesterov else m
    x = u / (u.norm() + 1e-7)
    x = x.mT if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.mT) @ x + 2.0315 * (x @ x.mT) @ (x @ x.mT) @ x
    x = x.mT if p.shape[0] > p.shape[1] else x
    p.copy_(p - lr * decay * p - lr * 0.2 * max(p.shape) ** 0.5 * x)


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_the_definition_step_by_step(device, nesterov):
    """In float64 to rounding; the rest is AdamW's, to the bit."""
    net, adamw = tiny(torch.float64, device), tiny(torch.float64, device)
    wanted = {name: p.detach().clone() for name, p in net.named_parameters()}
    momenta = {name: torch.zeros_like(wanted[name]) for name in MATRICES}
    optimizer = Muon(muon_param_groups(net, 0.1), lr=0.02, nesterov=nesterov)
    others = [p for name, p in adamw.named_parameters() if name not in MATRICES]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    beside = AdamW(groups, lr=0.02, betas=(0.9, 0.95))
    for step in range(8):
        set_gradients([net, adamw], step)
        for name in MATRICES:
            g = net.get_parameter(name).grad
            reference_step(wanted[name], g, momenta[name], lr=0.02, decay=0.1, nesterov=nesterov)
        optimizer.step()
        beside.step()
        for name, p in net.named_parameters():
            if name in MATRICES:
                torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-10, atol=1e-10)
            else:
                assert torch.equal(p, adamw.get_parameter(name)), name


def test_float32_is_as_close_as_float32_can_be():
    ours, plain, exact = tiny(), tiny(), tiny(torch.float64)
    optimizers = [Muon(muon_param_groups(m, 0.1), lr=0.02) for m in (ours, exact)]
    momenta = {name: torch.zeros_like(plain.get_parameter(name)) for name in MATRICES}
    for step in range(5):
        set_gradients([ours, plain, exact], step)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name in MATRICES:
                p = plain.get_parameter(name)
                reference_step(p, p.grad, momenta[name], lr=0.02, decay=0.1)
    for name in MATRICES:
        a, b, c = (m.get_parameter(name).detach() for m in (ours, exact, plain))
        assert_close_to_ref(a, b, c)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_follows_torchs(device):
    """torch's rounds to bfloat16 inside, so the two agree to its error."""
    ours, theirs = tiny(device=device), tiny(device=device)
    a = Muon(muon_param_groups(ours, 0.1), lr=0.01, ns_dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs.get_parameter(n) for n in MATRICES], lr=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        set_gradients([ours, theirs], step)
        a.step()
        b.step()
    start = tiny(device=device)
    for name in MATRICES:
        p, q, s = (m.get_parameter(name) for m in (ours, theirs, start))
        assert (p - q).norm() < 0.02 * (q - s).norm()


def test_updates_are_of_adamws_size():
    """RMS 0.2 lr an element, whatever the shape: what one learning rate for all rests on."""
    for shape in ((64, 64), (32, 256), (256, 32)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], lr=1.0, method="polar_express", ns_steps=8).step()
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)


def test_a_stack_of_matrices_is_its_matrices():
    stack = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))
    single = [nn.Parameter(m.detach().clone()) for m in stack]
    a, b = Muon([stack], lr=0.1), Muon(single, lr=0.1)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_grad_scale_is_that_of_the_gradients():
    first, second = tiny(torch.float64), tiny(torch.float64)
    a, b = (Muon(muon_param_groups(m, 0.1), lr=0.01) for m in (first, second))
    for step in range(3):
        set_gradients([first, second], step)
        scale = clip_scale(torch.tensor(float(step + 2)), 1.0)
        a.step(grad_scale=scale)
        for p in second.parameters():
            p.grad *= scale
        b.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_without_a_gradient_nothing_moves():
    net = tiny()
    optimizer = Muon(muon_param_groups(net, 0.1))
    before = copy.deepcopy(net.state_dict())
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not optimizer.state


def test_a_tensor_of_a_learning_rate_is_the_number():
    first, second = tiny(torch.float64), tiny(torch.float64)
    a, b = Muon(muon_param_groups(first, 0.1), lr=0.5), Muon(muon_param_groups(second, 0.1), lr=torch.tensor(0.5))
    for step in range(2):
        set_gradients([first, second], step)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_steps_where_native_kernels_are_forced(device):
    """Symmetric products have none: torch's serve."""
    if reason := registry.missing("adamw_", "native", torch.device(device)):
        pytest.skip(reason)
    nets = [tiny().to(device) for _ in range(2)]
    for forced, net in zip((None, "native"), nets, strict=True):
        optimizer = Muon(muon_param_groups(net, 0.1), lr=0.02)
        with registry.use(forced):
            for step in range(2):
                set_gradients([net], step)
                optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_learns(method):
    torch.manual_seed(0)
    net = tiny()
    optimizer = Muon(muon_param_groups(net, 0.0), lr=0.02, method=method)
    x = torch.arange(11)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), (3 * x + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- state ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "remainder"])
def test_goes_on_bit_for_bit(dtype, rounding):
    whole, stopped = tiny(dtype), tiny(dtype)
    a, b = (Muon(muon_param_groups(m, 0.1), lr=0.01, rounding=rounding) for m in (whole, stopped))
    for step in range(6):
        if step == 3:
            saved = optim_models.through_a_file(b.state_dict())
            b = Muon(muon_param_groups(stopped, 0.0), lr=9.0)
            b.load_state_dict(saved)
            optim_models.same_state(a, b)
        set_gradients([whole, stopped], step)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), stopped.parameters(), strict=True))
    optim_models.same_state(a, b)


def test_state_bytes_are_those_of_the_state():
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"rounding": "remainder"})):
        net = tiny(dtype)
        optimizer = Muon(muon_param_groups(net, 0.1), **options)
        set_gradients([net], 0)
        optimizer.step()
        held = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
        assert optimizer.state_bytes() == sum(t.nbytes for t in held)


def test_a_state_that_does_not_fit_changes_nothing():
    net = tiny()
    optimizer, other = Muon(muon_param_groups(net, 0.1)), Muon(muon_param_groups(net, 0.1), lr=5.0)
    set_gradients([net], 0)
    other.step()
    saved = other.state_dict()
    saved["state"][0]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(3,\), its parameter \(20, 8\)"):
        optimizer.load_state_dict(saved)
    saved["state"][0] = {"exp_avg": torch.zeros(20, 8)}
    with pytest.raises(ValueError, match="no momentum_buffer: it was not saved by Muon"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"momentum": 1.0}, "momentum must be in"), ({"ns_steps": 0}, "ns_steps must be"), ({"lr": -1.0}, "lr must not")],
)
def test_bad_numbers_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.eye(2))], **changed)


# ---- groups ----


def names_of(model, groups):
    names = {p: name for name, p in model.named_parameters()}
    return [sorted(names[p] for p in group["params"]) for group in groups]


def test_groups_by_the_kind_of_module():
    net = tiny()
    groups = muon_param_groups(net, 0.3)
    assert names_of(net, groups) == [
        sorted(MATRICES),
        ["embedding.weight", "head.weight"],
        ["norm.bias", "norm.weight", "up.bias"],
    ]
    assert [(g["use_muon"], g["weight_decay"]) for g in groups] == [(True, 0.3), (False, 0.3), (False, 0.0)]


def test_a_head_tied_to_the_embedding_is_adamws_whatever_its_name():
    net = tiny(tied=True)
    net.classifier = net.head
    del net.head
    assert names_of(net, muon_param_groups(net, 0.1))[1] == ["embedding.weight"]


def test_convolutions_are_adamws_and_stacks_are_muons():
    net = nn.Module()
    net.conv, net.experts, net.taps = nn.Conv1d(4, 4, 3), nn.Module(), nn.Parameter(torch.zeros(4, 1, 3))
    net.experts.weight = nn.Parameter(torch.zeros(2, 4, 5))
    assert names_of(net, muon_param_groups(net, 0.1)) == [["experts.weight"], ["conv.weight", "taps"], ["conv.bias"]]


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_of_a_transformer_has_one_group(tie):
    net = Transformer(TransformerConfig(32, 8, 2, 16, 2, tie_embeddings=tie), device="meta")
    groups = muon_param_groups(net, 0.1)
    found = [p for g in groups for p in g["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(net.parameters()))
    assert all(name.startswith("layers.") for name in names_of(net, groups)[0])
    assert len(groups[0]["params"]) == 2 * 7
