"""`cs336 grpo`: rewards by name, dynamic sampling, corrections, plans, and runs that go on where they were killed."""

import dataclasses
import math

import pytest
import torch
from killing import check_a_killed_run_repeats_itself
from tiny_policy import rows_of, save_model, tokenizer, write_rows

from cs336.alignment import GRPOConfig, LoRAConfig, group_advantages, grpo_step, train_grpo
from cs336.alignment.grpo import collect, importance_weights, learn
from cs336.alignment.rewards import CharactersReward, ExactReward, FormatReward, MathReward, PythonReward, Rewards
from cs336.alignment.rollouts import Order, scores
from cs336.alignment.run import StageRun
from cs336.alignment.stages.grpo import GRPOStage, GRPOStageConfig
from cs336.cli.program import main
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer, TransformerConfig
from cs336.optim import AdamWConfig
from cs336.utils import config as configs
from cs336.verifiers import Verdict


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", d_model=32)


def prompts(path):
    return write_rows(path, [{"prompt": f"{d}?", "answer": d} for d in range(10)])


def config(tmp_path, model, **options):
    data = {"train": prompts(tmp_path / "train.jsonl"), "val": prompts(tmp_path / "val.jsonl")}
    table = {"run_dir": tmp_path / "run", "init_from": model, "data": data, "budget": "40steps", "device": "cpu"}
    table |= {"optimizer": {"lr": 5e-3, "weight_decay": 0.0}, "seed": 3, "rewards": [{"kind": "exact"}]}
    table["grpo"] = {"num_generations": 32, "prompts_per_step": 10, "max_tokens": 1, "loss_type": "dapo"}
    return configs.parse(GRPOStageConfig, table | options)


def test_a_model_learns_from_its_own_answers(tmp_path, model):
    settings = config(tmp_path, model, rewards=[{"kind": "exact"}, {"kind": "math", "weight": 0.0}])
    result = StageRun(settings, GRPOStage(settings)).train()
    assert result.metrics["eval/reward"] == result.metrics["eval/rewards/math/mean"] == 1
    rows = rows_of(tmp_path / "run")
    assert rows[0]["eval/reward"] < 0.3
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    assert steps[-1]["reward"] > 0.9 > 0.3 > steps[0]["reward"]
    assert steps[0]["rewards/exact/mean"] == pytest.approx(steps[0]["reward"])
    assert steps[-1]["entropy"] < steps[0]["entropy"]
    assert {"train/grad_norm", "clip_ratio/high_mean", "completions/mean_length", "lr"} <= steps[0].keys()
    llm = LLM(result.export, device="cpu", quiet=True)
    assert [o.text for o in llm.generate([f"{d}?" for d in range(10)], SamplingParams(0, max_tokens=1))] == [
        str(d) for d in range(10)
    ]
    sample = rows_of(tmp_path / "run", "samples.jsonl")[-1]
    assert (sample["prompt"], sample["text"], sample["reward"], sample["answer"]) == ("5?", "5", 1.0, 5)


def test_a_killed_run_repeats_itself_bit_for_bit(tmp_path, model):
    options = {
        "budget": "12steps", "checkpoint_interval": 2, "eval_interval": 5, "lora": {"rank": 4},
        "grpo": {"num_generations": 4, "prompts_per_step": 3, "max_tokens": 4, "dynamic_sampling": 2,
                 "num_iterations": 2, "beta": 0.1, "importance_cap": 2.0},
        "rewards": [{"kind": "characters"}],
    }  # fmt: skip
    check_a_killed_run_repeats_itself(GRPOStage, config(tmp_path, model, **options))
    assert rows_of(tmp_path / "run", "samples.jsonl") == rows_of(tmp_path / "killed", "samples.jsonl")
    row = rows_of(tmp_path / "run")[5]
    assert row["kl"] >= 0
    assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("interval", "saved"), [(0, [8]), (1000, [3, 6, 8])])
def test_decisions_of_a_plan_are_saved_unless_there_are_no_checkpoints(tmp_path, model, monkeypatch, interval, saved):
    settings = config(
        tmp_path, model, checkpoint_interval=interval, eval_interval=0, budget="1000s", keep_checkpoints=9
    )
    run, totals = StageRun(settings, GRPOStage(settings)), {3: 9, 6: 8}

    def observe(step, seconds, reserve=0.0):
        if step not in totals:
            return False
        return run.decisions.plan._decide(step, totals[step], seconds)

    monkeypatch.setattr(run.decisions, "observe", observe)
    assert run.train().step == 8
    assert sorted(int(path.name.removeprefix("step_")) for path in run.run.checkpoints.iterdir()) == saved


