import optim_models
import pytest
import torch
from close import assert_close_to_ref
from optim_models import set_gradients, tiny
from torch import nn

from cs336.optim import SGD, SOAP, AdamW, Lion, LionConfig, muon_param_groups

MATRICES = ("up.weight", "down.weight", "out.weight", "gate.weight")


class Reference:
    """SOAP of one matrix, line by line."""

    def __init__(self, g, beta2, max_dim):
        self.t, self.m, self.v = 0, torch.zeros_like(g), torch.zeros_like(g)
        self.covariances = [g @ g.mT * (1 - beta2), g.mT @ g * (1 - beta2)]
        self.bases = [
            torch.linalg.eigh(c)[1].flip(-1) if len(c) <= max_dim else torch.eye(len(c), dtype=g.dtype, device=g.device)
            for c in self.covariances
        ]
        self.fixed = [len(c) > max_dim for c in self.covariances]

    def step(self, p, g, *, lr, beta1, beta2, eps, decay, frequency):
        self.t += 1
        left, right = self.bases
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * (left.mT @ g @ right) ** 2
        m, v = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
        update = left @ ((left.mT @ m @ right) / (v.sqrt() + eps)) @ right.mT
        p.copy_(p - lr * decay * p - lr * update)
        for i, gg in enumerate((g @ g.mT, g.mT @ g)):
            self.covariances[i] = beta2 * self.covariances[i] + (1 - beta2) * gg
            if self.t % frequency == 0 and not self.fixed[i]:
                self.bases[i] = torch.linalg.qr(self.covariances[i] @ self.bases[i])[0]


@pytest.mark.parametrize("max_dim", [100, 8, 1])
def test_soap_equals_the_definition_step_by_step(device, max_dim):
    """In float64. A basis is not unique where singular values are equal: the first is made by equal operations."""
    ours, plain = tiny(torch.float64, device), tiny(torch.float64, device)
    numbers = {"lr": 0.01, "betas": (0.9, 0.8), "eps": 1e-8}
    optimizer = SOAP(muon_param_groups(ours, 0.1), **numbers, frequency=3, max_dim=max_dim)
    references = {}
    for step in range(8):
        set_gradients([ours, plain], step)
        optimizer.step()
        for name in MATRICES:
            p = plain.get_parameter(name)
            if step == 0:  # the first gradient sets the bases alone
                references[name] = Reference(p.grad, 0.8, max_dim)
                continue
            with torch.no_grad():
                references[name].step(p, p.grad, lr=0.01, beta1=0.9, beta2=0.8, eps=1e-8, decay=0.1, frequency=3)
    for name in MATRICES:
        torch.testing.assert_close(ours.get_parameter(name), plain.get_parameter(name), rtol=1e-8, atol=1e-8)


def test_soap_begins_anew_after_a_first_gradient_without_bases():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = SOAP([p])
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(torch.linalg.LinAlgError):
        optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {"rows_basis", "columns_basis"} <= optimizer.state[p].keys()


def test_soap_leaves_the_rest_to_adamw():
    ours, others = tiny(), tiny()
    a = SOAP(muon_param_groups(ours, 0.1), lr=0.01)
    b = AdamW(muon_param_groups(others, 0.1), lr=0.01, betas=(0.95, 0.95))
    for step in range(3):
        set_gradients([ours, others], step)
        a.step()
        b.step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, others.get_parameter(name)) == (name not in MATRICES), name


def test_soap_without_bases_is_adam_from_the_second_gradient_on():
    ours, others = tiny(torch.float64), tiny(torch.float64)
    a = SOAP([ours.get_parameter(n) for n in MATRICES], lr=0.01, max_dim=1)
    b = AdamW([others.get_parameter(n) for n in MATRICES], lr=0.01, betas=(0.95, 0.95))
    for step in range(4):
        set_gradients([ours, others], step)
        a.step()
        if step:
            b.step()
    for name in MATRICES:
        torch.testing.assert_close(ours.get_parameter(name), others.get_parameter(name))


