"""The engine's tokens are those of full forward passes, whatever is batched, cut in chunks, found or begun anew."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336 import ops
from cs336.inference import Engine, EngineConfig, SamplingParams
from cs336.inference.shapes import graph_sizes
from cs336.models import BlockConfig, Transformer, TransformerConfig, huggingface
from cs336.nn import (
    AlibiConfig,
    AttentionConfig,
    GELUConfig,
    HyenaConfig,
    LatentAttentionConfig,
    LayerNormConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MoEConfig,
    PagedTokens,
)
from cs336.tokenizer import Tokenizer

CONFIG = TransformerConfig(272, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
PROMPTS = [[5, 6, 7], [28], list(range(30)), [9] * 11, list(range(60)), [*range(40), 1]]
GREEDY = SamplingParams(temperature=0, max_tokens=15)
SMALL = {"page_size": 4, "max_seqs": 4, "max_step_tokens": 9}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def alone(model):
    """What full forward passes give, token by token, greedily: of a prompt, so many."""
    known = {}

    @torch.inference_mode()
    def continuation(prompt, count):
        key = tuple(prompt)
        ids = known.get(key, list(prompt))
        while len(ids) < len(prompt) + count:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        known[key] = ids
        return ids[len(prompt) : len(prompt) + count]

    return continuation


def engine(model, tokenizer=None, **options):
    return Engine(model, tokenizer, EngineConfig(**({"page_size": 16, "max_seqs": 8} | options)))


def run(engine):
    while engine.busy:
        engine.step()
        engine.check()


def ids_of(request):
    return [[token.id for token in sample.tokens] for sample in request.samples]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"max_step_tokens": 7, "max_seqs": 3},
        SMALL | {"num_pages": 24},
        {"page_size": 8, "num_pages": 13},
        {"page_size": 1, "max_seqs": 6, "num_pages": 150},
    ],
)
def test_equals_full_forward(model, alone, options, overlap):
    e = engine(model, overlap=overlap, **options)
    for _ in range(2):  # the second time from what the first left in the pages
        requests = [e.add(prompt, GREEDY) for prompt in PROMPTS]
        run(e)
        for prompt, request in zip(PROMPTS, requests, strict=True):
            assert ids_of(request) == [alone(prompt, 15)]
            assert request.samples[0].finish_reason == "length"
        assert e.cache.in_use == 0
    hits = [request.samples[0].cached for request in requests]
    assert hits == [0] * 6 if options.get("prefix_cache") is False else hits[2] == 29


def test_joined_weights_change_nothing(model, alone, tmp_path):
    other = Transformer(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    other.join_weights()  # as on a GPU
    q, k = other.layers[0].attention.q_proj.weight, other.layers[0].attention.k_proj.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    e = engine(other, max_step_tokens=16)
    requests = [e.add(prompt, GREEDY) for prompt in PROMPTS]
    run(e)
    assert [ids_of(r) for r in requests] == [[alone(p, 15)] for p in PROMPTS]
    huggingface.save_pretrained(other, tmp_path)
    read = huggingface.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(read[name], x) for name, x in model.state_dict().items())


def test_sequences_that_begin_may_attend_without_the_pages(model, alone):
    e = engine(model, overlap=True, max_step_tokens=50)
    e.runner.fresh_apart = True  # as on a GPU
    for _ in range(2):
        requests = [e.add(prompt, GREEDY) for prompt in PROMPTS]
        run(e)
        assert [ids_of(r) for r in requests] == [[alone(p, 15)] for p in PROMPTS]


@pytest.mark.parametrize(
    "block",
    [
        BlockConfig(AttentionConfig(4, 2, window=6)),
        BlockConfig(
            AttentionConfig(4, 1, softcap=5.0, scale=0.4, qk_norm="all", sinks=True), GELUConfig(), placement="sandwich"
        ),
        BlockConfig(AttentionConfig(4, qkv_bias=True), MoEConfig(4, 2), LayerNormConfig(), parallel=True),
    ],
)
def test_other_blocks_equal_full_forward(block):
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(272, 96, num_layers=2, d_model=32, init_std=0.3, layers=(block,))).eval()
    e = engine(model, overlap=True, max_step_tokens=16, num_pages=10)
    assert e.memory.pages == e.runner.state.nbytes
    requests = [e.add(prompt, GREEDY) for prompt in PROMPTS]
    run(e)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        (ids,) = ids_of(request)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        assert ids == logits.argmax(-1).tolist()


MIXERS = {
    "latent": BlockConfig(LatentAttentionConfig(4, 16, 8, 8)),
    "alibi": BlockConfig(AttentionConfig(4, 2), positions=AlibiConfig()),
    "linear": BlockConfig(LinearAttentionConfig(2, conv_size=4)),
    "delta": BlockConfig(LinearAttentionConfig(2, decay="head", delta=True, conv_size=0)),
    "mamba2": BlockConfig(Mamba2Config(state_dim=8, head_dim=16)),
    "hyena": BlockConfig(HyenaConfig(filter_length=20)),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_equals_full_forward(name, overlap):
    """Beside attention with a window, in chunks, with preemptions, and again in slots that others have left."""
    torch.manual_seed(2)
    blocks = (BlockConfig(AttentionConfig(4, 2, window=7)), MIXERS[name])
    model = Transformer(TransformerConfig(272, 96, num_layers=2, d_model=32, init_std=0.3, layers=blocks)).eval()
    e = engine(model, overlap=overlap, page_size=4, num_pages=30, max_seqs=4, max_step_tokens=16)
    assert e.memory.pages + e.memory.slots == e.runner.state.nbytes
    for _ in range(2):
        requests = [e.add(prompt, dataclasses.replace(GREEDY, max_tokens=25)) for prompt in PROMPTS]
        run(e)
        for prompt, request in zip(PROMPTS, requests, strict=True):
            (ids,) = ids_of(request)
            assert len(ids) == 25
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            regret = logits.amax(-1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert regret.max() < 1e-3
        assert e.cache.in_use == 0
    assert e.scheduler.num_preemptions > 0


def test_a_mixer_alone_and_its_new_weights():
    config = TransformerConfig(272, 96, num_layers=1, d_model=32, init_std=0.3, layers=(MIXERS["hyena"],))
    torch.manual_seed(3)
    models = [Transformer(config).eval() for _ in range(2)]
    fresh = engine(models[1])
    e = engine(models[0])
    for each in (e, fresh):
        each.add(PROMPTS[2], GREEDY)
        run(each)
    e.update_weights(dict(models[1].named_parameters()))
    after, want = e.add(PROMPTS[3], GREEDY), fresh.add(PROMPTS[3], GREEDY)
    for each in (e, fresh):
        run(each)
    assert ids_of(after) == ids_of(want)
    assert e.memory.pages == 0


def test_preemption_begins_anew_and_changes_nothing(model, alone):
    e = engine(model, page_size=4, num_pages=26, max_seqs=4, overlap=True)
    requests = [e.add([i] * 8, dataclasses.replace(GREEDY, max_tokens=30)) for i in range(4)]
    run(e)
    assert e.scheduler.num_preemptions > 0
    for i, request in enumerate(requests):
        assert ids_of(request) == [alone([i] * 8, 30)]


def test_a_page_is_copied_where_prompts_part_within_it(model, alone):
    e = engine(model)
    first = e.add([*range(20)], GREEDY)
    run(e)
    second = e.add([*range(25)], GREEDY)
    third = e.add([*range(18), 99, 98], GREEDY)
    run(e)
    assert [second.samples[0].cached, third.samples[0].cached] == [20, 18]
    for request in (first, second, third):
        assert ids_of(request) == [alone(request.prompt_token_ids, 15)]


@pytest.mark.timeout(120)
def test_a_page_to_copy_does_not_keep_a_request_out_of_a_full_pool(model, alone):
    """All pages are this prompt's: the one that it shares a beginning with cannot be held beside them."""
    e = engine(model, page_size=4, max_len=8, num_pages=2)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 9, 5, 6, 7]]
    for prompt in prompts:
        request = e.add(prompt, dataclasses.replace(GREEDY, max_tokens=1))
        run(e)
        assert ids_of(request) == [alone(prompt, 1)]
        assert e.cache.in_use == 0