def llm_of():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(44, 16, num_layers=1, d_model=32, num_heads=2, init_std=0.3))
    return LLM(model, tokenizer(), quiet=True, max_seqs=64)


def test_prompts_that_teach_nothing_are_drawn_again():
    llm, asked = llm_of(), []
    order = Order([(f"{d}?", d) for d in range(10)], seed=0)

    def draw(count):
        asked.append(count)
        return order.take(count)

    def reward(response, answer):  # one prompt of two is worth the same whatever is said
        return 1.0 if answer % 2 else float(len(response) + ord(response[0]) if response else 0)

    config = GRPOConfig(4, prompts_per_step=4, max_tokens=3, dynamic_sampling=5)
    found = collect(llm, draw, reward, config, seed=0)
    assert asked[0] == 4
    assert len(asked) > 1
    assert all(count < 4 for count in asked[1:])
    assert (found.rewards_B.view(-1, 4).std(1) > 0).all()
    assert len(found.rewards_B) == len(found.rollouts.texts) == len(found.rollouts.token_ids_BS) == 16
    assert found.metrics["frac_reward_zero_std"] > 0
    text = tokenizer().decode([i for i in found.rollouts.token_ids_BS[5].tolist() if i])
    assert text.removesuffix("<|endoftext|>").replace("0", "").endswith(found.rollouts.texts[5].replace("0", ""))
    again = collect(llm_of(), Order(order.items, 0).take, reward, config, seed=0)
    assert again.rollouts.texts == found.rollouts.texts
    equal = collect(llm, Order(order.items, 0).take, lambda *_: 1.0, config, seed=0)
    assert len(equal.rewards_B) == 16  # of nothing else
    assert not group_advantages(equal.rewards_B, 4).any()
    one = GRPOConfig(7, prompts_per_step=1, max_tokens=3)  # float32's deviation of seven 0.9 is 6e-8
    equal = collect(llm, Order(order.items, 0).take, lambda *_: 0.9, one, seed=0)
    assert (equal.metrics["frac_reward_zero_std"], equal.metrics["reward_std"]) == (1, 0)
    with pytest.raises(ValueError, match="use train_grpo"):
        grpo_step(llm, None, ["1"], ["1"], reward, config)


