"""Runs whose linear layers multiply in floats of 8 bits."""

import pytest
import torch
from tiny_run import config, rows, train

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, Linear, MoEConfig, SwiGLU
from cs336.nn.linear import joined
from cs336.nn.quantized import train_in_fp8
from cs336.ops import registry
from cs336.training.learner import Learner

WIDE = TransformerConfig(vocab_size=32, context_length=8, num_layers=1, d_model=128, num_heads=2)


def counted(monkeypatch):
    """Shapes of the weights that linear_scaled is called with."""
    found, real = [], ops.linear_scaled
    monkeypatch.setattr(
        ops, "linear_scaled", lambda x, weight, bias=None: found.append(weight.shape) or real(x, weight, bias)
    )
    return found


def test_layers_that_pay():
    moe = BlockConfig(AttentionConfig(num_heads=2), MoEConfig(num_experts=128, top_k=2))
    shape = {"vocab_size": 32, "context_length": 8, "num_layers": 2, "d_model": 128}
    model = Transformer(TransformerConfig(**shape, layers=(moe, BlockConfig(AttentionConfig(num_heads=2)))))
    assert train_in_fp8(model.layers) == 4 + 4 + 3
    assert not any(m.fp8 for n, m in model.named_modules() if isinstance(m, Linear) and "router" in n)
    assert model.head is None or not model.head.fp8
    assert train_in_fp8(torch.nn.ModuleList([Linear(128, 120), Linear(112, 256), Linear(136, 256)])) == 0


def test_only_training_steps_round(monkeypatch):
    calls, mlp, x = counted(monkeypatch), SwiGLU(128, 256), torch.randn(16, 128)
    want = mlp(x)
    train_in_fp8(mlp)
    assert not torch.equal(mlp(x), want)
    assert calls == [(512, 128), (128, 256)]  # gate and up read x rounded once
    with torch.no_grad():
        assert torch.equal(mlp(x), want)
    with registry.invariant():
        mlp(x)
    torch.func.vmap(mlp)(x[None])
    assert len(calls) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights"])
def test_losses_are_those_of_16_bits(tmp_path, monkeypatch, precision):
    settings = {"model": WIDE, "precision": precision, "budget": "20steps", "checkpoint_interval": None}
    train(config(tmp_path, "wide", **settings))
    calls = counted(monkeypatch)
    train(config(tmp_path, "narrow", fp8=True, **settings))
    assert (384, 128) in calls  # q, k and v
    wide, narrow = (
        [row["train/loss"] for row in rows(tmp_path / name, of="train/loss")] for name in ("wide", "narrow")
    )
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.03)
    assert wide[-1] < 0.8 * wide[0]


def test_another_setting_is_another_run(tmp_path):
    train(config(tmp_path, model=WIDE, fp8=True, budget="2steps"))
    with pytest.raises(ValueError, match="fp8"):
        train(config(tmp_path, model=WIDE, budget="2steps"))


def test_compiled_layers(tmp_path):
    torch.compiler.reset()
    batch = torch.randint(32, (4, 9))
    losses = []
    for compiled in (False, True):
        learner = Learner(config(tmp_path, model=WIDE, fp8=True, precision="bf16", compile=compiled))
        losses.append([learner.update((batch[:, :-1], batch[:, 1:]), 1e-3)["loss"].item() for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_layers_that_do_more_are_called():
    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers, x = [Doubled(128, 128), Linear(128, 128), Linear(128, 128)], torch.randn(16, 128, requires_grad=True)
    for layer in layers:
        layer.fp8 = True
    for got, layer in zip(joined(x, layers), layers, strict=True):
        assert torch.equal(got, layer(x))
    seen = []
    layers[1].register_full_backward_hook(lambda *_: seen.append(1))
    sum(y.sum() for y in joined(x, layers[1:])).backward()
    assert seen == [1]


def test_numbers_of_tokens_that_are_not_multiplied_are_refused_before_the_run(tmp_path):
    for changes in ({"batch_size": 5}, {"batch_size": 6, "micro_batch_size": 3}):
        with pytest.raises(ValueError, match=r"multiples of 16, and a pass has (40|24) on each rank"):
            Learner(config(tmp_path, model=WIDE, fp8=True, **changes))


def test_nothing_to_round_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no linear layer has 128 features"):
        Learner(config(tmp_path, fp8=True))