def test_soap_is_whitened_by_its_bases():
    """Gradients of one covariance, in whatever basis: the update is as long in every direction of it."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    scales = torch.logspace(-2, 2, 12, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(12, 30, dtype=torch.float64))
    optimizer = SOAP([p], lr=1.0, betas=(0.0, 0.99), weight_decay=0.0, frequency=1)
    for _ in range(60):
        before = p.detach().clone()
        p.grad = rotation @ (scales[:, None] * torch.randn(12, 30, dtype=torch.float64))
        optimizer.step()
    update = rotation.mT @ (p.detach() - before)
    sizes = update.square().mean(1).sqrt()
    assert sizes.max() < 4 * sizes.min()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sgd_equals_torchs(device, momentum, nesterov, dtype):
    ours, theirs, exact = tiny(dtype, device), tiny(dtype, device), tiny(torch.float64, device)
    numbers = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.01}
    optimizers = [kind(m.parameters(), **numbers) for kind, m in ((SGD, ours), (torch.optim.SGD, theirs))]
    optimizers.append(torch.optim.SGD(exact.parameters(), **numbers))
    for step in range(6):
        set_gradients([ours, theirs, exact], step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, r in zip(ours.parameters(), exact.parameters(), theirs.parameters(), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        else:
            assert_close_to_ref(p.detach(), q.detach(), r.detach())


def test_sgd_scales_gradients_on_their_way():
    first, second = tiny(), tiny()
    a, b = (SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (first, second))
    for step in range(3):
        set_gradients([first], step)
        set_gradients([second], step, size=0.25)
        a.step(grad_scale=torch.tensor(0.25))
        b.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_sgd_and_torchs_take_each_others_state():
    first, second = tiny(), tiny()
    ours = SGD(first.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    set_gradients([first, second], 0)
    ours.step()
    theirs.step()
    saved = optim_models.through_a_file(theirs.state_dict())
    theirs.load_state_dict(optim_models.through_a_file(ours.state_dict()))
    ours.load_state_dict(saved)
    optim_models.same_state(ours, theirs)
    with pytest.raises(ValueError, match=r"dampening=0\.5, which this SGD does not do"):
        ours.load_state_dict(torch.optim.SGD(first.parameters(), momentum=0.9, dampening=0.5).state_dict())
    adamw = AdamW(first.parameters())
    adamw.step()
    with pytest.raises(ValueError, match="was not saved by SGD"):
        ours.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("scale", [None, 0.25])
def test_lion_equals_the_definition(device, scale):
    ours, plain = tiny(torch.float64, device), tiny(torch.float64, device)
    optimizer = Lion(ours.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    moments = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(6):
        set_gradients([ours], step)
        set_gradients([plain], step, size=scale or 1.0)
        optimizer.step(grad_scale=None if scale is None else torch.tensor(scale))
        for p, m in zip(plain.parameters(), moments, strict=True):
            update = torch.sign(0.8 * m + 0.2 * p.grad)
            p.data -= 0.01 * (update + 0.1 * p.data)
            m.copy_(0.95 * m + 0.05 * p.grad)
    torch.testing.assert_close(list(ours.parameters()), list(plain.parameters()), rtol=1e-12, atol=1e-14)


def test_lion_rests_where_nothing_pulls_and_refuses_other_states():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 0.0, -1e-30])
    lion = Lion([p], lr=0.5)
    lion.step()
    assert p.tolist() == [0.5, 1.0, 1.5]
    p.grad = torch.tensor([float("nan"), float("inf"), 0.0])
    lion.step()
    assert torch.equal(p.isnan(), torch.tensor([True, False, False]))
    adamw = AdamW([p])
    adamw.step()
    with pytest.raises(ValueError, match="was not saved by Lion"):
        lion.load_state_dict(adamw.state_dict())
    net = tiny()
    groups = LionConfig().build(net).param_groups
    assert {p.dim(): g["weight_decay"] for g in groups for p in g["params"]} == {2: 0.3, 1: 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda m, lr: SOAP(muon_param_groups(m, 0.1), lr=lr, frequency=2, max_dim=10),
        lambda m, lr: SGD(m.parameters(), lr=lr, momentum=0.9, nesterov=True),
        lambda m, lr: Lion(m.parameters(), lr=lr, weight_decay=0.1),
    ],
)
def test_goes_on_bit_for_bit(make, dtype):
    whole, stopped = tiny(dtype), tiny(dtype)
    a, b = make(whole, 0.01), make(stopped, 0.01)
    for step in range(8):
        if step in (1, 5):
            saved = optim_models.through_a_file(b.state_dict())
            b = make(stopped, 9.0)
            b.load_state_dict(saved)
            optim_models.same_state(a, b)
        set_gradients([whole, stopped], step)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), stopped.parameters(), strict=True))
    held = [t for s in b.state.values() for name, t in s.items() if name != "step"]
    assert b.state_bytes() == sum(t.nbytes for t in held)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: SGD([p], momentum=1.0), "momentum must be in"),
        (lambda p: SGD([p], nesterov=True), "nesterov looks ahead along the momentum, and momentum is 0"),
        (lambda p: SGD([p], lr=-1), "lr must not be negative"),
        (lambda p: SGD([p], lr=float("inf")), "lr must be finite, got inf"),
        (lambda p: Lion([p], betas=(0.9, 1.0)), "betas must be two numbers"),
        (lambda p: Lion([p], weight_decay=-1), "weight_decay must not be negative"),
        (lambda p: SOAP([p], frequency=0), "frequency must be at least 1"),
        (lambda p: SOAP([p], betas=(1.0, 0.9)), "betas must be two numbers"),
    ],
)
def test_bad_numbers_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Parameter(torch.eye(2)))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    for optimizer in (SGD(table.parameters()), Lion(table.parameters()), SOAP(table.parameters())):
        with pytest.raises(ValueError, match=r"of shape \(5, 2\) is sparse"):
            optimizer.step()
