"""Drafts of another model, or of the model's first layers, change how many steps there are, and no token."""

import copy

import pytest
import torch
from test_speculation import BLOCKS, model_of

from cs336.cli.program import main
from cs336.inference import LLM, Engine, EngineConfig, SamplingParams, speculation
from cs336.inference.drafting import early_exit
from cs336.inference.engine import StepTimes
from cs336.inference.sampling import filter_logits
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3, 4] * 3, [5, 6, 7], [8]]


def greedy(prompts, **options):
    return [(ids, SamplingParams(temperature=0, max_tokens=16, **options)) for ids in prompts]


@pytest.fixture
def free(monkeypatch):
    """Drafts cost nothing, so that none is left out."""
    monkeypatch.setattr(StepTimes, "cost", lambda *_: 0.0)
    monkeypatch.setattr(StepTimes, "knows_plain", lambda *_: True)


def like(model, noise=0.02):
    """A draft model that is mostly right."""
    torch.manual_seed(11)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn_like(parameter)
    return draft


def run(model, requests, draft=None, **options):
    engine = Engine(model, None, EngineConfig(**({"page_size": 4, "max_seqs": 4} | options)), draft=draft)
    added = [engine.add(ids, params) for ids, params in requests]
    while engine.busy:
        engine.step()
        engine.check()
    return [[s.token_ids for s in request.samples] for request in added], engine


def some_were_right(engine):
    return 0 < sum(engine.stats.accepted) < sum(engine.stats.drafted)


