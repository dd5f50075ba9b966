"""cs336.enable() under Llama, Qwen3 and GPT-2 of transformers: trained, generating, compiled."""

import pytest
import torch
from tiny_models import NAMES, assert_like_its_own, generate, tiny, train

import cs336.ops.sdpa
from cs336.backend import Backend

pytest.importorskip("transformers")


@pytest.fixture
def calls(monkeypatch):
    """How often our attention ran."""
    ran, attention = [], cs336.ops.sdpa.attention
    monkeypatch.setattr(cs336.ops.sdpa, "attention", lambda *a, **k: (ran.append(1), attention(*a, **k))[1])
    return ran


@pytest.mark.parametrize("name", NAMES)
def test_trains(calls, name):
    with Backend():
        assert_like_its_own(name, train(tiny(name, "sdpa")))
    assert len(calls) == 10  # of two layers, five steps


@pytest.mark.parametrize("name", NAMES)
def test_generates(calls, name):
    with Backend():
        got = generate(tiny(name, "sdpa"))
    assert calls
    assert torch.equal(got, generate(tiny(name)))


@pytest.mark.parametrize("name", NAMES)
def test_trains_compiled(name):
    model = tiny(name, "sdpa")
    with Backend():
        losses = train(model, call=torch.compile(model, backend="aot_eager"))
    assert_like_its_own(name, losses)
