"""Layers that make their x themselves, as those of few rows do on a GPU: a norm, or a gate, is part of a product."""

import pytest
import torch

from cs336 import ops
from cs336.inference import LLM, SamplingParams
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, GELUConfig, LayerNormConfig, LinearAttentionConfig

ATTENTION = AttentionConfig(4, 2, qk_norm=True)
PROMPTS = [[5, 6, 7], [28], list(range(30))]


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(name, op):
        return lambda *args, **options: made.append(name) or op(*args, **options)

    for name in ("linear_normed", "linear_swiglu"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return made


def build(*blocks):
    torch.manual_seed(5)
    config = TransformerConfig(272, 96, num_layers=len(blocks), d_model=32, init_std=0.3, layers=list(blocks))
    model = Transformer(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.3)
    model.join_weights()
    return model


@pytest.mark.parametrize(
    ("block", "normed", "gated"),
    [
        (BlockConfig(ATTENTION), 5, 3),  # all norms but the first, which has nothing to add
        (BlockConfig(ATTENTION, placement="sandwich"), 5, 3),
        (BlockConfig(ATTENTION, GELUConfig()), 2, 0),
        (BlockConfig(LinearAttentionConfig(4)), 3, 3),
        (BlockConfig(ATTENTION, placement="post"), 0, 3),
        (BlockConfig(ATTENTION, placement="reordered"), 0, 3),
        (BlockConfig(ATTENTION, parallel=True), 0, 3),
        (BlockConfig(ATTENTION, norm=LayerNormConfig()), 0, 3),
    ],
    ids=lambda x: f"{x.placement}-{x.mixer.kind}-{x.mlp.kind}" if isinstance(x, BlockConfig) else None,
)
def test_they_change_nothing(monkeypatch, calls, block, normed, gated):
    model, ids = build(block, block, block), torch.randint(272, (1, 9))
    with torch.no_grad():
        want = model(ids)
    assert not calls
    monkeypatch.setattr("cs336.nn.linear.pays_fused", lambda *_: True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), want, atol=1e-4, rtol=1e-4)
    assert (calls.count("linear_normed"), calls.count("linear_swiglu")) == (normed, gated)
    calls.clear()
    model(ids)
    assert not calls  # where a gradient is wanted


def test_nor_in_the_engine(monkeypatch, calls):
    params = SamplingParams(temperature=0, max_tokens=15)
    model = build(BlockConfig(ATTENTION), BlockConfig(ATTENTION))
    want = LLM(model, quiet=True).generate(PROMPTS, params)
    monkeypatch.setattr("cs336.nn.linear.pays_fused", lambda *_: True)
    got = LLM(model, quiet=True).generate(PROMPTS, params)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    assert calls.count("linear_normed") * 2 == calls.count("linear_swiglu") * 3 > 0


def test_hooks_see_what_they_saw(monkeypatch, calls):
    monkeypatch.setattr("cs336.nn.linear.pays_fused", lambda *_: True)
    model, seen = build(BlockConfig(ATTENTION), BlockConfig(ATTENTION)), []
    model.layers[1].mlp_norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.layers[1].attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append("down"))
    with torch.no_grad():
        model(torch.randint(272, (1, 9)))
    assert seen == [(1, 9, 32), "norm", "down"]
    assert (calls.count("linear_normed"), calls.count("linear_swiglu")) == (1, 1)
