"""Latent attention decodes on pages, and with them has all that pages bring: shared prefixes, chunks, drafts."""

import dataclasses
import itertools

import pytest
import torch

from cs336.inference import Engine, EngineConfig, SamplingParams
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import Context, LatentAttentionConfig, NoPositionsConfig, PagedTokens, RopeConfig
from cs336.nn.paged import Chunks
from cs336.ops import registry

MIXER = LatentAttentionConfig(3, 16, 10, 8, value_dim=6, q_rank=14)
BLOCKS = {
    "as DeepSeek's": BlockConfig(MIXER, positions=RopeConfig(interleaved=True)),
    "scaled, without positions": BlockConfig(dataclasses.replace(MIXER, scale=0.3), positions=NoPositionsConfig()),
}
PROMPTS = [[5, 6, 7], [28], list(range(30)), list(range(60)), [*range(40), 1]]


@pytest.fixture(params=BLOCKS)
def model(request):
    torch.manual_seed(4)
    layers = (BLOCKS[request.param],)
    return Transformer(TransformerConfig(97, 96, num_layers=2, d_model=32, init_std=0.3, layers=layers)).eval()


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def described(table, lengths, counts, num_decodes, fresh=0):
    """The newest `counts` tokens of sequences of these lengths: some decode, some go on, `fresh` begin."""
    ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
    places = [range(n - c, n) for n, c in zip(lengths, counts, strict=True)]
    chunks, cuts = [], (num_decodes, len(counts) - fresh, len(counts))
    for a, b in itertools.pairwise(cuts):
        inside = ints([end - ends[a] for end in ends[a : b + 1]])
        chunks.append(Chunks(slice(a, b), slice(ends[a], ends[b]), inside, max(counts[a:b])) if a < b else None)
    sequence = ints([row for row, count in enumerate(counts) for _ in range(count)])
    position = ints([at for place in places for at in place])
    return PagedTokens(table, ints(lengths), sequence, position, num_decodes, ints([0] * len(counts)), *chunks)


@pytest.mark.parametrize("variant", [None, "ref"])
@torch.no_grad()
def test_in_pages_as_whole(model, variant):
    """In float64: prompts that begin apart from the pages, chunks long and short, steps, and a page that is copied."""
    model = model.double()
    x = torch.randint(97, (2, 40))
    want, state = model(x), model.new_pages(12, 8)
    state.layers[0].keys.fill_(torch.nan)
    table = torch.randperm(10).view(2, 5).to(torch.int32)
    with registry.use(variant):
        for lengths, counts, decodes, fresh in (
            ([13, 4], [13, 4], 0, 2),
            ([14, 20], [1, 16], 1, 0),
            ([20, 26], [6, 6], 0, 0),
            ([21, 27], [1, 1], 2, 0),
        ):
            state.tokens = described(table, lengths, counts, decodes, fresh)
            rows = [slice(n - c, n) for n, c in zip(lengths, counts, strict=True)]
            got = model(torch.cat([x[b, r] for b, r in enumerate(rows)])[None], state=state)[0]
            torch.testing.assert_close(got, torch.cat([want[b, r] for b, r in enumerate(rows)]), atol=1e-9, rtol=1e-9)
        state.copy_pages(table[0, 2:3], ints([11]))
        table[0, 2] = 11
        state.tokens = described(table, [22, 9], [1, 1], 2)  # the second goes back
        got = model(torch.stack((x[0, 21], x[1, 8]))[None], state=state)[0]
        torch.testing.assert_close(got, torch.stack((want[0, 21], want[1, 8])), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("fresh_apart", [False, True])
@pytest.mark.parametrize("speculation", [None, "ngram"])
def test_the_engine_equals_full_forward(model, fresh_apart, speculation):
    config = EngineConfig(page_size=4, num_pages=40, max_seqs=4, max_step_tokens=16, speculation=speculation)
    engine = Engine(model, None, config)
    engine.runner.fresh_apart = fresh_apart  # as on a GPU
    width = MIXER.kv_rank + MIXER.rope_head_dim
    assert (engine.memory.slots, engine.memory.pages) == (0, 2 * 40 * 4 * width * 4)
    for _ in range(2):
        requests = [engine.add(prompt, SamplingParams(temperature=0, max_tokens=25)) for prompt in PROMPTS]
        while engine.busy:
            engine.step()
            engine.check()
        for prompt, request in zip(PROMPTS, requests, strict=True):
            ids = [token.id for token in request.samples[0].tokens]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            regret = logits.amax(-1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert len(ids) == 25
            assert regret.max() < 1e-3
    assert engine.stats.cached_tokens > 0
    assert speculation is None or sum(engine.stats.accepted) > 0


def test_a_row_of_latents_is_read_as_a_page(model):
    """What generate keeps, in float64, one token after a prompt, several and many; with a gradient as without."""
    mixer = model.double().layers[0].attention
    x, lengths = torch.randn(3, 30, 32, dtype=torch.float64), torch.tensor([4, 9, 7])
    for S in (1, 3, 12):
        outs = []
        for grad in (False, True):
            state = mixer.new_state(3, 24)
            with torch.set_grad_enabled(grad):
                mixer(x[:, :9], Context(lengths=torch.zeros(3, dtype=torch.int64)), state)
                outs.append(mixer(x[:, 10 : 10 + S], Context(lengths=lengths), state))
        assert outs[1].requires_grad
        torch.testing.assert_close(*outs, atol=1e-12, rtol=1e-12)


def test_pages_need_their_tokens_described(model):
    mixer = model.layers[0].attention
    with pytest.raises(ValueError, match=r"a paged state needs context.paged"):
        mixer(torch.randn(1, 3, 32), Context(), mixer.new_pages(2, 4))
