"""Speculation changes how many steps there are, and no token; what is drawn behind drafts is distributed as ever."""

import itertools

import pytest
import torch
from replayed import lay_out

from cs336.inference import LLM, Engine, EngineConfig, SamplingParams
from cs336.inference.sampling import filter_logits
from cs336.inference.speculation import COST, CREDIT, PromptLookup, Speculator, StepTimes
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import (
    AlibiConfig,
    AttentionConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MoEConfig,
)

CONFIG = TransformerConfig(24, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.2)
PROMPTS = [[1, 2, 3, 4] * 6, [5, 6, 7] * 5 + [5], [8], [*list(range(20)), 0, 1, 2], [9] * 12]
BLOCKS = {
    "attention": BlockConfig(AttentionConfig(4, 2)),
    "window": BlockConfig(AttentionConfig(4, 2, window=6)),
    "alibi": BlockConfig(AttentionConfig(4, 2), positions=AlibiConfig()),
    "latent": BlockConfig(LatentAttentionConfig(2, 16, 12, rope_head_dim=8)),
    "sinks": BlockConfig(AttentionConfig(4, 2, sinks=True)),
    "linear": BlockConfig(LinearAttentionConfig(2, 8)),
    "retention": BlockConfig(LinearAttentionConfig(2, 8, decay="head", conv_size=0)),
    "delta": BlockConfig(LinearAttentionConfig(2, 8, delta=True)),
    "mixture": BlockConfig(AttentionConfig(4, 2), mlp=MoEConfig(4, 2, 16)),
    "mamba2": BlockConfig(Mamba2Config(head_dim=8, state_dim=8)),
    "hyena": BlockConfig(HyenaConfig(96)),
}


def model_of(block=None, seed=3):
    torch.manual_seed(seed)
    return Transformer(
        CONFIG if block is None else TransformerConfig(24, 96, 2, 32, init_std=0.2, layers=(block,))
    ).eval()


def run(model, requests, **options):
    engine = Engine(model, None, EngineConfig(**({"page_size": 4, "max_seqs": 4} | options)))
    added = [engine.add(ids, params) for ids, params in requests]
    while engine.busy:
        engine.step()
        engine.check()
    return [[s.token_ids for s in request.samples] for request in added], engine


def greedy(prompts, **options):
    return [(ids, SamplingParams(temperature=0, max_tokens=40, **options)) for ids in prompts]


@pytest.mark.parametrize("kind", BLOCKS)
def test_greedy_is_token_identical_with_any_mixer(kind):
    model = model_of(BLOCKS[kind], seed=5)
    plain, without = run(model, greedy(PROMPTS))
    found, engine = run(model, greedy(PROMPTS), speculation="ngram")
    assert found == plain
    assert sum(engine.stats.accepted) > 0
    assert engine.stats.steps < without.stats.steps
    assert sum(engine.stats.accepted) < sum(engine.stats.drafted), "no state was cut back"


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"num_pages": 24, "max_step_tokens": 6},
        {"page_size": 1, "num_pages": 150, "overlap": True},
        {"draft_tokens": 1},
        {"invariant": True},
        {"prefix_cache": False, "max_seqs": 1},
    ],
)
def test_greedy_is_token_identical_however_it_is_scheduled(options):
    model = model_of()
    requests = greedy(PROMPTS) + greedy(PROMPTS[:2], min_tokens=10, stop_token_ids=(3,))
    requests += greedy(PROMPTS[:2], repetition_penalty=1.3) + greedy(PROMPTS[:2], stop_token_ids=(1, 2))
    requests += greedy(PROMPTS[:1], logprobs=2)
    plain, _ = run(model, requests, **options | {"overlap": False})
    found, engine = run(model, requests, speculation="ngram", **options)
    assert found == plain
    assert engine.cache.in_use == 0


@pytest.fixture
def laid_out(monkeypatch):
    return lay_out(monkeypatch)


CASES = [(kind, {}) for kind in BLOCKS]
CASES += [("attention", {"max_seqs": 1}), ("attention", {"num_pages": 24}), ("latent", {"draft_tokens": 2})]
CASES += [("attention", {"invariant": True})]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_captured_steps_verify_drafts_of_states_in_pages(laid_out, kind, options):
    model = model_of(BLOCKS[kind], seed=5)
    requests = greedy(PROMPTS) + greedy(PROMPTS[:2], stop_token_ids=(1, 2), logprobs=2)
    requests += [(ids, SamplingParams(top_k=9, seed=4, max_tokens=40)) for ids in PROMPTS]
    plain, _ = run(model, requests, cuda_graphs=False, **options)
    laid_out.clear()
    found, engine = run(model, requests, speculation="ngram", **options)
    assert found == plain
    assert 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted)
    wide = 1 + options.get("draft_tokens", 7)
    assert {shape.width for shape in laid_out} == ({1, wide} if engine.runner.state.is_paged else {1})


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.01}, {"frequency_penalty": 0.01}, {"logit_bias": {3: 0.1}}, {"min_tokens": 40}],
)
def test_logits_that_depend_on_what_is_drawn_are_not_drafted_for(options):
    model = model_of()
    found, engine = run(model, greedy(PROMPTS, **options), speculation="ngram")
    assert found == run(model, greedy(PROMPTS, **options))[0]
    assert sum(engine.stats.drafted) == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.6, "min_p": 0.05}])
