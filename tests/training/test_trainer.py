import dataclasses
import functools
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import tiny_run
import torch
from torch._dynamo.utils import counters

from cs336 import ops
from cs336.data import ShardWriter
from cs336.models import Transformer, from_pretrained
from cs336.training import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    DataConfig,
    LinearConfig,
    NextToken,
    NonFiniteError,
    TrainConfig,
    Trainer,
    WSDConfig,
    WSDSConfig,
    checkpoint,
)
from cs336.training.decisions import SAVED_PER_SECOND, Decisions, Pause
from cs336.training.guard import NonFiniteStep
from cs336.training.learner import Learner


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    tiny = tiny_run.config(root, budget="40steps", log_interval=10, eval_interval=2, sample_interval=20)
    tiny = tiny_run.changed(tiny, optimizer=AdamWConfig(lr=0.02), checkpoint_interval=None, keep_checkpoints=3)
    return tiny, tiny_run.train(tiny)


def test_it_learns(finished):
    _, result = finished
    assert result.finished
    assert (result.step, result.tokens) == (40, 40 * 4 * 8)
    assert result.val["val/loss"] < 0.75 * math.log(tiny_run.VOCAB)
    assert result.val["val/bpb"] == pytest.approx(result.val["val/loss"] / math.log(2) / 2)  # two bytes a token
    assert result.seconds > 0


