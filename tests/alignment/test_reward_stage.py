"""`cs336 reward`: that rewards follow preferences, and are as sure as they are right."""

import json
import re

import pytest
import torch
from killing import check_a_killed_run_repeats_itself
from safetensors.torch import load_file, save_file
from test_dpo_stage import preferences
from tiny_policy import outcomes, rows_of, save_model, tokenizer, write_rows

from cs336.alignment import RewardModel, load_reward_model
from cs336.alignment.reward_model import calibration_curve, calibration_error
from cs336.alignment.run import StageRun
from cs336.alignment.stages.reward import RewardConfig, RewardStage, reward_stage
from cs336.cli.program import main
from cs336.inference import LLM
from cs336.utils import config as configs

ADAPTERS = {"lora": {"rank": 16}, "optimizer": {"lr": 1e-2, "weight_decay": 0.0}, "budget": "150steps"}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def config(tmp_path, model, **options):
    data = {"train": preferences(tmp_path / "train.jsonl"), "val": preferences(tmp_path / "val.jsonl")}
    table = {"run_dir": tmp_path / "run", "init_from": model, "data": data, "budget": "60steps", "device": "cpu"}
    table |= {"optimizer": {"lr": 1e-2, "weight_decay": 0.0}, "batch_size": 5, "seed": 3}
    return configs.parse(RewardConfig, table | options)


