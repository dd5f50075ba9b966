"""A sequence's log-probabilities are the same bits in training, rollout and serving: alone, among 255 others, prefilled
whole or in chunks, begun anew, or after a prefix that is known."""

import dataclasses

import pytest
import torch

import cs336
from cs336 import ops
from cs336.alignment import GRPOConfig, grpo_step
from cs336.alignment.functions import sequence_log_probs
from cs336.inference import LLM, SamplingParams
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AlibiConfig, AttentionConfig, Mamba2Config, MoEConfig
from cs336.ops.registry import is_invariant
from cs336.optim import AdamWConfig
from cs336.tokenizer import Tokenizer

CUDA = torch.cuda.is_available()
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    *(
        pytest.param(("cuda", dtype), marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
BLOCKS = (
    BlockConfig(AttentionConfig(4, 2, head_dim=16, qk_norm=True)),
    BlockConfig(
        AttentionConfig(4, 1, head_dim=16, window=9, softcap=8.0, qkv_bias=True, sinks=True), placement="sandwich"
    ),
)
CONFIG = TransformerConfig(272, 160, num_layers=2, d_model=64, init_std=0.3, layers=BLOCKS, logit_softcap=30.0)
PARAMS = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, logprobs=0, prompt_logprobs=0)
draw = torch.Generator().manual_seed(4)
PROMPTS = [torch.randint(0, 272, (n,), generator=draw).tolist() for n in (1, 2, 17, 64, 65, 100, 33)]


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: f"{place[0]}-{str(place[1])[6:]}")
def model(request):
    device, dtype = request.param
    torch.manual_seed(8)
    return Transformer(CONFIG, device=device, dtype=dtype).eval()


def served(model, prompts, params=PARAMS, **options):
    """Of each prompt its ids, the continuation's included, and the log-probability of each but the first."""
    llm = LLM(model, invariant=True, quiet=True, **({"max_seqs": 8, "page_size": 16} | options))
    found = []
    for output in llm.generate(prompts, params):
        tokens = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        found.append((output.prompt_token_ids + output.token_ids, [token.logprob for token in tokens]))
    llm.engine.check()
    return found, llm.engine


@pytest.fixture(scope="module")
def alone(model):
    return [served(model, [prompt], max_seqs=1)[0][0] for prompt in PROMPTS]


def test_serving_does_not_depend_on_the_batch(model, alone):
    for options in (
        {},
        {"max_step_tokens": 8},
        {"max_seqs": 3, "max_step_tokens": 37, "page_size": 32, "overlap": True},
        {"cuda_graphs": False, "prefix_cache": False},
    ):
        assert served(model, PROMPTS, **options)[0] == alone


def test_among_255_others(model, alone):
    others = [[i, 255 - i, *range(i % 7)] for i in range(255)]
    found, _ = served(model, [*others, PROMPTS[2]], max_seqs=256)
    assert found[-1] == alone[2]


def test_what_was_begun_anew_or_found_in_the_cache_is_the_same(model, alone):
    params = dataclasses.replace(PARAMS, max_tokens=60)
    whole = [served(model, [PROMPTS[i]], params)[0][0] for i in (2, 3, 6)]
    found, engine = served(model, [PROMPTS[i] for i in (2, 3, 6)], params, num_pages=15, max_len=140)
    assert engine.scheduler.num_preemptions > 0
    assert found == whole
    llm = LLM(model, invariant=True, quiet=True, page_size=16)
    (first,) = llm.generate(PROMPTS[5], PARAMS)
    params = dataclasses.replace(PARAMS, prompt_logprobs=None)
    (second,) = llm.generate(PROMPTS[5], params)
    assert second.cached_tokens == 99
    assert second.outputs[0].logprobs == first.outputs[0].logprobs
    scores = llm.score([PROMPTS[5][:80]], [PROMPTS[5][80:]])[0]
    assert [token.logprob for token in scores] == alone[5][1][79:99]