def test_weights_of_what_the_engine_drew():
    difference_BT = torch.tensor([[math.log(3.0), 0.0], [math.log(0.5), math.log(0.5)]])
    token = importance_weights(difference_BT, GRPOConfig(importance_cap=2.0, loss_type="grpo"))
    torch.testing.assert_close(token, torch.tensor([[2.0, 1.0], [0.5, 0.5]]))
    whole = importance_weights(difference_BT, GRPOConfig(importance_cap=2.0, loss_type="gspo"))
    torch.testing.assert_close(whole, torch.tensor([2.0, 0.25]))
    with pytest.raises(ValueError, match="temperature 1"):
        GRPOConfig(importance_cap=2.0, temperature=0.5)


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_a_gradient_is_weighted_by_what_the_engine_drew(loss_type):
    """What training finds 1.5 times as likely as the engine did counts so much, as far as the cap."""
    llm, grads = llm_of(), []
    optimizer = torch.optim.SGD(llm.model.parameters(), lr=0.0)
    optimizer.step = lambda grad_scale: grads.append([p.grad * grad_scale for p in llm.model.parameters()])
    options = {"max_tokens": 2, "loss_type": loss_type, "max_grad_norm": math.inf}
    order = [("1?", 1), ("2?", 2)]
    for cap in (None, 2.0, 1.2):
        config = GRPOConfig(8, importance_cap=cap, **options)
        found = collect(llm, lambda n: order, Letters(), config, seed=4)
        rollouts = found.rollouts
        count = rollouts.mask_BT.sum(1, keepdim=True) if loss_type == "gspo" else 1  # of a token, or of a response
        colder = rollouts.sampled_log_probs_BT - math.log(1.5) / count * rollouts.mask_BT
        shifted = dataclasses.replace(rollouts, sampled_log_probs_BT=colder)
        values = learn(llm, optimizer, found._replace(rollouts=shifted), config)
        if cap is not None:
            mean = values["sampling/importance_sampling_ratio/mean"]
            assert mean == pytest.approx(min(1.5, cap), rel=1e-3)
    plain, weighted, capped = grads
    assert any(g.abs().max() > 1e-3 for g in plain)
    for a, b, c in zip(plain, weighted, capped, strict=True):
        torch.testing.assert_close(b, 1.5 * a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(c, 1.2 * a, rtol=1e-3, atol=1e-5)


def test_what_options_do_through_the_verb(tmp_path, model):
    """Several epochs clip, an overlong answer teaches nothing, corrections are measured, prompts are drawn again."""
    grpo = {"num_generations": 4, "prompts_per_step": 4, "max_tokens": 1, "loss_type": "dapo", "epsilon": 0.01}
    path = tmp_path / "config.toml"
    path.write_text(
        configs.dumps(config(tmp_path, model, grpo=grpo, budget="3steps", rewards=[{"kind": "characters"}]))
    )

    def rows(name, *options):
        assert main(["grpo", "--config", str(path), "--run-dir", str(tmp_path / name), *options]) == 0
        return [row for row in rows_of(tmp_path / name) if "train/loss" in row]

    once = rows("once")
    assert [row["clip_ratio/region_mean"] for row in once] == [0, 0, 0]  # the ratio is 1
    assert "sampling/importance_sampling_ratio/max" not in once[0]
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows("thrice", "--grpo.num-iterations", "3"))
    assert all(row["completions/clipped_ratio"] > 0.5 for row in once)  # by max_tokens
    masked = rows("masked", "--grpo.mask-truncated-completions", "true")
    assert masked[0]["train/grad_norm"] < once[0]["train/grad_norm"]
    corrected = rows("corrected", "--grpo.importance-cap", "2.0")
    assert corrected[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    again = rows("again", "--grpo.dynamic-sampling", "8")
    assert all(row["train/grad_norm"] > 0 for row in again)
    assert again[-1]["tokens"] > 0
    assert [row["frac_reward_zero_std"] > 0 for row in again] == [True] * 3  # of all that were drawn


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "rloo", "cispo", "expert_iteration"])
def test_every_loss_learns(loss_type):
    llm = llm_of()
    optimizer = AdamWConfig(lr=1e-2, weight_decay=0).build(llm.model)
    config = GRPOConfig(16, prompts_per_step=4, max_tokens=1, loss_type=loss_type, importance_cap=4.0)
    rows = train_grpo(llm, optimizer, [(f"{d}?", d) for d in range(4)], CharactersReward(), config, num_steps=40)
    assert sum(row["reward"] for row in rows[-5:]) / 5 > 0.7
    assert rows[0]["reward"] < 0.4


def letters(response, answer):
    return 2.0 * response[:1].isalpha()


class Letters:
    """How many letters are in the answer."""

    kind, weight = "letters", 1.0

    def __call__(self, response, answer):
        return float(sum(c.isalpha() for c in response))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_engine_and_training_say_the_same_bits(tmp_path, model, lora):
    grpo = {"num_generations": 6, "prompts_per_step": 5, "max_tokens": 7}
    options = {"invariant": True, "grpo": grpo, "micro_batch_size": 4, "budget": "5steps", "lora": lora}
    settings = config(tmp_path, model, **options)
    stage = GRPOStage(settings)
    stage.rewards = Rewards([Letters()])
    StageRun(settings, stage).train()
    rows = [row for row in rows_of(tmp_path / "run") if "reward" in row]
    assert [row["sampling/sampling_logp_difference/max"] for row in rows] == [0.0] * 5
    assert all(row["train/grad_norm"] > 0 for row in rows)


