"""From rollouts on the engine to optimizer steps on the same weights."""

import copy
import math

import pytest
import torch
from tiny_policy import Recorder

from cs336.alignment import GRPOConfig, Verdict, grpo, grpo_step, rollout, sequence_log_probs, train_grpo
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer, TransformerConfig
from cs336.optim import SGD, AdamWConfig
from cs336.tokenizer import Tokenizer

TOKENIZER = Tokenizer({i: bytes([c]) for i, c in enumerate(b"0123456789=")}, [], ["<|endoftext|>"])
END = TOKENIZER.special_tokens["<|endoftext|>"]
DIGITS = [(f"{d}=", str(d)) for d in range(10)]
PROMPTS, ANSWERS = ["3=", "14="], ["3", "14"]


def copied(response, answer):
    return float(response == answer)


def length(response, answer):
    return Verdict(float(len(response)), "its length")


def llm_of(init_std=0.02):
    torch.manual_seed(0)
    config = TransformerConfig(12, 12, num_layers=1, d_model=32, num_heads=2, init_std=init_std)
    return LLM(Transformer(config), TOKENIZER, quiet=True, max_seqs=64, page_size=8)


def recorded(config, llm=None, **options):
    llm = llm or llm_of(0.3)
    optimizer = Recorder(llm.model)
    return grpo_step(llm, optimizer, PROMPTS, ANSWERS, length, config, **options), optimizer.grads


def test_a_model_learns_to_copy_a_digit():
    llm = llm_of()
    optimizer = AdamWConfig(lr=1e-2, weight_decay=0).build(llm.model)
    config = GRPOConfig(32, prompts_per_step=10, max_tokens=1, loss_type="dapo", num_iterations=2)
    seen = []
    rows = train_grpo(llm, optimizer, DIGITS, copied, config, num_steps=25, log=lambda i, row: seen.append((i, row)))
    assert seen == list(enumerate(rows))
    assert rows[0]["reward"] < 0.2
    assert rows[-1]["reward"] > 0.95
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-5  # the engine has the new weights
    greedy = llm.generate([prompt for prompt, _ in DIGITS], SamplingParams(0, max_tokens=1))
    assert [output.text for output in greedy] == [answer for _, answer in DIGITS]


@pytest.mark.parametrize("max_grad_norm", [0.01, math.inf])
def test_torchs_optimizers_take_the_same_steps(max_grad_norm):
    llms = llm_of(0.3), llm_of(0.3)
    kinds, options = (SGD, torch.optim.SGD), {"lr": 0.1, "momentum": 0.9}
    optimizers = [kind(llm.model.parameters(), **options) for kind, llm in zip(kinds, llms, strict=True)]
    config = GRPOConfig(8, prompts_per_step=2, max_tokens=2, num_iterations=3, max_grad_norm=max_grad_norm)
    before = [p.detach().clone() for p in llms[0].model.parameters()]
    for llm, optimizer in zip(llms, optimizers, strict=True):
        grpo_step(llm, optimizer, PROMPTS, ANSWERS, length, config)
    for p, ours, torchs in zip(before, *(llm.model.parameters() for llm in llms), strict=True):
        assert not torch.equal(ours, p)
        torch.testing.assert_close(torchs - p, ours - p, rtol=1e-3, atol=1e-7)


def test_equal_seeds_give_equal_runs():
    runs = []
    for seed in (1, 1, 2):
        llm = llm_of(0.3)
        optimizer = AdamWConfig(lr=1e-2).build(llm.model)
        config = GRPOConfig(4, prompts_per_step=3, max_tokens=4, seed=seed)
        runs.append(train_grpo(llm, optimizer, DIGITS, length, config, num_steps=3))
    assert runs[0] == runs[1] != runs[2]


