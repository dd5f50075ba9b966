import sys

import pytest
import torch
from tiny_models import NAMES, SIZES, assert_like_its_own, generate, tiny, train

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
)

from cs336 import huggingface_attention as ours  # noqa: E402

ours.register()


@pytest.fixture
def masks(monkeypatch):
    """The masks that our attention was given."""
    seen, forward = [], ours.attention_forward

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return forward(module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register(ours.NAME, spy)
    yield seen
    transformers.AttentionInterface.register(ours.NAME, forward)


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_with_its_own_attention(masks, name):
    assert_like_its_own(name, train(tiny(name, "cs336")))
    assert masks == [None] * 10


@pytest.mark.parametrize("name", NAMES)
def test_generates_as_with_its_own_attention(masks, name):
    assert torch.equal(generate(tiny(name, "cs336")), generate(tiny(name)))
    assert masks == [None] * 64


def test_a_packed_batch_is_its_documents(masks):
    """No mask is made; each document sees itself alone."""
    ids = torch.randint(0, 64, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(1), *range(4), *range(7)]])
    model, own = tiny("llama", "cs336"), tiny("llama")
    got = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    want = own(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:1, 5:], own(input_ids=ids[:1, 5:], use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert [mask.tolist() for mask in masks] == [[0, 5, 12, 13, 17, 24]] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked(masks, side):
    ids, mask = torch.randint(0, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    got, want = (m(input_ids=ids, attention_mask=mask).logits for m in (tiny("qwen3", "cs336"), tiny("qwen3")))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    assert all(m.shape == (2, 1, 9, 9) for m in masks)


def test_sliding_window(masks):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, **SIZES, num_key_value_heads=2, sliding_window=5)
    logits = []
    for implementation in ("cs336", "eager"):
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(config)
        logits += [model(input_ids=torch.arange(14)[None]).logits, generate(model, 12)]
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(logits[1], logits[3])
    assert masks == [None] * 13


def test_sinks(masks):
    """gpt-oss, whose layers have a window in turns; its sinks learn. With padding too."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(**sizes, **SIZES, num_key_value_heads=2, sliding_window=5)
    ids, padded = torch.randint(0, 64, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    padded[1, 9:] = 0
    results = []
    for implementation in ("cs336", "eager"):
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config)
        sinks = [layer.self_attn.sinks for layer in model.model.layers]
        model(input_ids=ids, labels=ids).loss.backward()
        logits = model(input_ids=ids, attention_mask=padded).logits[padded.bool()]
        results.append([logits, *(sink.grad for sink in sinks)])
    for got, want in zip(*results, strict=True):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert [None if mask is None else mask.dim() for mask in masks] == [None, None, 4, 4]


def test_sinks_of_a_packed_batch():
    q, k, v, sinks = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(4)
    cu, module = torch.tensor([0, 4, 9], dtype=torch.int32), torch.nn.Module()
    whole, _ = ours.attention_forward(module, q, k, v, cu, s_aux=sinks)
    for rows in (slice(0, 4), slice(4, 9)):
        alone, _ = ours.attention_forward(module, *(x[:, :, rows] for x in (q, k, v)), None, s_aux=sinks)
        torch.testing.assert_close(whole[:, rows], alone)
    assert not torch.allclose(whole, ours.attention_forward(module, q, k, v, cu)[0], atol=1e-2)


def test_what_is_not_recognised_becomes_a_mask():
    padding = torch.zeros(1, dtype=torch.long)
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 6, "q_offset": 2}
    chunked = and_masks(chunked_overlay(3, padding), causal_mask_function)
    assert ours.attention_mask(**sizes, mask_function=chunked).shape == (1, 1, 4, 6)
    assert ours.attention_mask(**sizes, mask_function=causal_mask_function) is None
    assert ours.attention_mask(**sizes, mask_function=sliding_window_causal_mask_function(3)) is None
    forced = ours.attention_mask(**sizes, mask_function=causal_mask_function, allow_is_causal_skip=False)
    assert torch.equal(forced[0, 0], torch.ones(4, 6, dtype=torch.bool).tril(2))
    static_cache = sizes | {"kv_length": 9}  # the last three are not written yet
    assert not ours.attention_mask(**static_cache, mask_function=causal_mask_function)[..., 6:].any()


def test_refusals():
    q = torch.zeros(1, 2, 3, 8)
    for name in ("position_bias", "output_attentions"):
        value = True if name == "output_attentions" else torch.zeros(2, 3)
        with pytest.raises(NotImplementedError, match=name):
            ours.attention_forward(torch.nn.Module(), q, q, q, None, **{name: value})


def test_without_transformers_its_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'cs336\[hf\]'"):
        ours.register()