def test_late_comers_join(model, alone):
    e = engine(model, overlap=True, max_step_tokens=16)
    requests = []
    for prompt in PROMPTS:
        requests.append(e.add(prompt, GREEDY))
        e.step()
        e.step()
    run(e)
    assert [ids_of(r) for r in requests] == [[alone(p, 15)] for p in PROMPTS]


@pytest.mark.parametrize("overlap", [False, True])
def test_ends(model, alone, overlap):
    want = alone([5, 6, 7], 15)
    at = next(i for i in range(3, 15) if want[i] not in want[:i])
    e = engine(model, overlap=overlap)
    params = dataclasses.replace(GREEDY, stop_token_ids=(want[at],), logprobs=0)
    stopped, later = e.add([5, 6, 7], params), e.add([5, 6, 7], dataclasses.replace(params, min_tokens=at + 2))
    run(e)
    output = stopped.output().outputs[0]
    assert (output.token_ids, output.finish_reason, output.end.id) == (want[:at], "stop", want[at])
    assert [t.id for t in output.logprobs] == want[:at]
    tokens = later.output().token_ids
    assert tokens[:at] == want[:at]
    assert tokens[at] != want[at]  # it was not allowed yet
    assert want[at] not in tokens
    full = e.add(list(range(90)), dataclasses.replace(GREEDY, max_tokens=50))
    run(e)
    assert ids_of(full) == [alone(list(range(90)), 6)]
    assert full.output().finish_reason == "length"