@pytest.mark.parametrize("way", ["draft", "exit"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_greedy_is_token_identical_with_any_mixer(free, kind, way):
    model = model_of(BLOCKS[kind], seed=5)
    plain, _ = run(model, greedy(PROMPTS))
    options = {"draft": like(model)} if way == "draft" else {"exit_layer": 1}
    found, engine = run(model, greedy(PROMPTS), **options)
    assert found == plain
    assert some_were_right(engine)


@pytest.mark.parametrize("kinds", [("attention", "mamba2"), ("linear", "attention"), ("hyena", "window")])
def test_the_draft_model_may_be_of_another_kind(free, kinds):
    model, draft = (model_of(BLOCKS[kind]) for kind in kinds)
    found, engine = run(model, greedy(PROMPTS), draft)
    assert found == run(model, greedy(PROMPTS))[0]
    assert sum(engine.stats.drafted) > 0


SCHEDULES = [
    {"overlap": True},
    {"num_pages": 24, "max_step_tokens": 6},
    {"page_size": 1, "num_pages": 100, "overlap": True},
    {"draft_tokens": 1, "invariant": True, "max_seqs": 1},
]


@pytest.mark.parametrize("way", ["draft", "exit"])
@pytest.mark.parametrize("options", SCHEDULES[1:])
def test_greedy_is_token_identical_however_it_is_scheduled(free, options, way):
    model = model_of()
    requests = greedy(PROMPTS) + greedy(PROMPTS[:1], min_tokens=10, stop_token_ids=(3,))
    requests += greedy(PROMPTS[:1], repetition_penalty=1.3) + greedy(PROMPTS[1:2], stop_token_ids=(1, 2), logprobs=2)
    plain, _ = run(model, requests, **options | {"overlap": False})
    drafting = {"draft": like(model)} if way == "draft" else {"exit_layer": 1}
    found, engine = run(model, requests, **drafting, **options)
    assert found == plain
    assert engine.cache.in_use == 0
    assert sum(engine.stats.accepted) > 0


@pytest.mark.parametrize("way", ["draft", "exit"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("attention", {}), ("attention", {"num_pages": 10, "max_len": 40}), ("linear", {"num_pages": 10, "max_len": 40})],
)
def test_drafts_are_what_the_draft_model_makes_of_the_text(free, kind, options, way):
    """Its state follows the text through prefix hits, chunks, preemptions and rejections."""
    model = model_of(BLOCKS[kind], seed=7)
    draft = {"draft": like(model)} if way == "draft" else {}
    config = EngineConfig(page_size=4, max_seqs=4, max_step_tokens=8, exit_layer=None if draft else 1, **options)
    engine = Engine(model, None, config, **draft)
    make, smaller, checked = engine.drafter.draft, engine.drafter.runner.model, 0

    def draft_and_check(wanted):
        nonlocal checked
        found = make(wanted)
        for (sequence, most), drafts in zip(wanted, found, strict=True):
            with torch.inference_mode():
                logits = smaller(torch.tensor([[*sequence.token_ids, *drafts]]))[0, -len(drafts) - 1 : -1]
            assert drafts == logits.argmax(-1).tolist()
            checked += len(drafts) == most
        return found

    engine.drafter.draft = draft_and_check
    for prompts in ([[1, 2, 3], [5, 6, 7], [8], [9, 9]], [list(range(14))], [[*range(14), 3, 2]], [list(range(14))]):
        for request in greedy(prompts):
            engine.add(*request)
        while engine.busy:
            engine.step()
    assert checked > 20
    if options:
        assert engine.scheduler.num_preemptions > 0
    if kind == "attention":
        assert engine.stats.cached_tokens % 4 > 0, "no page was copied"


@pytest.mark.parametrize(
    ("way", "options"), [("draft", {"top_k": 5, "min_p": 0.05}), ("exit", {"top_p": 0.8}), ("draft", {})]
)
def test_a_seed_draws_the_same_with_drafts(free, options, way):
    params = SamplingParams(**{"temperature": 0.9, "max_tokens": 16, "n": 2, "seed": 4} | options)
    requests, model = [(ids, params) for ids in PROMPTS], model_of()
    found, engine = run(model, requests, **({"draft": like(model, 0.05)} if way == "draft" else {"exit_layer": 1}))
    assert found == run(model, requests)[0]
    assert some_were_right(engine)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("draft", {"temperature": 1.3}),
        ("exit", {"top_k": 2, "temperature": 0.7}),
        ("draft", {"top_p": 0.75}),
        ("exit", {"min_p": 0.3}),
    ],
)
def test_sampling_keeps_the_distribution(free, options, way):
    """Chi-square of what is drawn after a draft against the exact filtered probabilities of all continuations."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(4, 32, num_layers=2, d_model=16, num_heads=2, init_std=0.3)).eval()
    prompt, length, draws = [0, 1, 2, 3, 1], 3, 1200
    params = SamplingParams(**{"max_tokens": length, "n": draws, "seed": 0, "ignore_eos": True} | options)
    drafting = {"draft": like(model, 0.2)} if way == "draft" else {"exit_layer": 1}
    ((*rows,),), engine = run(model, [(prompt, params)], **drafting, max_seqs=256, page_size=16)
    assert some_were_right(engine)
    every = torch.cartesian_prod(*[torch.arange(4)] * length)
    with torch.inference_mode():
        logits = model(torch.cat((torch.tensor([prompt]).expand(len(every), -1), every), 1))[:, len(prompt) - 1 : -1]
        probs = filter_logits(logits.flatten(0, 1), params).softmax(-1).view(*logits.shape)
    exact = probs.gather(2, every[..., None])[..., 0].double().prod(1)
    place = torch.tensor([row[len(prompt) :] for row in rows]) @ torch.tensor([16, 4, 1])
    count = place.bincount(minlength=64).double()
    assert count[exact == 0].sum() == 0
    rare = exact * draws < 5
    observed, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (count, exact * draws))
    kept = expected > 0
    chi2 = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty, p = 1e-4
    assert chi2 < bound, f"chi-square {chi2:.1f}, at most {bound:.1f} with {freedom} degrees of freedom"


def test_drafts_are_as_often_right_as_the_distance_lets_them_be(free):
    """Of first drafts: at least (1 - D) / (1 + D), at most 1 - D; fewer, were they drawn with other numbers."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(16, 32, num_layers=2, d_model=16, num_heads=2, init_std=0.3)).eval()
    draft, prompt, draws = like(model, 0.1), [0, 1, 2, 3, 1], 1500
    params = SamplingParams(max_tokens=3, n=draws, seed=0, ignore_eos=True)
    _, engine = run(model, [(prompt, params)], draft, max_seqs=256, page_size=16, draft_tokens=1)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, token] for token in range(16)])
        p, q = (m(ids)[:, -2:].softmax(-1) for m in (model, draft))
    distance = float((p[0, 0] * (p[:, 1] - q[:, 1]).abs().sum(-1) / 2).sum())
    independent = float((p[0, 0] * (p[:, 1] * q[:, 1]).sum(-1)).sum())
    share, slack = engine.stats.acceptance(0), 4 * (0.25 / draws) ** 0.5
    assert (1 - distance) / (1 + distance) - slack < share < 1 - distance + slack
    assert independent < (1 - distance) / (1 + distance) - 2 * slack