def test_what_it_leaves(finished):
    tiny, result = finished
    run = tiny.run_dir
    kept = [int(p.name[5:]) for p in checkpoint.list_checkpoints(run / "checkpoints")]
    assert kept == [32, 36, 40]
    assert result.checkpoint == run / "checkpoints/step_00000040"
    model, exported = Transformer(tiny.model), from_pretrained(result.export)
    checkpoint.load_checkpoint(result.checkpoint, model)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids), exported(ids))
    facts = json.loads((run / "run.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["tokens_per_step"] == 32


def test_metrics(finished):
    tiny, _ = finished
    rows = [json.loads(line) for line in (tiny.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if "train/loss" in r]
    names = {"step", "tokens", "seconds", "train/loss", "train/grad_norm", "train/tok_per_sec", "train/mfu", "lr"}
    assert all(set(r) == names for r in trained)
    assert [r["step"] for r in trained] == [10, 20, 30, 40]
    assert [r["step"] for r in rows if "val/bpb" in r] == list(range(2, 41, 2))
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert all(r["tokens"] == 32 * r["step"] for r in rows)
    assert trained[-1]["lr"] == pytest.approx(0.002)
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)


def test_samples_are_drawn_in_eval_mode_without_gradients(finished):
    samples = [json.loads(line) for line in (finished[0].run_dir / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [20, 40]
    assert all(s["text"].endswith("False False") for s in samples)


def test_what_is_done_between_steps_is_told(finished):
    _, result = finished
    assert set(result.pauses) == {"validate", "sample", "checkpoint"}
    assert all(seconds > 0 for seconds in result.pauses.values())
    assert sum(result.pauses.values()) < result.seconds


def test_a_finished_run_is_left_as_it_is(finished):
    tiny, result = finished
    before = (tiny.run_dir / "metrics.jsonl").read_bytes()
    again = tiny_run.train(tiny)
    assert (again.finished, again.step, again.val, again.checkpoint) == (True, 40, result.val, result.checkpoint)
    assert again.seconds == pytest.approx(result.seconds, abs=1)
    assert (tiny.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_larger_budget_continues(tmp_path):
    tiny_run.train(tiny_run.config(tmp_path, budget="6steps"))
    result = tiny_run.train(tiny_run.config(tmp_path, budget="384tok"))
    assert (result.finished, result.step) == (True, 12)
    assert [r["step"] for r in tiny_run.rows(tmp_path / "run", of="train/loss")] == list(range(1, 13))


def test_another_configuration_is_refused(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="3steps")
    tiny_run.train(tiny)
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.001 -> 0\.5.*use another run_dir"):
        tiny_run.train(tiny_run.changed(tiny, optimizer=AdamWConfig(lr=0.5)))


def test_a_trainer_can_be_asked_again(tmp_path):
    trainer = Trainer(tiny_run.config(tmp_path), display=tiny_run.quiet())
    trainer.train()
    weights = trainer.learner.model.state_dict()
    assert trainer.train().finished
    assert all(torch.equal(v, weights[k]) for k, v in trainer.learner.model.state_dict().items())


def test_a_trainer_that_was_interrupted_can_be_asked_again(tmp_path, monkeypatch):
    tiny_run.train(tiny_run.config(tmp_path, "whole"))
    trainer = Trainer(tiny_run.config(tmp_path), display=tiny_run.quiet(), sample=tiny_run.sample)
    update = trainer.learner.optimizer.step

    def interrupted(**kwargs):
        if trainer.step == 6:
            raise KeyboardInterrupt
        update(**kwargs)

    monkeypatch.setattr(trainer.learner.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.train().finished
    assert tiny_run.rows(tmp_path / "run") == tiny_run.rows(tmp_path / "whole")


def test_a_longer_time_budget_keeps_the_learning_rate_until_it_is_planned(tmp_path, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.02)
    tiny = tiny_run.config(tmp_path, budget="1s", eval_interval=0, checkpoint_interval=0)
    Trainer(tiny, display=tiny_run.quiet()).train()
    trainer = Trainer(tiny_run.changed(tiny, budget="3s"), display=tiny_run.quiet())
    assert trainer.decisions.plan.measuring
    assert trainer.rate.at(trainer.step + 1) == tiny_run.rows(tiny.run_dir, of="lr")[-1]["lr"] < 1.5e-4
    assert trainer.train().seconds == pytest.approx(3, abs=0.05)
    assert tiny_run.rows(tiny.run_dir, of="lr")[-1]["lr"] < 1.5e-4


def batch(tiny, seed=0):
    x_BT1 = torch.randint(tiny_run.VOCAB, (tiny.batch_size, 9), generator=torch.Generator().manual_seed(seed))
    return x_BT1[:, :-1], x_BT1[:, 1:]


def test_accumulated_gradients_equal_the_large_batch(tmp_path):
    tiny = tiny_run.config(tmp_path, batch_size=12)
    gradients = []
    for size in (12, 4, 1):
        learner = Learner(tiny_run.changed(tiny, micro_batch_size=size))
        kept = {}
        for name, parameter in learner.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, n=name, k=kept: k.__setitem__(n, p.grad.clone()))
        gradients.append(kept | learner.update(batch(tiny), lr=0.0))
    for other in gradients[1:]:
        for name, value in gradients[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    learner = Learner(tiny_run.config(tmp_path, optimizer=AdamWConfig(max_grad_norm=0.01)))
    scales = []
    step = learner.optimizer.step
    monkeypatch.setattr(
        learner.optimizer, "step", lambda grad_scale: (scales.append(grad_scale), step(grad_scale=grad_scale))
    )
    norm = learner.update(batch(learner.config), lr=1e-3)["grad_norm"]
    assert norm > 0.01
    assert scales[0] * 32 * norm == pytest.approx(0.01, rel=1e-3)  # the scale divides by the 32 targets too


def test_only_matrices_decay(tmp_path):
    learner = Learner(tiny_run.config(tmp_path))
    decays = {p: g["weight_decay"] for g in learner.optimizer.param_groups for p in g["params"]}
    assert {p.dim() >= 2 for p in decays} == {True, False}
    assert all(decay == (0.1 if p.dim() >= 2 else 0.0) for p, decay in decays.items())


def test_learning_rate_lands(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="100steps", schedule=CosineConfig(warmup_steps=10, min_lr_ratio=0.2))
    trainer = Trainer(tiny, display=tiny_run.quiet())
    rates = [trainer.rate.at(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("decisions", "warmup"),
    [
        ([[5, 400], [100, 250], [170, 900]], None),
        ([[5, 50], [30, 2000]], None),
        ([[150, 9000]], None),
        ([[5, 400], [30, 200]], 60),
        ([[5, 400]], 0),
    ],
)
def test_learning_rate_does_not_jump_when_a_time_budget_is_planned(tmp_path, decisions, warmup):
    tiny = tiny_run.config(tmp_path, budget="1h", schedule=CosineConfig(warmup_steps=warmup))
    trainer = Trainer(tiny, display=tiny_run.quiet())
    (decided, first), *_ = decisions
    rates = [trainer.rate.at(step) for step in range(1, decided + 1)]
    trainer.rate.unplanned = rates[-1]
    for number, (_, total) in enumerate(decisions, 1):
        trainer.decisions.plan.decisions, trainer.decisions.plan.total_steps = decisions[:number], total
        until = decisions[number][0] if number < len(decisions) else total
        rates += [trainer.rate.at(step) for step in range(len(rates) + 1, until + 1)]
    assert len(rates) == decisions[-1][1]
    assert rates[-1] == pytest.approx(1e-4)
    assert 0.95e-3 < max(rates) <= 1e-3
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    steepest = 1e-3 / max(1, 0.05 * (first - decided) - 1)  # of the way up
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 1.001 * max(1e-3 / (warmup or 100), steepest)


@pytest.mark.parametrize(("budget", "warmup"), [("10steps", 10), ("320tok", 99)])
def test_a_schedule_that_cannot_land_is_refused_before_training(tmp_path, budget, warmup):
    tiny = tiny_run.config(tmp_path, budget=budget, schedule=CosineConfig(warmup_steps=warmup))
    with pytest.raises(
        ValueError, match=f"cannot land: {warmup} warm-up steps, and the budget of {budget} makes 10 steps"
    ):
        Trainer(tiny)
    assert not tiny.run_dir.exists()


def test_more_periods_than_steps_are_refused_before_training(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="4steps", schedule=WSDSConfig(periods=5))
    with pytest.raises(ValueError, match=r"a run of 4 steps has no 5 periods: set schedule\.periods lower"):
        Trainer(tiny)
    assert tiny_run.train(tiny_run.config(tmp_path, budget="5steps", schedule=WSDSConfig(periods=5))).finished


def test_validation_in_which_no_target_counts(tmp_path):
    data = tiny_run.write_data(tmp_path)
    with ShardWriter(tmp_path / "ignored", vocab_size=tiny_run.VOCAB, tokenizer="t", eot_id=0) as writer:
        writer.write(np.zeros(100, np.int64), documents=1, text_bytes=200)
    data = dataclasses.replace(data, val=tmp_path / "ignored")
    tiny = tiny_run.config(tmp_path, data=data, objective=NextToken(ignore_index=0))
    with pytest.raises(ValueError, match=r"ignored has no targets that count: all are the ignore_index"):
        tiny_run.train(tiny)


def test_a_time_budget_that_becomes_slower_than_its_warm_up_goes_on(tmp_path):
    """The first plan's schedule is gone along faster: no plan after it has to hold the warm-up."""
    trainer = Trainer(tiny_run.config(tmp_path, budget="100s", schedule=CosineConfig(warmup_steps=100)))
    trainer.decisions.plan.decisions = [[5, 333], [41, 90]]
    trainer.rate.check()
    trainer.decisions.plan.decisions = [[5, 90]]
    with pytest.raises(ValueError, match="cannot land"):
        trainer.rate.check()


def test_guards_before_training(tmp_path):
    tiny = tiny_run.config(tmp_path)

    class Other:
        fingerprint, vocab_size = "other", 32

    with pytest.raises(ValueError, match="made by tokenizer t, the one in use is other"):
        Trainer(tiny, tokenizer=Other())
    with pytest.raises(ValueError, match="needs a vocabulary of 32, the model's embedding has 31 rows"):
        Trainer(tiny_run.changed(tiny, model=dataclasses.replace(tiny.model, vocab_size=31)))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Trainer(tiny_run.changed(tiny, data=DataConfig(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="the budget is 31 tokens, and one step takes 32"):
        Trainer(tiny_run.changed(tiny, budget="31tok"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees 0 GPUs"):
            Trainer(tiny_run.changed(tiny, device="cuda"))
    assert not tiny.run_dir.exists()


def test_half_of_what_torchrun_sets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, and RANK, LOCAL_RANK, .*: start .* with torchrun"):
        Trainer(tiny_run.config(tmp_path))


def test_a_time_budget_saves_each_decision_before_it_acts(tmp_path, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.01 if trainer.step < 100 else 0.02)
    trainer = Trainer(
        tiny_run.config(
            tmp_path, budget="3s", checkpoint_interval=10**6, eval_interval=0, log_interval=5, keep_checkpoints=99
        ),
        display=tiny_run.quiet(),
    )
    result = trainer.train()
    decisions = trainer.decisions.plan.decisions
    saved = [int(p.name[5:]) for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")]
    assert result.finished
    assert saved == sorted({step for step, _ in decisions} | {result.step})
    assert decisions[-1][1] == result.step
    assert len(decisions) > 1
    assert result.seconds == pytest.approx(3, abs=0.05)
    newest = checkpoint.read_extra(result.checkpoint)["plan"]
    assert newest["decisions"] == decisions
    assert tiny_run.rows(tmp_path / "run", of="lr")[-1]["lr"] < 1.5e-4  # 1e-4 at the end, from 1e-3


def test_a_run_without_checkpoints_saves_at_its_end_alone(tmp_path, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.02)
    settings = {"checkpoint_interval": 0, "eval_interval": 0, "keep_checkpoints": 99}
    trainer = Trainer(tiny_run.config(tmp_path, budget="2s", **settings), display=tiny_run.quiet())
    result = trainer.train()
    assert trainer.decisions.plan.decisions
    assert checkpoint.list_checkpoints(tmp_path / "run/checkpoints") == [result.checkpoint]


def test_the_last_save_is_planned_for_before_one_was_measured(tmp_path):
    """Ten steps a second, and 2 s for the bytes of a checkpoint."""
    config = tiny_run.config(tmp_path, budget="12s", checkpoint_interval=0)
    sizes = {"tokens_per_step": 1, "flops_per_step": 1.0, "pauses": []}
    decisions = Decisions(config, **sizes, saved_bytes=int(2 * SAVED_PER_SECOND))
    step = 0
    while not decisions.finished(step):
        step += 1
        decisions.observe(step, 0.1 * step)
    assert step == pytest.approx(100, abs=3)


def test_a_save_in_the_background_does_not_say_what_the_last_one_takes(tmp_path):
    config = tiny_run.config(tmp_path, budget="12s")
    decisions = Decisions(config, tokens_per_step=1, flops_per_step=1.0, pauses=[])
    decisions.took(decisions.save, 2.0)
    decisions.took(decisions.save, 0.05, background=True)
    step = 0
    while not decisions.finished(step):
        step += 1
        decisions.observe(step, 0.1 * step)
    assert step == pytest.approx(100, abs=4)


def test_steps_repeated_from_the_start_have_the_learning_rates_that_they_had(tmp_path, monkeypatch):
    """The plan of a time budget came after them, and no checkpoint has it."""
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.02)
    tiny = tiny_run.config(tmp_path, budget="2s", checkpoint_interval=0, eval_interval=0, log_interval=1)
    trainer = Trainer(tiny, display=tiny_run.quiet())
    result = trainer.train()
    before = [(trainer.rate.at(step), trainer.rate.done(step)) for step in range(1, result.step + 1)]
    assert tiny_run.rows(tmp_path / "run", of="lr")[0]["lr"] == before[0][0] < before[20][0]
    shutil.rmtree(tmp_path / "run/checkpoints")
    with trainer.run.open_rows(0, False):
        trainer._go_back(NonFiniteStep(50, {"loss": math.nan, "grad_norm": math.nan}))
    assert trainer.step == 0
    assert trainer.seconds >= result.seconds
    assert [(trainer.rate.at(step), trainer.rate.done(step)) for step in range(1, result.step + 1)] == before


def test_a_time_budget_holds_when_steps_become_slow_between_rows(tmp_path, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.002 if trainer.decisions.plan.measuring else 0.1)
    tiny = tiny_run.config(tmp_path, budget="2s", log_interval=1000, eval_interval=0, checkpoint_interval=0)
    assert tiny_run.train(tiny).seconds == pytest.approx(2, abs=0.1)


def spoil_step(monkeypatch, step):
    """Make the MLP of layer 0 overflow in one step, whenever that step is made."""
    trainers = []
    build = Trainer._restore

    def restore(self):
        build(self)
        trainers.append(self)
        self.learner.model.layers[0].mlp.register_forward_hook(
            lambda module, inputs, output: output * (torch.inf if self.step + 1 == step else 1.0)
        )

    monkeypatch.setattr(Trainer, "_restore", restore)


@pytest.mark.parametrize("log_interval", [1, 3])
def test_a_loss_that_is_not_finite_names_its_module(tmp_path, monkeypatch, log_interval):
    """The host sees it after the update, and in rows of three after further ones: the weights are spoilt by then."""
    spoil_step(monkeypatch, 7)
    trainer = Trainer(tiny_run.config(tmp_path, log_interval=log_interval, eval_interval=0), display=tiny_run.quiet())
    with pytest.raises(NonFiniteError, match=r"step 7: loss nan.*output of layers\.0\.mlp \(SwiGLU\).*step_00000004"):
        trainer.train()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004"]
    bad = tiny_run.rows(tmp_path / "run", of="train/loss")[-1]
    assert bad["step"] == 7
    assert math.isnan(float(bad["train/loss"]))


def test_divergence_before_the_first_checkpoint(tmp_path):
    tiny = tiny_run.config(tmp_path, optimizer=AdamWConfig(lr=1e30), log_interval=2)
    with pytest.raises(NonFiniteError, match=r"step 2: .* the first that is not finite is the .*checkpoint: none yet"):
        tiny_run.train(tiny)


def test_no_checkpoint_is_made_of_spoilt_weights(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 8)
    with pytest.raises(NonFiniteError, match="step 8"):
        tiny_run.train(tiny_run.config(tmp_path, log_interval=50, eval_interval=0))
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000004"]


def test_a_full_disk_stops_the_run_and_it_goes_on(tmp_path, monkeypatch):
    whole = tiny_run.config(tmp_path, "whole")
    tiny_run.train(whole)
    tiny = tiny_run.config(tmp_path)
    save = checkpoint.save_file

    def fail(tensors, path):
        if "step_00000008" in str(path) and path.name == checkpoint.OPTIMIZER:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail)
        with pytest.raises(OSError, match=r"No space left on device.*earlier checkpoints are whole"):
            tiny_run.train(tiny)
    assert [p.name for p in (tiny.run_dir / "checkpoints").iterdir()] == ["step_00000004"]
    tiny_run.train(tiny)
    assert tiny_run.rows(tiny.run_dir) == tiny_run.rows(whole.run_dir)


@pytest.mark.parametrize("objective", [NextToken(), NextToken(label_smoothing=0.1, z_loss=0.1, fused_head=True)])
def test_validation_reads_whole_batches_spread_over_the_set(tmp_path, objective):
    with ShardWriter(tmp_path / "data", vocab_size=tiny_run.VOCAB, tokenizer="t", eot_id=0) as writer:
        writer.write(np.arange(8 * 10 + 1) % tiny_run.VOCAB)
    tiny = tiny_run.config(
        tmp_path,
        eval_tokens=50,
        batch_size=2,
        data=DataConfig(tmp_path / "data", tmp_path / "data"),
        objective=objective,
    )
    trainer = Trainer(tiny, display=tiny_run.quiet())
    read = []
    windows = trainer.val_data.windows
    trainer.val_data.windows = lambda index: (read.append(index), windows(index))[1]
    found = trainer.evaluators[0](trainer.learner, 100)
    assert [index.tolist() for index in read] == [[0, 1], [3, 5], [6, 8]]
    x_BT1 = windows(np.concatenate(read))
    loss = ops.cross_entropy(trainer.learner.model(x_BT1[:, :-1]), x_BT1[:, 1:])
    assert found.metrics == {"val/loss": pytest.approx(loss.item())}
    assert trainer.learner.model.training


def test_bf16_keeps_fp32_weights(tmp_path):
    tiny = tiny_run.config(tmp_path, precision="bf16", budget="4steps", checkpoint_interval=2)
    seen = []
    trainer = Trainer(tiny, display=tiny_run.quiet())
    trainer.learner.model.layers[0].register_forward_hook(lambda m, i, o: seen.append(o[0].dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.learner.model.parameters())


def test_validation_of_a_compiled_run_is_that_without(tmp_path, monkeypatch):
    """Nothing is dropped out, and nothing more compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # the graphs are the same
    model = dataclasses.replace(tiny_run.MODEL, embedding_dropout=0.5)
    options = {"budget": "2steps", "eval_interval": 1, "checkpoint_interval": 0, "model": model}
    tiny = tiny_run.config(tmp_path, compile=True, **options)
    graphs = counters["stats"]["unique_graphs"]
    compiled = tiny_run.train(tiny).val
    assert counters["stats"]["unique_graphs"] == graphs + 1
    eager = tiny_run.train(tiny_run.changed(tiny, compile=False, run_dir=tmp_path / "eager")).val
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_a_slow_pause_comes_seldom_in_a_time_budget(tmp_path):
    decisions = Trainer(tiny_run.config(tmp_path, budget="100s"), display=tiny_run.quiet()).decisions
    decisions.plan.decisions, decisions.plan.total_steps = [[0, 1000]], 1000
    pause = Pause("validate", None, 20)

    def times(seconds):
        decisions.took(pause, seconds)
        due = [decisions.due(pause, step) for step in range(1, 1001)]
        assert due[-1]
        return sum(due)

    assert [times(seconds) for seconds in (0.1, 1.0, 10.0)] == [20, 5, 1]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (LinearConfig(warmup_steps=2, min_lr_ratio=0.0), [0.5, 1.0, 0.875, 0.5, 0.0]),
        (WSDConfig(warmup_steps=2, min_lr_ratio=0.0, decay_part=0.4), [0.5, 1.0, 1.0, 1.0, 0.0]),
        (ConstantConfig(warmup_steps=2), [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_other_schedules_can_be_chosen(tmp_path, schedule, rates):
    tiny = tiny_run.config(tmp_path, budget="10steps", schedule=schedule)
    tiny.save(tmp_path / "c.toml")
    assert TrainConfig.from_toml(tmp_path / "c.toml") == tiny
    tiny_run.train(tiny)
    found = [row["lr"] / 1e-3 for row in tiny_run.rows(tiny.run_dir, of="lr")]
    assert [found[i] for i in (0, 1, 2, 5, 9)] == pytest.approx(rates)


def test_gradient_checkpointing_changes_memory_and_no_number(tmp_path):
    kept = []
    for on in (False, True):
        tiny = tiny_run.config(tmp_path, str(on), gradient_checkpointing=on, budget="3steps")
        trainer = Trainer(tiny, display=tiny_run.quiet())
        assert trainer.learner.model.gradient_checkpointing is on
        trainer.train()
        kept.append(tiny_run.rows(tiny.run_dir))
    assert kept[0] == kept[1]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = {"device": "cuda", "deterministic": True, "compile": True, "log_interval": 5, "micro_batch_size": 2}


@gpu
def test_gpu_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    tiny_run.train(tiny_run.config(tmp_path, "whole", **GPU))
    tiny = tiny_run.config(tmp_path, **GPU)
    update = Trainer._update

    def killed(self):
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny_run.train(tiny)
    tiny_run.train(tiny)
    assert tiny_run.rows(tmp_path / "run") == tiny_run.rows(tmp_path / "whole")


@gpu
def test_gpu_steps_do_not_wait_for_the_device(tmp_path, monkeypatch):
    update = Trainer._update

    def watched(self):
        if self.step < 3:  # compiling, and the memory of pinned buffers
            return update(self)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return update(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_update", watched)
    assert tiny_run.train(tiny_run.config(tmp_path, **GPU)).finished