def test_seeds(model):
    params = SamplingParams(temperature=3.0, max_tokens=12, seed=7, n=3)
    together, alone_ = engine(model, overlap=True), engine(model, max_seqs=1)
    many = [together.add(p, params) for p in PROMPTS]
    run(together)
    samples = ids_of(many[2])
    assert len({tuple(ids) for ids in samples}) == 3
    for i, ids in enumerate(samples):
        one = alone_.add(PROMPTS[2], dataclasses.replace(params, seed=7 + i, n=1))
        run(alone_)
        assert ids_of(one) == [ids]
    torch.manual_seed(0)
    a, b = (together.add([1], dataclasses.replace(params, seed=None)) for _ in range(2))
    state = torch.get_rng_state()
    together.add([1], GREEDY)
    assert torch.equal(torch.get_rng_state(), state)
    run(together)
    assert len({tuple(ids) for ids in ids_of(a) + ids_of(b)}) == 6


def test_log_probabilities(model):
    prompt = list(range(20, 43))
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=3)
    for options in ({}, {"max_step_tokens": 8}):
        e = engine(model, **options)
        e.add(prompt, GREEDY)
        request = e.add(prompt, params)
        run(e)
        output = request.output()
        ids = prompt + output.token_ids
        with torch.inference_mode():
            want = model(torch.tensor([ids]))[0].log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        for i, token in enumerate(output.prompt_logprobs[1:] + output.outputs[0].logprobs, 1):
            assert token.id == ids[i]
            assert token.logprob == pytest.approx(want[i - 1, ids[i]].item(), abs=1e-4)
            top = want[i - 1].topk(3 if i < len(prompt) else 2)
            assert [t for t, _ in token.top] == top.indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_scores_after_a_prefix_that_is_known(model):
    e = engine(model)
    params = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    whole = e.add(list(range(50)), params)
    run(e)
    e.stats.prompt_tokens = 0
    part = e.add(list(range(50)), params, score_from=40)
    run(e)
    assert e.stats.prompt_tokens == 50 - 39
    assert part.prompt_logprobs[:40] == [None] * 40
    a, b = ([token.logprob for token in r.prompt_logprobs[40:]] for r in (whole, part))
    assert a == pytest.approx(b, abs=1e-4)


