"""Mixture of experts against its formula, and its balance."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from cs336 import ops
from cs336.nn import MoEConfig, moe
from cs336.ops import registry

CONFIGS = {
    "softmax": MoEConfig(5, 2, d_ff=12),
    "not normalised": MoEConfig(5, 2, d_ff=12, normalize=False, activation="gelu", gated=False),
    "sigmoid, shared": MoEConfig(6, 3, d_ff=8, num_shared=2, router="sigmoid", scale=2.5),
    "bias": MoEConfig(4, 1, d_ff=8, balance="bias", router="sigmoid"),
    "groups": MoEConfig(6, 2, d_ff=8, num_groups=3, groups_per_token=2),
    "groups by their two best": MoEConfig(8, 3, 8, router="sigmoid", balance="bias", num_groups=2, groups_per_token=1),
    "shared behind a gate": MoEConfig(4, 2, d_ff=8, num_shared=3, shared_gate=True),
    "biases, clamped": MoEConfig(4, 2, d_ff=8, bias=True, activation="clamped_gelu", num_shared=1),
    "all of them": MoEConfig(3, 3, d_ff=8, balance="none"),
}


def built(config, d_model=16, **place):
    layer = config.build(d_model, **place)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=3.0)  # past the clamps
    if layer.balance_bias is not None:
        layer.balance_bias.normal_(std=0.3)
    return layer


def definition(layer, x):
    """Token by token, in float64."""
    config, w = layer.config, {name: t.detach().double() for name, t in layer.state_dict().items()}
    act = {"silu": F.silu, "gelu": F.gelu}.get(config.activation)

    def mlp(token, up, down, gate, biases):
        b_up, b_down, b_gate = biases
        up = up @ token + b_up
        if config.activation == "clamped_gelu":
            gated = (gate @ token + b_gate).minimum(torch.tensor(7.0))
            hidden = gated / (1 + (-1.702 * gated).exp()) * (up.clamp(-7, 7) + 1)
        else:
            hidden = act(up) if gate is None else act(gate @ token + b_gate) * up
        return down @ hidden + b_down

    def biases(name, e=None):
        """Of up, down and gate; 0 without."""
        found = [w.get(name.format(kind), torch.zeros(1)) for kind in ("up", "down", "gate")]
        return found if e is None else [b.view(config.num_experts, -1)[e] if len(b) > 1 else b for b in found]

    out = []
    for token in x.double():
        logits = w["router.weight"] @ token + w.get("router.bias", 0)
        score = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
        wanted = score + w.get("balance_bias", 0)
        if config.num_groups > 1:
            by_group = wanted.view(config.num_groups, -1)
            best = by_group.sort(-1, descending=True).values[:, : 1 if config.router == "softmax" else 2].sum(-1)
            for group in best.argsort(descending=True)[config.groups_per_token :]:
                by_group[group] = -torch.inf
        chosen = wanted.argsort(descending=True)[: config.top_k]
        weight = score[chosen] / (score[chosen].sum() if config.normalize else 1) * config.scale
        gates = w.get("experts.gate_proj")
        y = sum(
            g
            * mlp(
                token,
                *(w[f"experts.{name}"][e] for name in ("up_proj", "down_proj")),
                None if gates is None else gates[e],
                biases("experts.{}_bias", e),
            )
            for g, e in zip(weight, chosen.tolist(), strict=True)
        )
        if config.num_shared:
            up, down, gate = (w[f"shared.{name}_proj.weight"] for name in ("up", "down", "gate"))
            shared = mlp(token, up, down, gate, biases("shared.{}_proj.bias"))
            y = y + (shared * (w["shared_gate.weight"] @ token).sigmoid() if config.shared_gate else shared)
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_formula(name):
    layer, x = built(CONFIGS[name]), torch.randn(4, 7, 16)
    y, routing = layer(x)
    torch.testing.assert_close(y.double().flatten(0, 1), definition(layer, x.flatten(0, 1)), atol=1e-5, rtol=1e-4)
    assert routing.load_E[0].sum() == 28 * layer.config.top_k
    alone = torch.stack([layer(token)[0] for token in x.flatten(0, 1)[:, None]])
    torch.testing.assert_close(alone.flatten(0, 1), y.flatten(0, 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid, shared", "shared behind a gate", "biases, clamped"])
def test_gradients_in_float64(name):
    layer, x = built(CONFIGS[name], 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        y, routing = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)
        return y, routing.balance

    torch.autograd.gradcheck(call, (x.requires_grad_(), *(v.detach().requires_grad_() for v in values)))


def test_the_losses_of_the_router():
    config = MoEConfig(4, 2, d_ff=8, balance_loss=0.5, z_loss=0.1)
    layer, x = built(config), torch.randn(50, 16)
    _, routing = layer(x)
    logits = x @ layer.router.weight.T
    probability, counts = logits.softmax(-1), torch.zeros(4)
    for chosen in probability.topk(2).indices:
        counts[chosen] += 1
    assert torch.equal(routing.load_E[0], counts.long())
    torch.testing.assert_close(routing.balance, 0.5 * 4 * (counts / 100 * probability.mean(0)).sum())
    torch.testing.assert_close(routing.z, 0.1 * logits.logsumexp(-1).square().mean())
    torch.nn.init.zeros_(layer.router.weight)  # every expert is as likely
    torch.testing.assert_close(layer(x)[1].balance, torch.tensor(0.5))
    metrics = routing.metrics()
    assert metrics["router_busiest"] == counts.max() / 25
    assert (metrics["router_balance"], metrics["router_z"]) == (routing.balance, routing.z)


def test_nothing_is_dropped_where_one_expert_takes_all():
    layer, x = built(MoEConfig(4, 1, d_ff=8, normalize=False)), torch.rand(30, 16)
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.0
    y, routing = layer(x)
    assert routing.load_E[0].tolist() == [0, 0, 30, 0]
    torch.testing.assert_close(y.double(), definition(layer, x), atol=1e-5, rtol=1e-4)
    empty, none = layer(x[:0])
    assert empty.shape == (0, 16)
    assert none.balance == 0
    assert none.z == 0


def test_the_grouped_matmul_is_the_loop(monkeypatch):
    x, w = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(3, 8, 16)
    load = torch.tensor([10, 0, 14])
    loop = moe.grouped_matmul(x, w, load)
    monkeypatch.setattr(moe, "_has_grouped_mm", lambda *_: True)
    try:
        grouped = moe.grouped_matmul(x, w, load)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch's grouped matmul does not run here: {error}")
    torch.testing.assert_close(grouped, loop, atol=0.05, rtol=0.02)


def test_one_pass_where_nothing_asks_for_a_gradient(device, monkeypatch):
    layer, x = built(MoEConfig(5, 2, d_ff=24), dtype=torch.bfloat16).to(device), torch.randn(9, 16, device=device)
    x, calls, kernel = x.bfloat16(), [], ops.expert_swiglu
    args = x, torch.zeros(18, dtype=torch.int64, device=device), *[torch.zeros(0)] * 3
    if reason := registry.why_not("expert_swiglu", "triton", *args):
        pytest.skip(reason)
    monkeypatch.setattr(ops, "expert_swiglu", lambda *args: calls.append(args) or kernel(*args))
    with registry.use("triton"):
        want = layer(x)[0]
        assert not calls
        with torch.no_grad():
            got = layer(x)[0]
    assert len(calls) == 1
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def test_a_bias_evens_the_loads():
    layer, x = MoEConfig(4, 1, d_ff=8, balance="bias", router="sigmoid", bias_rate=0.02).build(16), torch.randn(400, 16)
    with torch.no_grad():
        layer.router.weight[0] += 0.5 * x.mean(0) + 0.3
    before = layer(x)[1].metrics()["router_busiest"]
    for _ in range(200):
        routing = layer(x)[1]
        moe.add_loads(layer, routing)
        moe.balance_experts(layer)
    assert routing.metrics()["router_busiest"] < min(1.2, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 6}, "top_k 6 is more than the num_experts 5 there are"),
        ({"top_k": 0}, "top_k must be a positive integer, got 0"),
        ({"router": "tanh"}, "router must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"balance": "both"}, "balance must be 'loss' or 'bias' or 'none', got 'both'"),
        ({"num_shared": -1}, "num_shared must be an integer, 0 or more, got -1"),
        ({"shared_gate": True}, "shared_gate gates the shared experts: it needs a num_shared of 1 or more"),
        ({"z_loss": -1.0}, "z_loss must be a finite number, 0 or more"),
        ({"scale": 0.0}, "scale must be a positive, finite number"),
        ({"activation": "tanh"}, "activation must be 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MoEConfig(5, 2), **change)