def test_rows_that_teach_nothing_are_counted_all_the_same():
    llm, steps = llm_of(), []
    optimizer = torch.optim.SGD(llm.model.parameters(), lr=0.0)
    optimizer.step = lambda grad_scale: steps.append([p.grad * grad_scale for p in llm.model.parameters()])

    def reward(response, answer):
        return letters(response, answer) * (answer == 1)

    for loss_type in ("dapo", "grpo"):
        steps.clear()
        options = {"max_tokens": 3, "loss_type": loss_type, "max_grad_norm": math.inf, "scale_rewards": False}
        grpo_step(llm, optimizer, ["1?", "2?"], [1, 2], reward, GRPOConfig(8, **options), seed=4)
        found = collect(llm, lambda n: [("1?", 1), ("2?", 2)], reward, GRPOConfig(8, **options), seed=4)
        ids, mask = found.rollouts.token_ids_BS, found.rollouts.mask_BT
        assert found.rewards_B[:8].std() > 0
        log_probs = llm.model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        each = -group_advantages(found.rewards_B, 8, normalize_std=False)[:, None] * log_probs * mask
        loss = each.sum() / mask.sum() if loss_type == "dapo" else (each.sum(1) / mask.sum(1)).mean()
        for got, wanted in zip(steps[0], torch.autograd.grad(loss, list(llm.model.parameters())), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_expert_iteration_imitates_what_was_good_alone():
    llm = llm_of()
    optimizer = torch.optim.SGD(llm.model.parameters(), lr=0.0)
    optimizer.step = lambda grad_scale: optimizer.grads.append(
        [p.grad * grad_scale for p in llm.model.parameters()]
    )  # fmt: skip
    optimizer.grads = []
    config = GRPOConfig(8, max_tokens=2, loss_type="expert_iteration", expert_threshold=1.5, max_grad_norm=math.inf)
    order = Order([("1?", 1), ("2?", 2)], 0)
    found = collect(llm, lambda n: order.items, letters, config, seed=4)
    good = found.rewards_B > 1.5
    assert 0 < good.sum() < 16
    grpo_step(llm, optimizer, ["1?", "2?"], [1, 2], letters, config, seed=4)
    ids, mask = found.rollouts.token_ids_BS[good], found.rollouts.mask_BT[good]
    log_probs = llm.model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    wanted = torch.autograd.grad(-log_probs[mask].mean(), list(llm.model.parameters()))
    for got, expected in zip(optimizer.grads[0], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_an_order_is_a_permutation_again_and_again():
    order = Order(list(range(7)), seed=5)
    first = [*order.take(3), *order.take(4)]
    second = order.take(7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    other = Order(list(range(7)), seed=5)
    other.position = 4
    assert other.take(6) == (first + second)[4:10]


def test_rewards_add_up_by_their_weights():
    rewards = Rewards([ExactReward(weight=2.0), MathReward(), FormatReward(weight=0.0), ExactReward(weight=0.0)])
    assert rewards("4", 4) == 3
    assert rewards(" 4.0", "4") == 1
    means = rewards.means()
    assert means == {
        "rewards/exact.0/mean": 0.5, "rewards/math/mean": 1.0, "rewards/format/mean": 0.0, "rewards/exact.3/mean": 0.5,
    }  # fmt: skip
    assert rewards.means()["rewards/math/mean"] == 0
    assert CharactersReward()("123", "124") == pytest.approx(2 / 3)
    assert CharactersReward()("1234", "124") == 0
    with pytest.raises(ValueError, match="nothing to learn from"):
        Rewards([ExactReward(weight=0.0)])
    with pytest.raises(ValueError, match="weight of a reward must be finite, exact has nan"):
        Rewards([MathReward(), ExactReward(weight=math.nan)])


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward_file.py").write_text("def score(response, answer):\n    return len(response) * answer\n")
    assert PythonReward("own_reward_file:score")("abc", 2) == 6
    for name in ("own_reward_file:other", "no_such_module:score", "own_reward_file"):
        with pytest.raises(ValueError, match="no module:function"):
            PythonReward(name)


@pytest.mark.parametrize("parameters", ["response", "prompt, response, answer", "response, *, answer"])
def test_a_reward_of_ones_own_takes_a_response_and_an_answer(tmp_path, monkeypatch, parameters):
    monkeypatch.chdir(tmp_path)
    name = "own_reward_of_" + "_".join(parameters.split(", ")).replace("*", "star")
    (tmp_path / f"{name}.py").write_text(f"def score({parameters}):\n    return 1.0\n")
    with pytest.raises(ValueError, match=r"is called with \(response, answer\), which it does not take"):
        PythonReward(f"{name}:score")


def test_a_reward_of_ones_own_returns_a_finite_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward_as_told.py").write_text("def score(response, answer, scale=1):\n    return answer\n")
    reward = PythonReward("own_reward_as_told:score")
    assert [reward("", worth) for worth in (2, True, torch.tensor(0.5), Verdict(0.25, "so"))] == [2, 1, 0.5, 0.25]
    for worth in (None, "1", [1.0], math.nan, math.inf, Verdict(math.nan, "no")):
        with pytest.raises(ValueError, match=r"own_reward_as_told:score' of 'a text' is .*: expected a finite number"):
            reward("a text", worth)
        with pytest.raises(ValueError, match=r"the reward of 'a text' is .*: expected a finite number"):
            scores(["a text"], [worth], lambda response, answer: answer)


def test_a_plan_says_memory_and_time_and_writes_nothing(tmp_path, model, capsys):
    path = tmp_path / "config.toml"
    path.write_text(configs.dumps(config(tmp_path, model, budget="1000steps")))
    assert main(["grpo", "--config", str(path), "--plan", "--grpo.beta", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "GiB (training" in out
    assert "reference" in out
    assert "hours" in out
    assert not (tmp_path / "run").exists()


def test_options_are_what_is_taken(capsys):
    assert main(["grpo", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "--grpo.max-tokens" in listed
    assert not any(f"--grpo.{name}" in listed for name in ("seed", "micro-batch-size", "max-grad-norm"))
    assert main(["grpo", "--max-tokens", "8"]) == 2
    assert "unknown key max_tokens; did you mean grpo.max_tokens?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward", "ppo", "grpo"])
def test_several_processes_are_refused(tmp_path, model, monkeypatch, capsys, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = ["--init-from", str(model), "--data.train", "none.jsonl", "--run-dir", str(tmp_path / "run")]
    assert main([verb, *run, "--budget", "1steps"]) == 2
    assert "one process, and torchrun started 2: start it without torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rewards_as_options(tmp_path, model, capsys):
    assert main(["grpo", "--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for text in (
        "--rewards a list of {kind = 'math', weight} or",
        "{kind = 'python', function, weight}",
        "As options:",
    ):
        assert text in listed
    path = tmp_path / "config.toml"
    path.write_text(configs.dumps(config(tmp_path, model)))
    given = ['{kind = "exact"}', '{kind = "math", weight = 0.0}']
    assert main(["grpo", "--config", str(path), "--rewards", *given, "--print-config"]) == 0
    shown = tmp_path / "shown.toml"
    shown.write_text(capsys.readouterr().out)
    assert configs.load(GRPOStageConfig, shown).rewards == (ExactReward(), MathReward(weight=0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": [{"kind": "exact", "weight": 0.0}]}, "nothing to learn from"),
        ({"rewards": [{"kind": "maths"}]}, "did you mean 'math'"),
        ({"grpo": {"seed": 1}}, r"grpo.seed stands outside \[grpo\] in a run: give seed = 1 instead"),
        ({"grpo": {"max_grad_norm": 2.0}}, "give optimizer.max_grad_norm = 2.0 instead"),
        ({"max_seqs": 0}, "max_seqs must be at least 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, model, **options)


def test_prompts_that_leave_no_room(tmp_path, model):
    settings = config(tmp_path, model)
    data = {"train": write_rows(tmp_path / "long.jsonl", [{"prompt": "1" * 24, "answer": 1}])}
    with pytest.raises(ValueError, match=r"long\.jsonl, prompt 1: it has 24 tokens"):
        GRPOStage(config(tmp_path, model, data=data))
    write_rows(tmp_path / "long.jsonl", [{"prompt": "1", "answer": 1}, {"prompt": "\u00e9", "answer": 1}])
    with pytest.raises(ValueError, match=r"long\.jsonl, prompt 2: the byte 0xC3 of the text is not in the vocabulary"):
        GRPOStage(config(tmp_path, model, data=data))
    write_rows(tmp_path / "long.jsonl", [{"prompt": "1"}])
    with pytest.raises(ValueError, match=r'long\.jsonl:1: expected "answer"'):
        GRPOStage(config(tmp_path, model, data=data))
    assert dataclasses.replace(settings, lora=LoRAConfig(2)).lora.rank == 2


def test_weights_that_a_step_changes_are_read_anew_under_bf16(tmp_path, model):
    """Autocast keeps casts of weights unless told not to: later iterations and the engine would see the old ones."""
    stage = GRPOStage(config(tmp_path, model, precision="bf16"))
    token_ids = torch.tensor([[1, 2, 3]])
    with stage.policy.autocast(), torch.no_grad():
        before = stage.policy.model(token_ids)
        stage.policy.model.layers[0].mlp.down_proj.weight.neg_()
        assert not torch.equal(stage.policy.model(token_ids), before)


def test_the_engine_has_room_for_the_longest_answer_and_no_more(tmp_path):
    settings = config(tmp_path, save_model(tmp_path / "long", context_length=4096))
    stage = GRPOStage(settings)
    stage.begin()
    assert stage.llm.engine.max_len == 3  # a digit, a question mark, and max_tokens = 1