@pytest.mark.parametrize("options", [{}, ADAPTERS])
def test_rewards_follow_preferences(tmp_path, model, options):
    settings = config(tmp_path, model, center=0.001, **options)
    result = StageRun(settings, RewardStage(settings)).train()
    first = rows_of(tmp_path / "run")[0]
    assert (first["val/accuracy"], first["val/margin"]) == (0, 0)
    assert first["val/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert result.metrics["val/accuracy"] == 1
    assert result.metrics["val/calibration_error"] < 0.3
    bins = json.loads((tmp_path / "run" / "calibration.json").read_text())["bins"]
    assert sum(b["size"] for b in bins) == 10
    error = sum(b["size"] * abs(b["said"] - b["came_true"]) for b in bins) / 10
    assert error == pytest.approx(result.metrics["val/calibration_error"])
    judge = load_reward_model(result.export)
    end = tokenizer().special_tokens["<|endoftext|>"]
    for d in range(10):
        good, bad = ([*tokenizer().encode(f"{d}={x}"), end] for x in (d, (d + 1) % 10))
        scores = judge.score(torch.tensor([[*good, 0, 0], [*bad, 0, 0]]), torch.tensor([4, 4]))
        assert scores[0] > scores[1]
        torch.testing.assert_close(judge.score(torch.tensor([good]), torch.tensor([4])), scores[:1])  # padding is none
    assert LLM(result.export, device="cpu", quiet=True).generate("1=")[0].text is not None  # every verb takes it


def test_a_margin_asks_for_more(tmp_path, model):
    settings = config(tmp_path, model, use_margin=True)
    stage = RewardStage(settings)
    token_ids, lengths, margin = stage._batch(stage.pairs[:2])
    assert not margin.any()
    loss = stage._terms((token_ids, lengths, torch.full((2,), 2.0)))[0]
    assert loss.item() == pytest.approx(2 * torch.nn.functional.softplus(torch.tensor(2.0)).item(), rel=1e-5)


def test_a_killed_run_repeats_itself_bit_for_bit(tmp_path, model):
    options = {"checkpoint_interval": 3, "eval_interval": 7, "budget": "20steps"}
    check_a_killed_run_repeats_itself(RewardStage, config(tmp_path, model, **options))


def test_a_head_of_zeros_says_nothing_yet(tmp_path, model):
    found = RewardModel(LLM(model, device="cpu", quiet=True).model)
    assert not found(torch.tensor([[1, 2, 3]])).any()
    with pytest.raises(FileNotFoundError, match="holds no reward model"):
        load_reward_model(model)


def test_calibration():
    assert calibration_error([0.25] * 4, [True, False, False, False]) == pytest.approx(0)
    assert calibration_error([0.9, 0.9], [True, False]) == pytest.approx(0.4)
    assert calibration_error([0.95, 0.05], [False, True]) == pytest.approx(0.95)
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    curve = calibration_curve([0.32, 0.38, 0.9, 1.0], [True, False, True, True])
    assert curve == [(pytest.approx(0.35), 0.5, 2), (pytest.approx(0.95), 1.0, 2)]
    for probabilities, came_true in (([], []), ([0.5], []), ([1.5], [True])):
        with pytest.raises(ValueError, match="probabilities"):
            calibration_error(probabilities, came_true)


def test_an_outcome_is_learned_by_itself(tmp_path, model, capsys):
    data, run = outcomes(tmp_path / "outcomes.jsonl"), tmp_path / "run"
    command = ["reward", "--init-from", str(model), "--data.train", str(data), "--data.val", str(data)]
    command += ["--run-dir", str(run), "--loss-type", "outcome", "--budget", "80steps", "--optimizer.lr", "1e-2"]
    assert main([*command, "--device", "cpu", "--batch-size", "7", "--seed", "3", "--micro-batch-size", "3"]) == 0
    assert "5,569 of 5,569 parameters learn on cpu; 20 answers, 3 steps an epoch" in capsys.readouterr().out
    first, *_, last = (row for row in rows_of(run) if "val/loss" in row)
    assert first["val/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["val/accuracy"] == 1
    judge, end = load_reward_model(run / "export"), tokenizer().special_tokens["<|endoftext|>"]
    ids = torch.tensor([[*tokenizer().encode(f"{d}={x}"), end] for d in range(10) for x in (d, (d + 1) % 10)])
    right = judge.score(ids, torch.full((20,), 4)).sigmoid().detach()
    assert right[::2].min() > 0.5 > right[1::2].max()
    said = torch.where(torch.arange(20) % 2 == 0, right, 1 - right)
    assert last["val/loss"] == pytest.approx(-said.log().mean().item(), rel=1e-4)
    bins = json.loads((run / "calibration.json").read_text())["bins"]
    assert sum(b["came_true"] * b["size"] for b in bins) == pytest.approx(10)
    assert last["val/calibration_error"] == pytest.approx((1 - said).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "1=", "completion": "1", "label": 1}, {}, '1: "label" must be true or false, got 1'),
        ({"prompt": "1=", "label": True}, {}, '1: "completion" must be text'),
        ({"prompt": None, "completion": "1", "label": True}, {}, "1: expected a list of"),
        ({"prompt": "", "completion": "1", "label": True}, {}, "1: prompt and completion must not be empty"),
        ({"prompt": "1" * 30, "completion": "1", "label": True}, {}, "no answer is left, 1 are longer than 24 tokens"),
        ({"prompt": "1=", "completion": "1", "label": True}, {"center": 0.1}, "are of pairs"),
    ],
)
def test_outcomes_that_are_none(tmp_path, model, row, options, message):
    data = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=re.escape(message)):
        reward_stage(config(tmp_path, model, data={"train": data}, loss_type="outcome", **options))


@pytest.mark.parametrize("loss_type", ["bradley_terry", "outcome"])
def test_a_model_whose_rewards_are_not_finite(tmp_path, model, loss_type):
    """It is said at the first evaluation, before a step."""
    weights = load_file(model / "model.safetensors")
    next(t for name, t in weights.items() if "down_proj" in name).fill_(torch.nan)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    make = outcomes if loss_type == "outcome" else preferences
    data = {name: make(tmp_path / f"own {name}.jsonl") for name in ("train", "val")}
    settings = config(tmp_path, model, data=data, loss_type=loss_type)
    with pytest.raises(ValueError, match="the model's rewards are not finite: its weights are damaged"):
        StageRun(settings, reward_stage(settings)).train()
