"""Every optimizer, precision and schedule as a run has them: from a table, resumed, and landing."""

import dataclasses
import io
import json

import pytest
import tiny_run
import torch
from rich.console import Console

from cs336.inference.load import load_model
from cs336.optim import join
from cs336.training import (
    AdamWConfig,
    Budget,
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    LionConfig,
    MuonConfig,
    SGDConfig,
    SOAPConfig,
    TrainConfig,
    Trainer,
    WSDConfig,
    WSDSConfig,
    checkpoint,
)
from cs336.training.budget import Plan
from cs336.training.metrics import Display
from cs336.training.rate import LearningRate
from cs336.utils.config import override, to_table

RUNS = {
    "muon": {"optimizer": MuonConfig(lr=0.02)},
    "newton_schulz": {"optimizer": MuonConfig(method="newton_schulz", nesterov=False, weight_decay_end=0.0)},
    "soap": {"optimizer": SOAPConfig(frequency=2)},
    "lion": {"optimizer": LionConfig(lr=3e-3)},
    "sgd": {"optimizer": SGDConfig()},
    "bf16 moments": {"optimizer": AdamWConfig(state_dtype="bfloat16")},
    "bf16 weights": {"optimizer": AdamWConfig(lr=0.01), "precision": "bf16_weights"},
    "bf16 weights, float32 norms": {
        "model": dataclasses.replace(tiny_run.MODEL, float32_norms=True, qk_norm=True),
        "precision": "bf16_weights",
    },
    "muon, bf16 weights": {"optimizer": MuonConfig(), "precision": "bf16_weights"},
    "stochastic": {"optimizer": AdamWConfig(rounding="stochastic"), "precision": "bf16_weights"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_on_is_the_unbroken_one(tmp_path, monkeypatch, name):
    whole = tiny_run.config(tmp_path, "whole", **RUNS[name])
    tiny_run.train(whole)
    losses = [r["train/loss"] for r in tiny_run.rows(tmp_path / "whole", of="train/loss")]
    assert losses[-1] < losses[0]
    broken = tiny_run.changed(whole, run_dir=tmp_path / "broken")
    with monkeypatch.context() as patch:
        update = Trainer._update
        patch.setattr(Trainer, "_update", lambda self: update(self) if self.step < 6 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_run.train(broken)
    assert tiny_run.train(broken).step == 12
    assert tiny_run.rows(tmp_path / "broken") == tiny_run.rows(tmp_path / "whole")
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (tmp_path / run / "checkpoints/step_00000012" / file for run in ("whole", "broken"))
        assert one.read_bytes() == other.read_bytes()


def test_generation_reads_the_weights_that_training_writes(tmp_path):
    """bfloat16 in the model, in the checkpoint and in the export; the float32 weight is them and the remainder."""
    tiny = tiny_run.config(tmp_path, precision="bf16_weights")
    trainer = Trainer(tiny, display=tiny_run.quiet())
    result = trainer.train()
    model, optimizer = trainer.learner.model, trainer.learner.optimizer
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exported = load_model(result.export, "cpu").state_dict()
    for name, p in model.named_parameters():
        assert torch.equal(exported[name].to(torch.bfloat16), p)
        assert (join(p, optimizer.state[p]["remainder"]) - p).abs().max() > 0
    assert json.loads((tiny.run_dir / "run.json").read_text())["precision"] == "bfloat16 weights"
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with trainer.learner.evaluating() as evaluated:
        assert evaluated(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("optimizer", [SGDConfig(), SOAPConfig(), AdamWConfig()])
def test_a_run_says_that_its_optimizer_loses_bits_of_bf16_weights(tmp_path, optimizer):
    tiny = tiny_run.config(tmp_path, precision="bf16_weights", optimizer=optimizer, budget="2steps")
    for budget in ("2steps", "4steps"):  # a run that goes on may
        told = io.StringIO()
        display = Display(Console(file=told, soft_wrap=True))
        Trainer(tiny_run.changed(tiny, budget=budget), display=display).train()
        warnings = told.getvalue().count(f"loses what {optimizer.kind} adds below a 256th of a weight")
        assert warnings == (optimizer.kind != "adamw")


def test_lion_needs_weights_of_float32(tmp_path):
    with pytest.raises(ValueError, match=r"loses the steps of lion, each of lr, .* use adamw"):
        tiny_run.config(tmp_path, precision="bf16_weights", optimizer=LionConfig())


def test_bf16_weights_learn_as_float32_ones(tmp_path):
    """Small steps are not lost: the loss follows that of bfloat16 products on float32 weights."""
    found = {}
    for precision in ("bf16", "bf16_weights"):
        tiny = tiny_run.config(tmp_path, precision, precision=precision, budget="30steps", eval_interval=0)
        tiny_run.train(tiny_run.changed(tiny, optimizer=AdamWConfig(lr=3e-4)))
        found[precision] = tiny_run.rows(tmp_path / precision, of="val/loss")[-1]["val/loss"]
    assert found["bf16_weights"] == pytest.approx(found["bf16"], abs=0.01)


def test_a_table_without_a_kind_is_adamws_and_options_choose(tmp_path):
    table = to_table(tiny_run.config(tmp_path))
    del table["optimizer"]["kind"]
    assert TrainConfig.from_table(table).optimizer == AdamWConfig()
    options = [
        "--optimizer.kind",
        "muon",
        "--optimizer.lr",
        "0.01",
        "--schedule.kind",
        "wsd_s",
        "--cuda-graph",
        "auto",
    ]
    config = TrainConfig.from_table(override(TrainConfig, to_table(tiny_run.config(tmp_path)), options))
    assert (config.optimizer, config.schedule) == (MuonConfig(lr=0.01), WSDSConfig())
    assert config.cuda_graph == "auto"
    config.save(tmp_path / "c.toml")
    assert TrainConfig.from_toml(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MuonConfig(momentum=1.5), "momentum must be in 0..1"),
        (lambda: MuonConfig(ns_steps=0), "ns_steps must be at least 1"),
        (lambda: SOAPConfig(lr=-1), "lr must be finite and not negative"),
        (lambda: SOAPConfig(frequency=0), "frequency must be at least 1"),
        (lambda: SGDConfig(momentum=0.0), "nesterov looks ahead"),
        (lambda: AdamWConfig(weight_decay_end=2.0), "weight_decay_end must be in 0..1"),
        (lambda: SGDConfig(max_grad_norm=0.0), "max_grad_norm must be more than 0"),
        (lambda: WSDSConfig(periods=0), "periods must be at least 1"),
        (lambda: WSDConfig(decay_part=-0.1), "decay_part must be in 0..1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_weight_decay_goes_along_the_run(tmp_path, monkeypatch):
    tiny = tiny_run.config(tmp_path, optimizer=AdamWConfig(weight_decay=0.4, weight_decay_end=0.5), budget="10steps")
    found = []
    update = Trainer._update

    def watched(self):
        update(self)
        found.append([group["weight_decay"] for group in self.learner.optimizer.param_groups])

    monkeypatch.setattr(Trainer, "_update", watched)
    tiny_run.train(tiny)
    assert [decay for decay, _ in found] == pytest.approx([0.4 * (1 - 0.05 * step) for step in range(1, 11)])
    assert {still for _, still in found} == {0.0}


@pytest.mark.parametrize("budget", ["400steps", "12800tok", "1e9flops"])
@pytest.mark.parametrize(
    "schedule",
    [
        CosineConfig(),
        LinearConfig(),
        WSDConfig(),
        WSDConfig(decay="linear"),
        WSDConfig(decay="cosine"),
        WSDSConfig(),
        WSDSConfig(periods=4, decay="linear", decay_part=0.5),
    ],
)
def test_every_schedule_lands_with_every_budget(schedule, budget):
    plan = Plan(Budget.parse(budget), tokens_per_step=32, flops_per_step=2.5e6)
    assert plan.total_steps == 400
    rate = LearningRate(schedule, 0.01, plan)
    rate.check()
    rates = [rate.at(step) for step in range(1, 401)]
    assert rates[0] == pytest.approx(0.01 / 20)
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001)
    if isinstance(schedule, WSDSConfig):
        ends = [400 * (i + 1) // schedule.periods for i in range(schedule.periods)]
        assert [rates[end - 1] for end in ends] == pytest.approx([0.001] * schedule.periods)
        assert all(rates[end] == pytest.approx(0.01) for end in ends[:-1])
    assert rate.done(400) == 1.0


def test_a_time_budget_that_is_planned_anew_lands_too():
    plan = Plan(Budget.parse("100s"), tokens_per_step=32, flops_per_step=1.0)
    plan.load_state_dict(
        {"budget": {"kind": "seconds", "amount": 100.0}, "decisions": [[5, 200], [80, 300]], "decided_at": 50.0}
    )
    for schedule in (WSDSConfig(), WSDConfig(decay="linear"), CosineConfig()):
        assert LearningRate(schedule, 0.01, plan).at(300) == pytest.approx(0.001)
    assert LearningRate(ConstantConfig(), 0.01, plan).at(300) == 0.01
    assert LearningRate(ConstantConfig(), 0.01, plan).done(300) == 1.0


def test_periods_that_do_not_fit_are_refused_before_the_run(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="3steps", schedule=WSDSConfig(periods=5, warmup_steps=0))
    with pytest.raises(ValueError, match="a run of 3 steps has no 5 periods"):
        Trainer(tiny, display=tiny_run.quiet())
    assert not checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
