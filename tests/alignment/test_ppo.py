"""PPO: what a step is made of, the bandit, and `cs336 ppo`."""

import copy
import math

import pytest
import torch
from killing import check_a_killed_run_repeats_itself
from test_dpo_stage import preferences
from tiny_policy import Recorder, rows_of, save_model, tokenizer, write_rows

from cs336.alignment import PPOConfig, RewardModel, Rollouts, ppo, ppo_step, response_mask, rollout, sequence_log_probs
from cs336.alignment.ppo import ActorCritic, KLControl, shaped_rewards, value_loss_terms, whiten
from cs336.alignment.run import StageRun
from cs336.alignment.stages.ppo import PPOStage, PPOStageConfig
from cs336.alignment.stages.reward import RewardConfig, RewardStage
from cs336.inference import LLM
from cs336.models import Transformer, TransformerConfig
from cs336.optim import AdamWConfig
from cs336.utils import config as configs

ARMS = {"a": 0.2, "b": 1.0, "c": 0.6, "d": 0.0}


def bandit(steps, **options):
    """One prompt, one token an answer, each letter an arm; any other is worth nothing."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(44, 8, num_layers=1, d_model=16, num_heads=2))
    llm = LLM(model, tokenizer(), quiet=True, max_seqs=64)
    reference, critic = copy.deepcopy(model), RewardModel(copy.deepcopy(model)).eval()
    module = ActorCritic(model, critic)
    optimizer = AdamWConfig(lr=1e-2, weight_decay=0).build(module)
    config = PPOConfig(64, max_tokens=1, **{"kl_coef": 0.0, "vf_coef": 0.5} | options)
    rows = []
    for step in range(steps):
        rollouts = rollout(llm, ["?"] * 64, config, seed=64 * step)
        scores_B = torch.tensor([ARMS.get(text, 0.0) for text in rollouts.texts])
        rows.append(
            ppo_step(
                model,
                critic,
                reference,
                module,
                optimizer,
                rollouts,
                scores_B,
                config,
                kl_coef=config.kl_coef,
                seed=step,
            )
        )
        rows[-1]["reward"] = scores_B.mean().item()
        llm.update_weights(model)
    prompt = torch.tensor([tokenizer().encode("?")])
    with torch.no_grad():
        p = model(prompt)[0, -1].softmax(-1)
        return {arm: p[tokenizer().encode(arm)[0]].item() for arm in ARMS}, critic(prompt)[0, -1].item(), rows


def test_the_bandit_is_solved():
    arms, value, rows = bandit(30)
    assert rows[0]["reward"] < 0.2
    assert arms["b"] > 0.9
    assert value == pytest.approx(rows[-1]["reward"], abs=0.15)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["objective/kl"] > 1
    assert rows[-1]["entropy"] < rows[0]["entropy"]


def test_a_price_keeps_it_near():
    free, _, _ = bandit(15)
    kept, _, rows = bandit(15, kl_coef=1.0)
    assert kept["b"] < free["b"]
    assert rows[-1]["objective/kl"] < 1


def drawn(lengths, prompt=3):
    """Rows of random tokens, a prompt and a response of so many tokens each."""
    torch.manual_seed(1)
    rows_B, S = torch.tensor(lengths) + prompt, max(lengths) + prompt
    ids_BS = torch.randint(44, (len(lengths), S)).masked_fill(torch.arange(S) >= rows_B[:, None], 0)
    mask_BT = response_mask(torch.full((len(lengths),), prompt), rows_B, S)
    return Rollouts([""] * len(lengths), ids_BS, mask_BT, torch.zeros(mask_BT.shape), torch.zeros(len(lengths)).bool())


def test_a_part_is_as_wide_as_its_longest_row_and_a_step_the_same_whatever_the_parts(monkeypatch):
    lengths = [2, 9, 1, 20, 3, 20, 7, 1]
    torch.manual_seed(0)
    policy = Transformer(TransformerConfig(44, 24, num_layers=1, d_model=16, num_heads=2, init_std=0.3))
    reference = Transformer(TransformerConfig(44, 24, num_layers=1, d_model=16, num_heads=2, init_std=0.3))
    critic = RewardModel(copy.deepcopy(reference))
    torch.nn.init.normal_(critic.head.weight)
    module, config = ActorCritic(policy, critic), PPOConfig(num_ppo_epochs=2, num_mini_batches=2, vf_coef=0.5)
    widths, found = [], []

    def log_probs(model, token_ids_BS, **options):
        widths.append(token_ids_BS.shape[1])
        return sequence_log_probs(model, token_ids_BS, **options)

    monkeypatch.setattr(ppo, "sequence_log_probs", log_probs)
    for size in (None, 3):
        widths.clear()
        optimizer, scores_B = Recorder(module), torch.arange(8.0)
        values = ppo_step(
            policy, critic, reference, module, optimizer, drawn(lengths), scores_B, config,
            kl_coef=0.1, micro_batch_size=size, max_grad_norm=math.inf,
        )  # fmt: skip
        found.append((values, optimizer.grads))
    assert widths[:6] == [23, 23, 10, 10, 4, 4]  # of policy and reference: 20, 20, 9; 7, 3, 2; 1, 1 and the prompt
    assert len(widths) == 6 + 2 * 2 * 2
    for name, value in found[0][0].items():
        assert found[1][0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert len(found[0][1]) == 4
    for whole, parts in zip(found[0][1], found[1][1], strict=True):
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_pass_has_as_many_steps_as_are_asked_for():
    policy = Transformer(TransformerConfig(44, 24, num_layers=1, d_model=16, num_heads=2))
    critic = RewardModel(copy.deepcopy(policy))
    module = ActorCritic(policy, critic)
    config = PPOConfig(num_ppo_epochs=1, num_mini_batches=4)
    for responses, steps in ((6, 4), (3, 3)):  # of 2, 2, 1 and 1 responses; of one each
        optimizer, rollouts = Recorder(module), drawn([3] * responses)
        ppo_step(
            policy, critic, policy, module, optimizer, rollouts, torch.arange(float(responses)), config, kl_coef=0.1
        )
        assert len(optimizer.grads) == steps


def test_a_critic_speaks_float32_whatever_the_model_runs_in():
    critic = RewardModel(Transformer(TransformerConfig(44, 24, num_layers=1, d_model=16, num_heads=2)))
    torch.nn.init.normal_(critic.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        values_BS, features_BSM = critic(torch.arange(8)[None]), critic.model.features(torch.arange(8)[None])
    assert (features_BSM.dtype, values_BS.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(values_BS, features_BSM.float() @ critic.head.weight[0])


def test_rewards_of_tokens():
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    log_probs, reference = torch.full((2, 4), -1.0), torch.full((2, 4), -1.5)
    found = shaped_rewards(torch.tensor([2.0, 3.0]), log_probs, reference, mask, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0, -0.05, 1.95, 0], [2.95, 0, 0, 0]]))
    nothing = shaped_rewards(torch.tensor([2.0]), log_probs[:1], reference[:1], mask[:1] & False, 0.1)
    assert not nothing.any()
    with pytest.raises(ValueError, match="mask must have shape"):
        shaped_rewards(torch.ones(2), log_probs, reference, mask[:1], 0.1)


def test_a_value_is_clipped_to_where_it_was():
    values = torch.tensor([[1.0, 0.1, 9.0]], requires_grad=True)
    old, returns, mask = torch.zeros(1, 3), torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
    loss, clipped = value_loss_terms(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(((0.2 - 2) ** 2 + (0.1 - 2) ** 2) / 2)
    assert clipped.item() == 1
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -1.9, 0.0]]))


def test_whitening():
    x, mask = torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def test_the_price_follows_its_target():
    control = KLControl(0.1, 2.0)
    control.update(20.0)
    assert control.coef == pytest.approx(0.1 * 1.02)
    control.update(1.9)
    assert control.coef == pytest.approx(0.1 * 1.02 * 0.995)
    fixed = KLControl(0.1, None)
    fixed.update(100.0)
    assert fixed.coef == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"num_ppo_epochs": 0}, {"epsilon": 1.0}, {"gamma": 1.5}, {"target_kl": 0.0}, {"kl_coef": -1.0},
        {"temperature": 0.0}, {"prompts_per_step": 2, "num_mini_batches": 3},
    ],
)  # fmt: skip
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options)) + "|num_mini_batches"):
        PPOConfig(**options)


def config(tmp_path, model, **options):
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{d}?", "answer": d} for d in range(5)])
    table = {"run_dir": tmp_path / "run", "init_from": model, "data": {"train": data, "val": data}, "device": "cpu"}
    table |= {"optimizer": {"lr": 5e-3, "weight_decay": 0.0}, "seed": 3, "rewards": [{"kind": "characters"}]}
    table["ppo"] = {"prompts_per_step": 20, "num_generations": 4, "max_tokens": 1, "kl_coef": 0.0, "vf_coef": 0.5}
    return configs.parse(PPOStageConfig, table | {"budget": "40steps"} | options)


def test_the_verb_learns(tmp_path):
    settings = config(tmp_path, save_model(tmp_path / "model", d_model=32))
    result = StageRun(settings, PPOStage(settings)).train()
    rows = rows_of(tmp_path / "run")
    assert rows[0]["eval/reward"] < 0.5
    assert result.metrics["eval/reward"] > 0.7
    steps = [row for row in rows if "reward" in row]
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.4
    assert {"objective/kl", "explained_variance", "rewards/characters/mean", "entropy"} <= steps[0].keys()


def test_a_killed_run_repeats_itself_bit_for_bit(tmp_path):
    model = save_model(tmp_path / "model")
    options = {
        "budget": "8steps", "checkpoint_interval": 2, "eval_interval": 3, "lora": {"rank": 2}, "micro_batch_size": 7,
        "ppo": {"prompts_per_step": 6, "num_generations": 2, "max_tokens": 3, "target_kl": 0.5, "num_mini_batches": 2,
                "missing_end_penalty": 0.5},
    }  # fmt: skip
    check_a_killed_run_repeats_itself(PPOStage, config(tmp_path, model, **options))


def test_a_reward_model_is_learned_from(tmp_path):
    model = save_model(tmp_path / "model")
    table = {"run_dir": tmp_path / "judge", "init_from": model, "data": {"train": preferences(tmp_path / "p.jsonl")}}
    settings = configs.parse(RewardConfig, table | {"budget": "3steps", "device": "cpu", "optimizer": {"lr": 1e-2}})
    judge = StageRun(settings, RewardStage(settings)).train().export
    rewards = [{"kind": "exact", "weight": 0.0}]
    stage = PPOStage(config(tmp_path, model, reward_model=str(judge), rewards=rewards, budget="1steps"))
    stage.begin()
    rollouts = rollout(stage.llm, ["1?", "2?"], stage.config.ppo, seed=0)
    scores = stage._judged(rollouts)
    for b in range(8):
        length = int(rollouts.mask_BT[b].nonzero().max()) + 2
        alone = stage.judge.score(rollouts.token_ids_BS[b : b + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(scores[b : b + 1], alone)
    assert stage.update(1)["reward"] != 0
    with pytest.raises(ValueError, match="nothing to learn from"):
        config(tmp_path, model, rewards=rewards)