def test_rollouts_say_where_responses_are():
    llm = llm_of(0.3)
    got = rollout(llm, PROMPTS, GRPOConfig(8, max_tokens=4), seed=5)
    B = len(got.token_ids_BS)
    assert (B, len(got.texts)) == (16, 16)
    logp = llm.model(got.token_ids_BS)[:, :-1].log_softmax(-1).gather(-1, got.token_ids_BS[:, 1:, None])[..., 0]
    torch.testing.assert_close(got.sampled_log_probs_BT, logp.masked_fill(~got.mask_BT, 0), rtol=1e-4, atol=1e-5)
    for b in range(B):
        prompt = TOKENIZER.encode(PROMPTS[b // 8])
        places = got.mask_BT[b].nonzero().flatten()
        assert places[0] == len(prompt) - 1
        assert len(places) == places[-1] - places[0] + 1
        assert got.token_ids_BS[b, : len(prompt)].tolist() == prompt
        response = got.token_ids_BS[b, places + 1].tolist()
        assert bool(got.truncated_B[b]) == (response[-1] != END)
        assert TOKENIZER.decode(response).removesuffix("<|endoftext|>") == got.texts[b]
        assert not got.token_ids_BS[b, places[-1] + 2 :].any()
    assert 0 < got.truncated_B.sum() < B  # both kinds are there
    assert len({tuple(row.tolist()) for row in got.token_ids_BS[:8]}) > 1


def test_one_step_is_reinforce_with_baseline():
    config = GRPOConfig(8, max_tokens=4, scale_rewards=False, max_grad_norm=math.inf)
    values, (grads,) = recorded(config, seed=5)
    llm = llm_of(0.3)
    got = rollout(llm, PROMPTS, config, seed=5)
    rewards = torch.tensor([float(len(text)) for text in got.texts])
    assert values["reward"] == pytest.approx(rewards.mean().item())
    logp = llm.model(got.token_ids_BS)[:, :-1].log_softmax(-1).gather(-1, got.token_ids_BS[:, 1:, None])[..., 0]
    loss = 0
    for b in range(16):
        baseline = rewards[b // 8 * 8 :][:8].mean()
        loss = loss - (rewards[b] - baseline) * logp[b][got.mask_BT[b]].mean() / 16
    for a, b in zip(grads, torch.autograd.grad(loss, list(llm.model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "rloo"])
def test_a_step_is_the_same_in_every_micro_batch_size(loss_type):
    found = [recorded(GRPOConfig(8, max_tokens=4, loss_type=loss_type, micro_batch_size=n)) for n in (None, 3)]
    for a, b in zip(*(grads[0] for _, grads in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert found[0][0]["reward"] == found[1][0]["reward"]
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_metrics_are_of_tokens_in_every_micro_batch_size(loss_type):
    reference, settings = llm_of(0.2).model, {"max_tokens": 8, "loss_type": loss_type, "beta": 0.1}
    whole, parts = (
        recorded(GRPOConfig(8, micro_batch_size=n, **settings), reference=reference, seed=5)[0] for n in (None, 1)
    )
    assert parts["completions/mean_length"] < 8  # rows are not of one length
    assert parts["kl"] == pytest.approx(whole["kl"], rel=1e-4)


def test_a_part_is_as_wide_as_its_longest_row(monkeypatch):
    widths = []

    def log_probs(model, token_ids_BS, **options):
        widths.append(token_ids_BS.shape[1])
        return sequence_log_probs(model, token_ids_BS, **options)

    monkeypatch.setattr(grpo, "sequence_log_probs", log_probs)
    config = GRPOConfig(8, max_tokens=8, micro_batch_size=4)
    recorded(config, seed=5)
    got = rollout(llm_of(0.3), PROMPTS, config, seed=5)
    longest_first = sorted(((row.nonzero().max() + 2).item() for row in got.mask_BT), reverse=True)
    assert longest_first[0] > longest_first[12]
    assert widths[:4] == longest_first[::4]  # of the old log-probabilities, which all rows have
    assert widths[4:] == sorted(widths[4:], reverse=True)


def test_truncated_responses_teach_nothing_if_so_asked():
    config = GRPOConfig(8, max_tokens=4, mask_truncated_completions=True, temperature=2.0)
    values, (grads,) = recorded(config, seed=5)
    assert 0 < values["completions/clipped_ratio"] < 1
    assert any(g.any() for g in grads)
    assert "sampling/sampling_logp_difference/max" not in values  # the engine's are before temperature
    everything = GRPOConfig(8, max_tokens=4, temperature=2.0)
    assert any((a != b).any() for a, b in zip(grads, recorded(everything, seed=5)[1][0], strict=True))


def test_divergence_from_a_reference():
    llm = llm_of(0.3)
    same = copy.deepcopy(llm.model)
    values, _ = recorded(GRPOConfig(8, max_tokens=4, beta=0.1), llm, reference=same)
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(3)
    other = Transformer(llm.model.config)
    values, _ = recorded(GRPOConfig(8, max_tokens=4, beta=0.1), llm, reference=other)
    assert values["kl"] > 0.01
    with pytest.raises(ValueError, match="no reference"):
        recorded(GRPOConfig(beta=0.1), llm)


@pytest.mark.parametrize(
    "options",
    [
        {"num_generations": 1}, {"prompts_per_step": 0}, {"max_tokens": 0}, {"num_iterations": 0}, {"temperature": 0.0},
        {"micro_batch_size": 0}, {"loss_type": "ppo"}, {"beta": -1.0}, {"max_grad_norm": 0.0}, {"seed": -1},
        {"beta": math.nan}, {"epsilon": math.nan}, {"epsilon_high": math.nan}, {"epsilon": -0.1},
        {"expert_threshold": math.nan},
    ],
)  # fmt: skip
def test_config_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GRPOConfig(**options)


def test_steps_refuse():
    llm = llm_of()
    optimizer, config = Recorder(llm.model), GRPOConfig(2, max_tokens=1)
    with pytest.raises(ValueError, match="2 prompts and 1 answers"):
        grpo_step(llm, optimizer, PROMPTS, ["3"], copied, config)
    with pytest.raises(ValueError, match="expected a finite number"):
        grpo_step(llm, optimizer, PROMPTS, ANSWERS, lambda r, a: math.nan, config)
    with pytest.raises(ValueError, match="no prompts"):
        train_grpo(llm, optimizer, [], copied, config, num_steps=1)
    assert not optimizer.grads


def test_the_engine_forgets_what_older_weights_computed():
    llm = llm_of(0.3)
    optimizer = AdamWConfig(lr=1e-1, weight_decay=0).build(llm.model)
    prompt = [("012345678=", "")]  # longer than a page, which the second step would find again
    config = GRPOConfig(8, 1, max_tokens=2)
    rows = train_grpo(llm, optimizer, prompt, lambda response, _: float(response > "4"), config, num_steps=2)
    assert rows[0]["grad_norm"] > 0
    assert rows[1]["sampling/sampling_logp_difference/max"] < 1e-4
