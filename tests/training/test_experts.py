"""The losses and loads of mixtures of experts reach the objective, its metrics and the optimizer step."""

import dataclasses

import pytest
import tiny_run
import torch
import torch.nn.functional as F

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig, moe
from cs336.training.learner import Learner
from cs336.training.objectives import NextToken


def model(mlp, **options):
    blocks = (BlockConfig(AttentionConfig(2)), BlockConfig(AttentionConfig(2), mlp))
    return TransformerConfig(31, 16, 4, 16, layers=blocks, init_std=0.2, **options)


def batch(seed=0):
    x = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(seed))
    targets = x[:, 1:].clone()
    targets[1, 3:] = -100
    return x[:, :-1], targets


def test_losses_and_metrics_reach_the_objective():
    network = Transformer(model(MoEConfig(4, 2, d_ff=8, balance_loss=0.3, z_loss=0.2)))
    x, y = batch()
    loss, count, metrics = NextToken()(network, (x, y))
    logits, routing = network(x, return_routing=True)
    entropy = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
    assert len(routing.load_E) == 2
    torch.testing.assert_close(loss, entropy + count * (routing.balance + routing.z))
    torch.testing.assert_close(metrics["cross_entropy"], entropy)
    torch.testing.assert_close(metrics["router_balance"] / count, routing.balance)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
    plain, no_routing = Transformer(TransformerConfig(31, 16, 1, 16, 2))(x, return_routing=True)
    assert (plain.shape, no_routing) == ((4, 8, 31), None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bias_goes_against_the_load(tmp_path, checkpointing):
    config = model(MoEConfig(4, 1, d_ff=8, balance="bias", router="sigmoid", bias_rate=0.01))
    run = tiny_run.config(tmp_path, model=config, batch_size=4, micro_batch_size=2)
    learner = Learner(dataclasses.replace(run, gradient_checkpointing=checkpointing))
    layers = list(moe.experts_of(learner.model))
    with torch.no_grad():
        _, routing = learner.model(batch()[0], return_routing=True)
    assert all(layer.load is None for layer in layers)  # not in training
    expected = [0.01 * torch.sign(load.float().mean() - load) for load in routing.load_E]
    values = learner.update(batch(), lr=0.0)
    for layer, bias in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.balance_bias, bias)
        assert layer.load is None
    assert values["router_busiest"] > 1
    assert values["router_balance"] == 0
    assert "layers.1.mlp.balance_bias" in learner.model.state_dict()


KINDS = {
    "softmax": MoEConfig(4, 2, d_ff=16, z_loss=0.001),
    "shared": MoEConfig(8, 2, d_ff=16, num_shared=1, router="sigmoid", scale=1.5, shared_gate=True),
    "balanced by a bias": MoEConfig(4, 2, d_ff=16, router="sigmoid", balance="bias"),
    "biases, clamped": MoEConfig(4, 2, d_ff=16, activation="clamped_gelu", bias=True),
    "one, not gated": MoEConfig(4, 1, d_ff=16, activation="gelu", gated=False),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_every_precision(tmp_path, device, kind, precision):
    """On a Hopper GPU the experts' products are torch's grouped ones in the last two, and a loop in the first."""
    changes = {"model": model(KINDS[kind]), "precision": precision, "device": device, "batch_size": 4}
    learner = Learner(tiny_run.config(tmp_path, **changes))
    losses = []
    for _ in range(12):
        values = learner.update([t.to(device) for t in batch()], lr=1e-2)
        losses.append(values["loss"].item())
        assert values["grad_norm"].isfinite()
    assert losses[-1] < 0.6 * losses[0]
    experts = learner.model.layers[1].mlp.experts
    assert all(p.grad is None or p.grad.shape == p.shape for p in experts.parameters())
    assert {p.dtype for p in experts.parameters()} == {learner.weight_dtype}