def test_penalties_and_biases(model, alone):
    want = alone([5, 6, 7], 1)[0]
    e = engine(model, overlap=True)
    forbid = e.add([5, 6, 7], dataclasses.replace(GREEDY, logit_bias={want: -100}))
    force = e.add([5, 6, 7], dataclasses.replace(GREEDY, logit_bias={200: 100}))
    never_twice = e.add([5, 6, 7], dataclasses.replace(GREEDY, presence_penalty=100.0))
    unlike = e.add([5, 6, 7], dataclasses.replace(GREEDY, repetition_penalty=1e6, frequency_penalty=1.0))
    plain = e.add([5, 6, 7], GREEDY)
    run(e)
    assert want not in ids_of(forbid)[0]
    assert ids_of(force) == [[200] * 15]
    assert len(set(ids_of(never_twice)[0])) == 15
    assert not {5, 6, 7} & set(ids_of(unlike)[0])
    assert ids_of(plain) == [alone([5, 6, 7], 15)]


def test_penalties_survive_preemption(model):
    params = dataclasses.replace(GREEDY, presence_penalty=100.0, max_tokens=30)
    e = engine(model, page_size=4, num_pages=26, max_seqs=4, overlap=True)
    requests = [e.add([i] * 8, params) for i in range(4)]
    run(e)
    assert e.scheduler.num_preemptions > 0
    assert all(len(set(ids_of(r)[0])) == 30 for r in requests)


