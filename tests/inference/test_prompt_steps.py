"""Steps that read prompts, laid out as those that are captured, give the tokens of those that are not."""

import pytest
import torch
from block_kinds import MIXERS
from replayed import drawn, lay_out, tokens

from cs336.inference import Engine, EngineConfig, SamplingParams, shapes
from cs336.inference.shapes import Shape, most_captured, prompt_shapes
from cs336.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(64, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3, qk_norm=True)
PROMPTS = [[5, 6, 7], [28], list(range(30)), [9] * 11, list(range(60)), [*range(40), 1], [3] * 75]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Transformer(CONFIG).eval()


@pytest.fixture
def laid_out(monkeypatch):
    monkeypatch.setattr(shapes, "PROMPTS", {4: 1, 8: 2, 32: 3})
    return lay_out(monkeypatch)


def run(model, params, **options):
    asked = [(prompt, params[i % len(params)]) for i, prompt in enumerate(PROMPTS * 2)]
    requests = drawn(model, asked, max_step_tokens=64, **options)
    return [tokens(request) for request in requests], [request.prompt_logprobs for request in requests]


PLAIN = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=3, max_tokens=9, logprobs=2),
    SamplingParams(seed=4, top_k=5, min_p=0.01, max_tokens=14),
]
ALL = [
    *PLAIN,
    SamplingParams(seed=5, max_tokens=10, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=6, min_tokens=4, stop_token_ids=(1, 2, 3)),
    SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1),
]
OPTIONS = [{}, {"num_pages": 26}, {"overlap": True}, {"max_seqs": 1}, {"prefix_cache": False}, {"invariant": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("params", [PLAIN, ALL, [*PLAIN, ALL[-1]]])
def test_tokens_are_those_of_other_steps(model, laid_out, params, options):
    """Among cancellations, preemptions, prefixes in common, and what keeps a step from being captured."""
    want = run(model, params, cuda_graphs=False, **options)
    assert not laid_out
    assert run(model, params, **options) == want
    read = [shape for shape in laid_out if shape.chunks]
    assert read
    assert params is not PLAIN or {shape.tokens for shape in read} == {4, 8, 32}
    assert all(shape.rows == (0 if options.get("max_seqs") == 1 else 5) for shape in read)


def test_what_fits_no_shape_is_not_captured(model, laid_out):
    """More tokens, more chunks; and so what needs the host."""
    cases = [([PROMPTS[6]], {}), ([PROMPTS[0]] * 4, {}), ([PROMPTS[0]], {"prompt_logprobs": 0})]
    cases += [([PROMPTS[0]], {"min_tokens": 3}), ([PROMPTS[0]], {"frequency_penalty": 0.5}), ([PROMPTS[0]] * 3, {})]
    for prompts, options in cases:
        e = Engine(model, None, EngineConfig(page_size=4, max_seqs=5, max_step_tokens=96, prefix_cache=False))
        laid_out.clear()
        for prompt in prompts:
            e.add(prompt, SamplingParams(temperature=0, max_tokens=5, **options))
        e.step()
        assert all(s.computed == s.num_prompt for s in e.scheduler.running)
        assert [shape.tokens for shape in laid_out] == ([] if (prompts, options) != cases[-1] else [32])


@pytest.mark.parametrize("name", ["latent", "linear", "experts"])
def test_other_blocks(laid_out, name):
    torch.manual_seed(5)
    config = TransformerConfig(64, 96, num_layers=2, d_model=32, layers=(MIXERS[name],) * 2, init_std=0.3)
    model = Transformer(config).eval()
    want = run(model, PLAIN, cuda_graphs=False)
    assert run(model, PLAIN) == want
    assert any(shape.chunks for shape in laid_out) == (name != "linear")  # whose state would see what fills up


@pytest.mark.parametrize(
    ("max_seqs", "tokens"), [(1, 128), (1, 16384), (8, 512), (64, 16384), (256, 16384), (256, 300)]
)
def test_shapes(max_seqs, tokens):
    for most in (0, 128, 512, 8192):
        found = prompt_shapes(max_seqs, tokens, most)
        assert all(shape.rows + shape.tokens <= tokens and 1 <= shape.chunks <= max_seqs for shape in found)
        assert [shape.tokens for shape in found] == sorted(shape.tokens for shape in found)
        assert max((shape.tokens for shape in found), default=0) <= most
        if found:
            assert found[-1].rows == (max_seqs if max_seqs > 1 else 0)
    assert Shape(4, chunks=2, tokens=8).numbers == 3 * 7 + 4 + 3 + 24


def test_large_models_fill_up_little():
    qwen = {"num_kv_heads": 8, "head_dim": 128}
    small = TransformerConfig(151936, 4096, num_layers=28, d_model=1024, num_heads=16, d_ff=3072, **qwen)
    large = TransformerConfig(151936, 4096, num_layers=36, d_model=4096, num_heads=32, d_ff=12288, **qwen)
    assert [most_captured(c, 16384) for c in (small, large)] == [8192, 512]
    assert [most_captured(small, most) for most in (8191, 512, 100)] == [4096, 512, 0]
