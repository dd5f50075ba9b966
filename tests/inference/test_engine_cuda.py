"""On a GPU: captured steps, in batches of any size, give the tokens of full forward passes."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from block_kinds import MIXERS

from cs336.inference import Engine, EngineConfig, SamplingParams, runner
from cs336.inference.controls import Controls
from cs336.inference.halves import Halves
from cs336.inference.scheduler import Sequence
from cs336.inference.speculation import Speculator
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AlibiConfig, AttentionConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = TransformerConfig(512, 512, num_layers=2, d_model=256, num_heads=4, num_kv_heads=2, init_std=0.2, qk_norm=True)
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=0)


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 512, (n,), generator=draw).tolist() for n in (1, 5, 64, 65, 130, 200, 17, 90, 33, 300)]


def make(dtype):
    torch.manual_seed(3)
    return Transformer(CONFIG, device="cuda", dtype=dtype).eval()


def run(model, prompts, params=GREEDY, **options):
    e = Engine(model, None, EngineConfig(**({"max_seqs": 8, "max_step_tokens": 128} | options)))
    requests = [e.add(prompt, params) for prompt in prompts]
    while e.busy:
        e.step()
        e.check()
    assert e.cache.in_use == 0
    return e, [[t.id for t in r.samples[0].tokens] for r in requests], requests


@torch.inference_mode()
def regret(model, prompt, ids):
    """How far each token is from the likeliest one, in the logits of a full forward pass."""
    logits = model(torch.tensor([prompt + ids], device="cuda"))[0, len(prompt) - 1 : -1].float()
    return (logits.amax(-1) - logits.gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0]).max().item()


@torch.inference_mode()
def logprobs(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids], device="cuda"))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids, device="cuda")[:, None])[:, 0].tolist()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"max_step_tokens": 600}, {"num_pages": 12}, {"page_size": 16, "overlap": False}]
)
def test_equals_full_forward(prompts, dtype, graphs, options):
    model = make(dtype)
    e, ids, _ = run(model, prompts, cuda_graphs=graphs, **options)
    assert bool(e.runner._graphs) == graphs
    for prompt, found in zip(prompts, ids, strict=True):
        assert len(found) == 40
        assert regret(model, prompt, found) <= (1e-3 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("max_seqs", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}, {"invariant": True}])
def test_captured_steps_read_prompts(prompts, monkeypatch, max_seqs, options):
    model, asked = make(torch.bfloat16), []
    shape_of = runner.Runner._shape

    def spy(self, step):
        asked.append(shape := shape_of(self, step))
        return shape

    monkeypatch.setattr(runner.Runner, "_shape", spy)
    _, ids, requests = run(model, prompts * 2, max_seqs=max_seqs, max_step_tokens=600, **options)
    assert {shape.tokens for shape in asked if shape is not None} >= {0, 128, 512}
    for prompt, found in zip(prompts * 2, ids, strict=True):
        assert len(found) == 40
        assert regret(model, prompt, found) <= 0.15
    if options.get("invariant"):
        _, _, others = run(model, prompts * 2, max_seqs=max_seqs, cuda_graphs=False, **options)
        for request, other in zip(requests, others, strict=True):
            assert request.samples[0].tokens == other.samples[0].tokens  # log-probabilities, too, to the bit


@pytest.mark.parametrize("spare", [1, 28, 1000])
@pytest.mark.parametrize("max_seqs", [2, 5, 8])
def test_captured_steps_by_halves(prompts, monkeypatch, max_seqs, spare):
    monkeypatch.setattr(runner, "halves_of", lambda model: Halves(2, 0, spare))
    model = make(torch.bfloat16)
    e, ids, _ = run(model, prompts * 2, max_seqs=max_seqs)
    assert any(shape.spare for shape, _ in e.runner._graphs)
    for prompt, found in zip(prompts * 2, ids, strict=True):
        assert len(found) == 40
        assert regret(model, prompt, found) <= 0.15


@pytest.mark.parametrize("max_seqs", [1, 3, 8])
def test_captured_steps_verify_drafts(monkeypatch, max_seqs):
    """Drafts are the tokens that come without them, but each third, which is another."""
    prompts = [[1, 2, 3, 4] * 6, [5, 6, 7] * 5 + [5], [8], [9] * 12]
    model = make(torch.float32)
    _, plain, _ = run(model, prompts, max_seqs=max_seqs)
    texts = [prompt + ids for prompt, ids in zip(prompts, plain, strict=True)]

    def draft(self, token_ids):
        at, text = len(token_ids), next(text for text in texts if text[: len(token_ids)] == list(token_ids))
        return [token if i % 3 else (token + 1) % 512 for i, token in enumerate(text[at : at + 7], at)]

    monkeypatch.setattr(Speculator, "draft", draft)
    e, ids, _ = run(model, prompts, max_seqs=max_seqs, speculation="ngram")
    assert any(shape.width == 8 for shape, _ in e.runner._graphs)
    assert ids == plain
    assert 0 < sum(e.stats.accepted) < sum(e.stats.drafted)
    for prompt, found in zip(prompts, ids, strict=True):
        assert len(found) == 40
        assert regret(model, prompt, found) <= 1e-3


def layered(*blocks):
    return TransformerConfig(512, 512, num_layers=len(blocks), d_model=256, init_std=0.2, layers=blocks)


RING = BlockConfig(AttentionConfig(4, window=20), positions=AlibiConfig())


@pytest.mark.parametrize("block", [*(MIXERS[k] for k in ("latent", "linear", "delta", "mamba2", "hyena")), RING])
def test_states_in_slots(prompts, block):
    """Beside attention in pages, as latents are too; and once more, where captured steps would read memory of the state
    before."""
    config = layered(block, MIXERS["attention"])
    torch.manual_seed(3)
    model, other = (Transformer(config, device="cuda", dtype=torch.float32).eval() for _ in range(2))
    e, _, _ = run(model, prompts)
    assert e.runner.state.is_paged == (block is MIXERS["latent"])
    assert e.runner._graphs
    e.update_weights(other.state_dict())
    requests = [e.add(prompt, GREEDY) for prompt in prompts]
    while e.busy:
        e.step()
    for prompt, request in zip(prompts, requests, strict=True):
        found = [t.id for t in request.samples[0].tokens]
        assert len(found) == 40
        assert regret(other, prompt, found) <= 1e-2
        assert [t.logprob for t in request.samples[0].tokens] == pytest.approx(logprobs(other, prompt, found), abs=1e-2)


def test_experts_that_the_host_waits_for_are_not_captured(prompts):
    config = layered(MIXERS["experts"], MIXERS["experts"])
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(config, device="cuda", dtype=dtype).eval()
        waits = model.layers[0].mlp.experts.waits
        assert waits or dtype == torch.bfloat16
        with pytest.warns(UserWarning, match="not captured.*waits for the loads") if waits else nullcontext():
            e, _, _ = run(model, prompts[:3])
        assert bool(e.runner._graphs) != waits


def test_log_probabilities_in_a_graph(prompts):
    model = make(torch.float32)
    _, ids, requests = run(model, prompts, dataclasses.replace(GREEDY, logprobs=3))
    for prompt, found, request in zip(prompts, ids, requests, strict=True):
        with torch.inference_mode():
            log_p = model(torch.tensor([prompt + found], device="cuda"))[0, len(prompt) - 1 : -1].log_softmax(-1)
        for i, token in enumerate(request.samples[0].tokens):
            assert token.logprob == pytest.approx(log_p[i, token.id].item(), abs=1e-3)
            assert [p for _, p in token.top] == pytest.approx(log_p[i].topk(3).values.tolist(), abs=1e-3)


def test_seeds_do_not_depend_on_the_batch(prompts):
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=11, max_tokens=20)
    model = make(torch.float32)
    _, together, _ = run(model, prompts, params)
    for prompt, ids in zip(prompts[:4], together, strict=False):
        assert run(model, [prompt], params, max_seqs=1)[1] == [ids]


def test_other_weights(prompts):
    model, other = make(torch.float32), make(torch.float32)
    with torch.no_grad():
        other.norm.weight.mul_(-1)
    e = Engine(model, None, EngineConfig(max_seqs=8, max_step_tokens=128))
    found = []
    for weights in (other, dict(make(torch.float32).named_parameters())):
        first = e.add(prompts[2], GREEDY)
        for _ in range(5):
            e.step()
        e.update_weights(weights)
        second = e.add(prompts[4], GREEDY)
        while e.busy:
            e.step()
        found.append((first, second))
        ids = [t.id for t in second.samples[0].tokens]
        assert regret(e.model, prompts[4], ids) <= 1e-3
    a, b = ([t.id for t in second.samples[0].tokens] for _, second in found)
    assert a != b


def test_what_changes_logits_is_sent_without_waiting():
    """The host never waits for the device, whose steps are queued."""
    controls = Controls(4, 100, (99,), torch.device("cuda"))
    params = [SamplingParams(), SamplingParams(presence_penalty=0.5), SamplingParams(logit_bias={3: 2.0})]
    sequences = [Sequence([0], 1, p, slot=i) for i, p in enumerate(params)]
    sequences[0].guide = SimpleNamespace(allowed=np.array([0b101] + [0] * 12, dtype=np.uint8))
    slots = torch.arange(3, device="cuda")
    for s in sequences:
        controls.begin(s)
    controls.options(sequences, slots)  # what is allocated stays
    torch.cuda.set_sync_debug_mode("error")
    try:
        options = controls.options(sequences, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bias = options["bias"].cpu()
    assert bias[0].isfinite().nonzero().flatten().tolist() == [0, 2]
    assert (bias[1, 3], bias[2, 3], bias[1, 99]) == (0, 2, -torch.inf)
    assert options["presence_penalty"].tolist() == [0, 0.5, 0]