def test_a_request_gives_up_a_draft_model_that_is_wrong(monkeypatch):
    monkeypatch.setattr(StepTimes, "knows_plain", lambda *_: True)
    model, draft = model_of(), model_of(seed=99)
    found, engine = run(model, greedy(PROMPTS[:1]), draft)
    assert found == run(model, greedy(PROMPTS[:1]))[0]
    assert 0 < sum(engine.stats.drafted) < 20
    assert engine.stats.steps > 10


def test_steps_without_drafts_are_measured_first():
    model = model_of()
    _, engine = run(model, [([1, 2], SamplingParams(temperature=0, max_tokens=speculation.ENOUGH))], like(model))
    assert sum(engine.stats.drafted) == 0
    requests = greedy([[1, 2]])
    added = engine.add(*requests[0])
    while not added.finished:
        engine.step()
    assert sum(engine.stats.drafted) > 0


def test_times_are_of_as_many_sequences():
    times = StepTimes(0.5)
    for _ in range(speculation.ENOUGH):
        times.add(False, 0.01, 1)
        times.add(False, 0.03, 5)
        times.add(True, 0.06, 7)
    assert times.cost(2, 1) == 1.0
    assert times.cost(2, 4) == pytest.approx(1.0)
    assert times.knows_plain(6)
    assert not times.knows_plain(8)


def test_new_weights_are_the_first_layers_too(free):
    model, other = model_of(), model_of(seed=8)
    engine = Engine(model, None, EngineConfig(page_size=4, max_seqs=4, exit_layer=1))
    engine.update_weights(other)
    added = [engine.add(*request) for request in greedy(PROMPTS)]
    while engine.busy:
        engine.step()
    assert [[s.token_ids for s in r.samples] for r in added] == run(other, greedy(PROMPTS))[0]
    assert engine.drafter.runner.model.layers[0] is engine.model.layers[0]
    weights = [m.layers[0].mlp.down_proj.weight for m in (engine.drafter.runner.model, other)]
    assert weights[0].data_ptr() == weights[1].data_ptr()


def test_what_cannot_draft_is_refused_by_name():
    model = model_of()
    with pytest.raises(ValueError, match="the draft model has 25 tokens, the model 24"):
        Engine(model, draft=Transformer(TransformerConfig(25, 96, 1, 16, num_heads=2)))
    with pytest.raises(ValueError, match="reads 48 tokens, and a sequence may have 96: lower max_len"):
        Engine(model, draft=Transformer(TransformerConfig(24, 48, 1, 16, num_heads=2)))
    with pytest.raises(ValueError, match="take one of them"):
        Engine(model, None, EngineConfig(speculation="ngram"), draft=model_of())
    with pytest.raises(ValueError, match="give one of them"):
        EngineConfig(speculation="ngram", exit_layer=1)
    with pytest.raises(ValueError, match=r"exit_layer must be in 1\.\.1, got 2"):
        early_exit(model, 2)


def test_the_memory_of_a_draft_model_is_counted():
    model, options = model_of(), {"page_size": 4, "max_seqs": 2, "max_len": 32}
    alone, beside = (
        Engine(model, None, EngineConfig(**options), draft=draft).memory.pages for draft in (None, model_of())
    )
    assert beside == 2 * alone


def test_directories_of_two_models(tmp_path, capsys):
    text = "one two three four five six seven eight nine ten " * 4
    torch.manual_seed(0)
    for name, vocab_size in (("model", 280), ("small", 280), ("other", 279)):
        tokenizer = Tokenizer.train([text], vocab_size, ["<|endoftext|>"])
        model = Transformer(TransformerConfig(tokenizer.vocab_size + 8 * (name == "small"), 64, 2, 16, num_heads=2))
        save_pretrained(model, tmp_path / name, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=20)
    plain = LLM(tmp_path / "model", quiet=True).generate([text[:30]], params)
    found = LLM(tmp_path / "model", draft=tmp_path / "small", quiet=True).generate([text[:30]], params)
    assert [output.token_ids for output in found] == [output.token_ids for output in plain]
    with pytest.raises(ValueError, match=r"token 278 is b'.*' to .*other and b'eight' to the model: they"):
        LLM(tmp_path / "model", draft=tmp_path / "other", quiet=True)
    bench = ["bench", "latency", str(tmp_path / "model"), "--draft", str(tmp_path / "small"), "--device", "cpu"]
    assert main([*bench, "--input-len", "8", "--output-len", "16", "--repeats", "1"]) == 0
    assert "drafted_tokens" in capsys.readouterr().out
