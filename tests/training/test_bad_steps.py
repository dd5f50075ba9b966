"""Steps that are not like the others are left out, or end the run, and the module is named."""

import json
import math

import pytest
import tiny_run
import torch
from rich.console import Console

from cs336.training import GuardConfig, SpikeError, StepError, Trainer
from cs336.training.guard import StepGuard
from cs336.training.metrics import Display


def spoil(monkeypatch, factors):
    """Multiply the loss of the steps in `factors`, through the first layer's MLP where the factor is not finite."""

    def update(self, *args, **kwargs):
        factor = factors.get(self.step + 1, 1.0)
        handles = []
        if math.isfinite(factor):
            terms = self.learner.terms
            self.learner.terms = lambda batch: (terms(batch)[0] * factor, *terms(batch)[1:])
        else:
            mlp = self.learner.model.layers[0].mlp
            handles.append(mlp.register_forward_hook(lambda module, inputs, output: output * factor))
        try:
            original(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            if math.isfinite(factor):
                self.learner.terms = terms

    original = Trainer._update
    monkeypatch.setattr(Trainer, "_update", update)


def run(tmp_path, name="run", **changes):
    with open(tmp_path / f"{name}.txt", "w") as file:
        display = Display(Console(file=file, soft_wrap=True))
        trainer = Trainer(tiny_run.config(tmp_path, name, **changes), display=display)
        try:
            trainer.train()
        finally:
            said = (tmp_path / f"{name}.txt").read_text()
    return trainer, said


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.learner.model.parameters()])


def test_a_step_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    """As if its batch had not been there: weights and the optimizer's state are those before it."""
    spoil(monkeypatch, {7: math.inf, 8: math.nan})
    before = {}
    accept = Trainer._accept

    def watched(self, batch, values):
        states = self.learner.optimizer.state_dict()["state"]
        before[self.step + 1] = weights(self), states[0]["step"].item() if states else 0
        return accept(self, batch, values)

    monkeypatch.setattr(Trainer, "_accept", watched)
    trainer, said = run(tmp_path, guard=GuardConfig(non_finite="skip"))
    assert torch.equal(before[7][0], before[8][0])
    assert torch.equal(before[8][0], before[9][0])
    assert not torch.equal(before[9][0], before[10][0])
    assert [before[i][1] for i in (7, 8, 9, 10)] == [6, 6, 6, 7]
    assert trainer.step == 12
    for step in (7, 8):
        assert f"step {step} is left out: loss nan" in said
    assert "the first that is not finite is the output of layers.0.mlp (SwiGLU)" in said
    rows = tiny_run.rows(tmp_path / "run", of="train/loss")
    assert all(math.isfinite(r["train/loss"]) for r in rows)
    assert not (tmp_path / "run/failure.json").exists()


def test_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, dict.fromkeys(range(5, 13), math.inf))
    with pytest.raises(StepError, match="4 steps in a row would be left out; the last, 8: loss nan"):
        run(tmp_path, guard=GuardConfig(non_finite="skip", most_skipped=3))
    record = json.loads((tmp_path / "run/failure.json").read_text())
    assert record["step"] == 8
    assert "layers.0.mlp" in record["cause"]


def test_a_spike_is_left_out(tmp_path, monkeypatch):
    spoil(monkeypatch, {9: 30.0})
    guard = GuardConfig(spike="skip", window=8, sigmas=50)
    _, said = run(tmp_path, guard=guard)
    assert "step 9 is left out: a spike, loss" in said
    assert "the longest gradient is that of" in said
    assert "step 10 is left out" not in said
    losses = {r["step"]: r["train/loss"] for r in tiny_run.rows(tmp_path / "run", of="train/loss")}
    assert max(losses.values()) < 2 * min(losses.values())


def test_a_spike_ends_the_run_or_is_kept(tmp_path, monkeypatch):
    spoil(monkeypatch, {9: 30.0})
    with pytest.raises(SpikeError, match=r"step 9: a spike, loss .* in the 8 steps before; the longest gradient"):
        run(tmp_path, guard=GuardConfig(spike="stop", window=8, sigmas=50))
    assert json.loads((tmp_path / "run/failure.json").read_text())["step"] == 9
    trainer, said = run(tmp_path, "kept")
    assert trainer.step == 12
    assert "left out" not in said


def test_a_guard_that_finds_nothing_changes_nothing(tmp_path):
    plain, _ = run(tmp_path, "plain")
    guarded, _ = run(tmp_path, "guarded", guard=GuardConfig(non_finite="skip", spike="skip"))
    assert torch.equal(weights(plain), weights(guarded))
    assert tiny_run.rows(tmp_path / "plain") == tiny_run.rows(tmp_path / "guarded")


def test_a_run_that_goes_on_remembers_the_steps_before(tmp_path):
    guard = GuardConfig(spike="skip", window=8, sigmas=50)
    whole, _ = run(tmp_path, "whole", guard=guard)
    run(tmp_path, "parts", guard=guard, budget="6steps")
    again = Trainer(tiny_run.config(tmp_path, "parts", guard=guard), display=tiny_run.quiet())
    assert len(again.guard.state_dict()["latest"]["loss"]) == 6
    again.train()
    assert len(whole.guard.state_dict()["latest"]["loss"]) == len(again.guard.state_dict()["latest"]["loss"]) == 8


def test_what_a_spike_is():
    guard = StepGuard(GuardConfig(spike="skip", window=8, sigmas=3))
    for i in range(4):
        assert guard.spike({"loss": 100.0 if i == 0 else 1.0 + i / 10, "grad_norm": 1.0}) is None  # too few to tell
    assert guard.spike({"loss": 60.0, "grad_norm": 1.0}) is None  # within, of numbers that far apart
    guard = StepGuard(GuardConfig(spike="skip", window=8, sigmas=4))
    for i in range(8):
        guard.spike({"loss": 1.0 + i / 10, "grad_norm": 1.0 + i / 10})
    assert guard.spike({"loss": 2.5, "grad_norm": 1.0}).startswith("loss 2.5, 1.35 ± 0.23 in the 8 steps before")
    assert guard.spike({"loss": 1.0, "grad_norm": 2.5}).startswith("grad_norm 2.5")
    assert guard.spike({"loss": 0.0, "grad_norm": 0.0}) is None  # below is no spike


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"sigmas": 0.0}, "sigmas must be"), ({"window": 1}, "window must be"), ({"most_skipped": 0}, "most_skipped")],
)
def test_bad_guards_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**changed)