def test_a_seed_draws_the_same_with_speculation(options):
    params = SamplingParams(**{"temperature": 0.9, "max_tokens": 40, "n": 3, "seed": 4} | options)
    requests = [(ids, params) for ids in PROMPTS]
    model = model_of()
    found, engine = run(model, requests, speculation="ngram")
    assert found == run(model, requests)[0]
    assert 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.3}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.75}, {"top_k": 4, "top_p": 0.9}]
)
def test_sampling_keeps_the_distribution(options):
    """Chi-square of continuations against the product of the filtered probabilities of all of them."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(4, 32, num_layers=1, d_model=16, num_heads=2, init_std=0.3)).eval()
    prompt = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0]  # all pairs, so that there is always a draft
    length, draws = 4, 2000
    params = SamplingParams(
        **{"temperature": 1.0, "max_tokens": length, "n": draws, "seed": 0, "ignore_eos": True} | options
    )
    ((*rows,),), engine = run(model, [(prompt, params)], speculation="ngram", max_seqs=256, page_size=16)
    assert engine.stats.drafted[1] > 0
    assert 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted)
    every = list(itertools.product(range(4), repeat=length))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *rest] for rest in every]))[:, len(prompt) - 1 : -1]
        probs = filter_logits(logits.flatten(0, 1), params).softmax(-1).view(*logits.shape)
    exact = probs.gather(2, torch.tensor(every)[..., None])[..., 0].double().prod(1)
    place = {rest: i for i, rest in enumerate(every)}
    count = torch.zeros(len(every), dtype=torch.float64)
    for row in rows:
        count[place[tuple(row[len(prompt) :])]] += 1
    assert count[exact == 0].sum() == 0
    rare = exact * draws < 5
    observed = torch.cat((count[~rare], count[rare].sum()[None]))
    expected = torch.cat((exact[~rare], exact[rare].sum()[None])) * draws
    kept = expected > 0
    chi2 = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty, p = 1e-4
    assert chi2 < bound, f"chi-square {chi2:.1f}, at most {bound:.1f} with {freedom} degrees of freedom"


def test_a_request_gives_up_what_does_not_pay():
    speculator, steps, spent = Speculator(7), 0, 0
    while speculator.pays:
        assert speculator.draft([1, 2, 3, 1, 2]) == [3, 1, 2, 3, 1, 2, 3][: speculator.length]
        spent += speculator.length
        speculator.learn(0, StepTimes().cost(speculator.length))
        steps += 1
    assert steps > 3
    assert spent < 20
    assert speculator.draft([1, 2, 3, 1, 2]) == []
    other = Speculator(7)
    for _ in range(50):
        other.learn(other.length, 1.0)
    assert other.credit == CREDIT
    assert other.length == 7


def test_what_was_given_up_is_watched_and_tried_again():
    speculator, text = Speculator(7), [1, 2, 3, 4, 5, 6, 7, 8, 9] * 2
    while speculator.pays:
        speculator.learn(0, 1.0)
    for token in (1, 2, 3):  # as was to be expected
        assert speculator.draft(text) == speculator.draft(text) == []
        text.append(token)
    text.append(7)  # and not 4
    assert speculator.draft(text) == []
    for token in (8, 9, 1, 2, 3):  # behind 7, 8 as expected
        assert speculator.draft(text) == []
        text.append(token)
    assert speculator.draft(text) == [7]
    assert 0 < speculator.credit < CREDIT


def test_steps_overlap_where_nothing_is_drafted(monkeypatch):
    """Only before a draft and while it is verified does the host wait for the newest token."""
    texts, waited = [[*range(12)], [1, 2, 3, 4] * 4], []
    for text in texts:
        engine = Engine(model_of(), None, EngineConfig(speculation="ngram", overlap=True))
        monkeypatch.setattr(PromptLookup, "draft", lambda self, ids, most, t=text: [5] * most if t[0] else [])
        engine.add(text, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        in_flight = []
        while engine.busy:
            engine.step()
            in_flight.append(len(engine._in_flight))
        waited.append(in_flight)
    assert waited[0] == [1] * 12 + [0]
    assert set(waited[1][:3]) == {0}


def test_the_cost_is_measured():
    times = StepTimes()
    for _ in range(4):
        assert times.cost(3) == 3 * COST
        times.add(False, 0.01)
        times.add(True, 0.015)
    times.add(True, 1.0)  # one that was interrupted
    assert times.cost(3) == pytest.approx(0.5)
    for _ in range(20):
        times.add(True, 0.04)
    assert times.cost(3) == pytest.approx(3)


def test_lookup_takes_the_longest_and_newest():
    lookup = PromptLookup()
    text = [1, 2, 3, 9, 5, 2, 3, 8, 7, 2, 3]
    assert lookup.draft(text, 3) == [8, 7, 2]
    assert lookup.draft([*text, 9, 5, 2], 2) == [3, 8]  # 9, 5, 2 and not the newer 5, 2
    assert PromptLookup().draft([1, 2, 3], 4) == []
    assert PromptLookup().draft([4, 4, 4], 4) == [4, 4, 4, 4]


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"draft_tokens must be in 1\.\.7, got 8"):
        EngineConfig(draft_tokens=8)
    with pytest.raises(ValueError, match="'ngram' or None, got 'eagle'"):
        LLM(model_of(), quiet=True, speculation="eagle")


def test_metrics_tell_acceptance_by_place():
    metrics = pytest.importorskip("cs336.inference.server.metrics", exc_type=ImportError)
    _, engine = run(model_of(), greedy(PROMPTS), speculation="ngram")
    told = metrics.Metrics(engine).render().decode()
    assert f"cs336_drafted_tokens_total {float(sum(engine.stats.drafted))}" in told
    assert f"cs336_accepted_tokens_total {float(sum(engine.stats.accepted))}" in told
    share = engine.stats.accepted[2] / engine.stats.drafted[2]
    assert 0 < share < 1
    assert f'cs336_draft_acceptance{{place="3"}} {share}' in told