def test_training_gives_the_same_bits(model, alone):
    """Each alone, all as rows of one batch padded on the right, and packed into one row."""
    width = max(len(ids) for ids, _ in alone)
    rows = torch.zeros(len(alone), width, dtype=torch.int64, device=model.device)
    for row, (ids, _) in zip(rows, alone, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    packed = torch.tensor([[i for ids, _ in alone for i in ids]], device=model.device)
    segments = torch.tensor([[n for n, (ids, _) in enumerate(alone) for _ in ids]], device=model.device)
    with cs336.invariant():
        batch = sequence_log_probs(model, rows).tolist()
        (pack,) = sequence_log_probs(model, packed, segments_BS=segments).tolist()
        at = 0
        for n, (ids, want) in enumerate(alone):
            (single,) = sequence_log_probs(model, torch.tensor([ids], device=model.device)).tolist()
            assert single == want
            assert batch[n][: len(want)] == want
            assert pack[at : at + len(want)] == want
            at += len(ids)
    assert not is_invariant()


@pytest.mark.parametrize(
    "vocab_size", [272, 269, *([50304] if CUDA else [])]
)  # rows of logits that begin at multiples of 16 bytes, and not
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_logits_without_a_cap_are_computed_once(place, vocab_size, monkeypatch):
    device, dtype = place
    torch.manual_seed(2)
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size, logit_softcap=None)
    model = Transformer(config, device=device, dtype=dtype).eval()
    again, inner = [], ops.linear_log_probs
    monkeypatch.setattr(ops, "linear_log_probs", lambda *args, **more: again.append(1) or inner(*args, **more))
    prompts = [[t % vocab_size for t in PROMPTS[i]] for i in (1, 2, 6)]
    found, _ = served(model, prompts, max_step_tokens=40)
    assert bool(again) == (vocab_size == 269)
    with cs336.invariant():
        for ids, want in found:
            (single,) = sequence_log_probs(model, torch.tensor([ids], device=device)).tolist()
            assert single == want


def test_gradients_are_those_of_the_fast_forward(model):
    """Here they are of the same function, but for rounding."""
    ids = torch.randint(0, 272, (2, 50), generator=torch.Generator().manual_seed(1)).to(model.device)
    grads = []
    for on in (True, False):
        with cs336.invariant(on):
            found = torch.autograd.grad(sequence_log_probs(model, ids).mean(), list(model.parameters()))
        grads.append(torch.cat([g.flatten().double() for g in found]))
    limit = 1e-4 if model.compute_dtype == torch.float32 else 0.15
    assert (grads[0] - grads[1]).norm() < limit * grads[1].norm()


def test_attention_is_the_fast_one_but_for_rounding(model):
    device = model.device
    q, k, v, do = (torch.randn(75, heads, 16, device=device) for heads in (4, 2, 2, 4))
    ends = torch.tensor([0, 30, 30, 75], dtype=torch.int32, device=device)
    for window, softcap, scale in ((None, None, None), (7, 3.0, 0.4)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        ours = ops.attention_invariant(*leaves, ends, 45, window=window, softcap=softcap, scale=scale)
        seen = None if window is None else (window, 0)
        options = {"causal": True, "window": seen, "softcap": softcap, "scale": scale}
        theirs = ops.attention_varlen(*leaves, ends, None, 45, 45, **options)
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)
        for a, b in zip(*(torch.autograd.grad(o, leaves, do) for o in (ours, theirs)), strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)
    once = ops.attention_invariant(*leaves, ends, 45)
    (slope,) = torch.autograd.grad(once.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_what_has_no_such_bits_is_refused():
    for block, message in (
        (BlockConfig(Mamba2Config()), "layer 0 has a mamba2 mixer"),
        (BlockConfig(AttentionConfig(4), MoEConfig(4, 2)), "layer 0 has a mixture of experts"),
        (BlockConfig(AttentionConfig(4), positions=AlibiConfig()), "layer 0 has alibi"),
    ):
        model = Transformer(TransformerConfig(272, 32, num_layers=1, d_model=32, layers=(block,)))
        with cs336.invariant(), pytest.raises(ValueError, match=message):
            model(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match=message):
            LLM(model, invariant=True)
    model = Transformer(CONFIG)
    with cs336.invariant(), pytest.raises(ValueError, match="its state is paged"):
        model(torch.tensor([[1, 2]]), state=model.new_state(1))


def test_a_policy_and_its_sampler_are_one(model):
    """Over several steps of GRPO, whose weights change: the engine's log-probabilities are the training forward's."""
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
    policy = Transformer(CONFIG, device=model.device, dtype=model.compute_dtype).eval()
    policy.load_state_dict(model.state_dict())
    before = policy.layers[0].attention.q_proj.weight.clone()
    llm = LLM(policy, tokenizer, invariant=True, quiet=True, max_seqs=5, page_size=16)
    optimizer = AdamWConfig(lr=1e-2, weight_decay=0).build(policy)
    config = GRPOConfig(4, max_tokens=8, micro_batch_size=3)
    for seed in range(2):
        with cs336.invariant():
            found = grpo_step(
                llm, optimizer, ["ab", "12345678"], ["", ""], lambda text, _: float(len(text)), config, seed=8 * seed
            )
        assert found["sampling/sampling_logp_difference/max"] == 0
    assert not torch.equal(before, policy.layers[0].attention.q_proj.weight)