@pytest.mark.parametrize("overlap", [False, True])
def test_cancelled_requests_leave_no_page(model, alone, overlap):
    e = engine(model, overlap=overlap, **SMALL)
    requests = [e.add(p, dataclasses.replace(GREEDY, n=2)) for p in PROMPTS]
    for step in range(200):
        e.step()
        if step == 3:
            for request in (requests[0], requests[4], requests[5]):
                e.cancel(request)
        e.check()
    assert not e.busy
    assert e.cache.in_use == 0
    for i in (1, 2, 3):
        assert ids_of(requests[i]) == [alone(PROMPTS[i], 15)] * 2
    assert requests[4].output().finish_reason == "cancelled"


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_workload_keeps_the_books(model, alone, data):
    size = data.draw(st.sampled_from([1, 3, 8]))
    e = engine(
        model,
        page_size=size,
        num_pages=data.draw(st.integers(-(-40 // size), 120 // size)),
        max_len=40,
        max_seqs=data.draw(st.integers(1, 4)),
        max_step_tokens=data.draw(st.integers(4, 20)),
        overlap=data.draw(st.booleans()),
        prefix_cache=data.draw(st.booleans()),
    )
    e.scheduler.together = data.draw(st.integers(1, 5))
    live, cancelled = [], set()
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["add", "step", "step", "cancel"]))
        if action == "add":
            prompt = [1, 2, 3][: data.draw(st.integers(1, 3))] * data.draw(st.integers(1, 12))
            live.append(e.add(prompt, dataclasses.replace(GREEDY, max_tokens=data.draw(st.integers(1, 12)))))
        elif action == "cancel" and live:
            e.cancel(request := live[data.draw(st.integers(0, len(live) - 1))])
            cancelled.add(request)
        e.step()
        e.check()
    run(e)
    assert e.cache.in_use == 0
    assert sorted(e.scheduler._slots) == list(range(e.config.max_seqs))
    for request in live:
        ids, prompt = ids_of(request)[0], request.prompt_token_ids
        assert ids == alone(prompt, len(ids))
        assert request in cancelled or len(ids) == min(request.params.max_tokens, 40 - len(prompt))


def test_text_and_stop_strings(model):
    e = engine(model, TOKENIZER)
    whole = e.add([104, 105], SamplingParams(temperature=2.0, seed=3, max_tokens=40))
    run(e)
    text = whole.output().text
    assert text == TOKENIZER.decode(whole.output().token_ids)
    stop = text[20:23]
    cut = e.add([104, 105], dataclasses.replace(whole.params, stop=stop))
    updates = []
    while e.busy:
        updates += e.step()
    output = cut.output()
    assert (output.text, output.finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(update.text for update in updates) == output.text


def test_other_weights_without_a_restart(model, alone):
    torch.manual_seed(9)
    other = Transformer(CONFIG).eval()
    serving = Transformer(CONFIG).eval()
    serving.load_state_dict(model.state_dict())
    e = engine(serving, overlap=True)
    before = e.add(PROMPTS[2], GREEDY)
    run(e)
    assert ids_of(before) == [alone(PROMPTS[2], 15)]
    under_way = e.add(PROMPTS[3], GREEDY)
    for _ in range(5):
        e.step()
    e.update_weights(other)
    run(e)
    e.check()
    fresh = engine(other)
    wanted = fresh.add(PROMPTS[2], GREEDY)
    seen = [*PROMPTS[3], *alone(PROMPTS[3], 5)]
    rest = fresh.add(seen, dataclasses.replace(GREEDY, max_tokens=10))
    run(fresh)
    after = e.add(PROMPTS[2], GREEDY)
    run(e)
    assert ids_of(after) == ids_of(wanted) != ids_of(before)
    assert ids_of(under_way)[0] == alone(PROMPTS[3], 5) + ids_of(rest)[0]
    assert serving.embedding.weight.data_ptr() == other.embedding.weight.data_ptr()
    e.update_weights(dict(model.named_parameters()))
    assert torch.equal(other.embedding.weight, model.embedding.weight)  # copied into the tensors that are shared
    again = e.add(PROMPTS[2], GREEDY)
    run(e)
    assert ids_of(again) == ids_of(before)
    with pytest.raises(ValueError, match=r"norm.weight is \(32,\) in the engine's model and none in the new weights"):
        e.update_weights({k: v for k, v in model.named_parameters() if k != "norm.weight"})


def test_sixteen_bits(model):
    half = Transformer(CONFIG, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    e = engine(half, overlap=True)
    requests = [e.add(p, dataclasses.replace(GREEDY, logprobs=0)) for p in PROMPTS]
    run(e)
    assert e.memory.pages == e.runner.state.nbytes
    for request in requests:
        assert len(ids_of(request)[0]) == 15
        assert all(math.isfinite(t.logprob) for t in request.samples[0].tokens)


def test_memory_is_planned_or_refused(model):
    e = engine(model, num_pages=7)
    assert (e.memory.num_pages, e.memory.pages) == (7, 7 * 16 * 2 * 2 * 2 * 8 * 4)
    assert e.memory.weights == 4 * model.config.num_parameters()
    assert "7 pages of 16 tokens, 112 in all" in str(e.memory)
    assert engine(model).memory.num_pages == 8 * 6  # no more than are of use
    with pytest.raises(ValueError, match=r"a sequence of 96 tokens takes .* and 5 pages, .* may be used"):
        engine(model, num_pages=5)
    with pytest.raises(ValueError, match=r"Lower max_len, max_step_tokens or max_seqs"):
        engine(model, memory_share=1e-9)
    assert engine(model, num_pages=5, max_len=80).max_len == 80


def test_a_context_that_does_not_fit_is_shortened(monkeypatch):
    config = dataclasses.replace(CONFIG, context_length=100_000)
    model = Transformer(config).eval()
    page = model.new_pages(1, 16).nbytes
    step = engine(model, num_pages=6250).memory.activations
    monkeypatch.setattr("cs336.inference.engine.free_memory", lambda *_: step + 21 * page + 5)
    e = engine(model)
    assert (e.max_len, e.memory.num_pages) == (21 * 16, 21)
    assert "336 a sequence" in str(e.memory)
    request = e.add(list(range(270)), GREEDY)
    run(e)
    assert len(ids_of(request)[0]) == 15
    with pytest.raises(ValueError, match="a sequence of 2000 tokens takes"):
        engine(model, max_len=2000)


def test_bad_requests(model):
    e = engine(model)
    for ids, params, message in (
        ([], GREEDY, "the prompt is empty"),
        ([1, 272], GREEDY, "there is no token 272: the model's are 0 to 271"),
        ([-1], GREEDY, "there is no token -1"),
        ([1, 2.5], GREEDY, "tokens are integers, got 2.5"),
        ([1], SamplingParams(stop_token_ids=(500,)), "there is no token 500"),
        ([1], SamplingParams(logit_bias={300: 1.0}), "there is no token 300"),
        ([1] * 96, GREEDY, "96 tokens, which leaves no room in a sequence of 96"),
        ([1], SamplingParams(stop="a"), "stop strings need a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            e.add(ids, params)
    assert not e.busy
    for values, message in (
        ({"max_seqs": 0}, "max_seqs must be 1 or more"),
        ({"max_step_tokens": 7}, "max_step_tokens 7 must reach max_seqs 8"),
        ({"memory_share": 1.5}, "memory_share must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(model, **values)
    broken = Transformer(CONFIG)
    torch.nn.init.constant_(broken.norm.weight, torch.nan)
    e = engine(broken)
    request = e.add([1], GREEDY)
    run(e)
    with pytest.raises(ValueError, match="logits are not finite"):
        request.output()


def test_a_paged_state_needs_its_tokens_described(model):
    state = model.new_pages(4, 16)
    with pytest.raises(ValueError, match="needs its tokens described"):
        model(torch.tensor([[1, 2]]), state=state)
    row, place = torch.tensor([[0]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    state.tokens = PagedTokens(row, place + 1, place, place, 1, place)
    with pytest.raises(ValueError, match="give neither positions nor segments"):
        model(torch.tensor([[1]]), positions=torch.tensor([0]), state=state)
    assert torch.allclose(model(torch.tensor([[1]]), state=state), model(torch.tensor([[1]])), atol=1e-5)


def test_decoding_promises_that_old_tokens_are_there_where_nothing_else_runs(model, monkeypatch):
    """A step that only decodes has written its table and lengths long before attention reads them; one with chunks
    promises nothing, and inside cs336.invariant() the fast kernel is not called at all."""
    told, plain = [], ops.paged_attention

    def spy(*args, invariant=True, settled=False, **options):
        told.append((invariant, settled))
        return plain(*args, **options)

    monkeypatch.setattr(ops, "paged_attention", spy)
    e = engine(model)
    e.add(PROMPTS[0], GREEDY)
    e.step()
    told.clear()
    e.step()
    assert told == [(False, True)] * CONFIG.num_layers
    e.add(PROMPTS[4], GREEDY)
    told.clear()
    e.step()
    assert told == [(False, False)] * CONFIG.num_layers
    told.clear()
    run(e)
    e = engine(model, invariant=True)
    e.add(PROMPTS[0], GREEDY)
    told.clear()
    run(e)
    assert told == []


@pytest.mark.parametrize("max_seqs", [1, 7, 64, 100, 200, 256, 1000])
def test_every_batch_has_a_graph_that_is_not_much_larger(max_seqs):
    sizes = graph_sizes(max_seqs)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_seqs
    for rows in range(1, max_seqs + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < (8 if rows <= 64 else 16 if rows <= 256 else 32)


def test_prompts_of_one_step_are_scored_each_with_its_likeliest(model):
    e = engine(model, max_step_tokens=200)
    asked = [(PROMPTS[4], 0), (PROMPTS[0], 2), (PROMPTS[5], 5), (PROMPTS[3], None)]
    requests = [
        e.add(prompt, dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=n), score_from=2) for prompt, n in asked
    ]
    e.step()
    for (prompt, n), request in zip(asked, requests, strict=True):
        if n is None:
            assert request.prompt_logprobs is None
            continue
        with torch.inference_mode():
            log_p = model(torch.tensor([prompt]))[0].log_softmax(-1)
        assert request.prompt_logprobs[:2] == [None, None]
        for i, token in enumerate(request.prompt_logprobs[2:], 2):
            assert token.id == prompt[i]
            assert token.logprob == pytest.approx(log_p[i - 1, token.id].item(), abs=1e-4)
            assert [p for _, p in token.top] == pytest.approx(log_p[i - 1].topk(n).values.tolist(), abs=1e-4)
