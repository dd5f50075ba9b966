"""Steps by halves give the tokens of whole ones."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from replayed import drawn, lay_out, tokens

from cs336 import ops
from cs336.inference import SamplingParams, runner
from cs336.inference.halves import LEAST_ROWS, READ, SPARE, Halves, halves_of
from cs336.inference.scheduler import Sequence
from cs336.models import BlockConfig, PagedState, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, LatentAttentionConfig, PagedTokens
from cs336.ops import registry

BOTH = {"qk_norm": True, "logit_scale": 1.5}  # the last of which what draws tokens must see
CONFIG = TransformerConfig(64, 96, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3, **BOTH)
PROMPTS = [[5, 6, 7], [28], list(range(30)), [9] * 11, list(range(60)), [*range(40), 1]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Transformer(CONFIG).eval()


def tokens_of(model, **options):
    params = [{"temperature": 0}, {"seed": 3, "logprobs": 2}, {"seed": 4, "top_k": 5, "repetition_penalty": 1.2}]
    asked = [(prompt, SamplingParams(max_tokens=12 + i, **params[i % 3])) for i, prompt in enumerate(PROMPTS * 2)]
    return [tokens(request) for request in drawn(model, asked, max_step_tokens=40, **options)]


@pytest.mark.parametrize(
    "options", [{}, {"num_pages": 26}, {"overlap": True}, {"max_seqs": 2}, {"prefix_cache": False}]
)
def test_tokens_are_those_of_whole_steps(model, monkeypatch, options):
    """Among penalties, whose steps are not captured, cancellations, preemptions and prefixes in common."""
    laid_out = lay_out(monkeypatch)
    want = tokens_of(model, **options)
    assert not any(shape.spare for shape in laid_out)
    laid_out.clear()
    monkeypatch.setattr(runner, "halves_of", lambda model: Halves(2, 30, 7))
    seen, attention = set(), ops.paged_attention

    def spy(q, *args, spare=0, **options):
        seen.add((len(q), spare))
        return attention(q, *args, spare=spare, **options)

    monkeypatch.setattr(ops, "paged_attention", spy)
    assert tokens_of(model, **options) == want
    assert {shape.spare for shape in laid_out} == {0, 7}
    assert all(shape.rows > 1 or shape.spare == 0 for shape in laid_out)
    assert (1, 7) in seen


def test_an_odd_batch_and_an_empty_row(model, monkeypatch):
    """Halves of three rows, one of which is no sequence, against the features of each alone."""
    state = model.new_pages(8, 4)
    draw = torch.Generator().manual_seed(1)
    for layer in state.layers:
        for cache in (layer.keys, layer.values):
            cache.copy_(torch.randn(cache.shape, generator=draw))
    table, lengths = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32), [6, 0, 8]

    def batch(rows):
        own = PagedState(state.layers)
        n, length = len(rows), torch.tensor([lengths[r] for r in rows], dtype=torch.int32)
        own.tokens = PagedTokens(table[rows], length, torch.arange(n, dtype=torch.int32), length - 1, n, length)
        return torch.tensor([[7 + r for r in rows]]), own

    turns, inside = [], []
    context = PagedState.context

    @contextmanager
    def place(name):
        turns.append(name)
        inside.append(name)
        yield
        inside.pop()

    def spy(self, *args):
        assert inside, "positions are made outside of the place that reads them"
        return context(self, *args)

    with torch.inference_mode():
        places = [partial(place, "a"), partial(place, "b")]
        monkeypatch.setattr(PagedState, "context", spy)
        found = model.features_beside([batch([0]), batch([1, 2])], places)
        monkeypatch.undo()
        want = [model.features(ids, state=own)[0] for ids, own in (batch([0]), batch([1]), batch([2]))]
    torch.testing.assert_close(torch.cat([x[0] for x in found]), torch.cat(want), rtol=1e-5, atol=1e-5)
    assert turns == ["a", "b"] * (CONFIG.num_layers + 2)  # a layer of each at a time


def made(*layers, num_heads=4):
    whole = {"layers": layers} if layers else {"num_heads": num_heads}
    return Transformer(TransformerConfig(64, 96, num_layers=2, d_model=256, **whole), dtype=torch.bfloat16)


@pytest.mark.skipif(registry.missing("paged_attention", "native", torch.device("cpu")) is not None, reason="not built")
def test_models_that_are_halved(monkeypatch):
    assert halves_of(made()) is None
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    halves = halves_of(made())
    weights, kept = 2 * made().config.num_parameters(embeddings=False), made().config.state_bytes(1, 2)
    assert halves == Halves(LEAST_ROWS, int(READ * weights / kept), SPARE)
    assert halves_of(made(num_heads=8)) is None  # heads of 32 features
    assert halves_of(made().float()) is None
    assert halves_of(made(BlockConfig(AttentionConfig(4)), BlockConfig(AttentionConfig(4, window=20)))) is None
    assert halves_of(made(*[BlockConfig(LatentAttentionConfig(4, 64, 64, 32))] * 2)) is None


def test_steps_of_many_tokens_are_halved():
    halves = Halves(2, 30, 7)
    sequences = [Sequence([0], 1, SamplingParams(), computed=n) for n in (20, 9, 1)]
    assert halves.spare_of(sequences) == 7
    assert halves.spare_of(sequences[:2]) == 0
    assert halves.spare_of([*sequences[:1], *sequences[2:]]) == 0
    assert halves.spare_of([Sequence([0], 1, SamplingParams(), computed=90)]) == 0
