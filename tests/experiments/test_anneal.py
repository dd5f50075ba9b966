"""Branches off a trunk are the runs that they replace, at less cost."""

import pytest
import tiny_study
import torch
from safetensors.torch import load_file

from cs336.experiments import Ledger, run_study
from cs336.experiments.study import Cost
from cs336.experiments.train import reached
from cs336.scaling import read_points
from cs336.training import TrainConfig, Trainer

SCHEDULE = {"kind": "wsd", "warmup_steps": 2, "decay_part": 0.5, "min_lr_ratio": 0.0}
RUNS = [{"budget": f"{steps}steps", "optimizer.lr": 0.01} for steps in (12, 8)]


def annealed(root, runs=RUNS, **changes):
    search = {"kind": "anneal", "runs": runs}
    return tiny_study.study(root, changes={"schedule": SCHEDULE, "checkpoint_interval": 0} | changes, search=search)


def test_a_branch_is_the_run_that_it_replaces_bit_for_bit(tmp_path):
    study = annealed(tmp_path)
    entries = run_study(study)
    assert [entry.state for entry in entries] == ["done"] * 4
    leaves = {e.config["budget"]: e for e in entries if "branch_from" in e.config}
    assert leaves.keys() == {"8steps", "12steps"}
    for budget, entry in leaves.items():
        alone = dict(entry.config) | {"run_dir": str(tmp_path / budget)}
        del alone["branch_from"]
        done = Trainer(TrainConfig.from_table(alone)).train()
        branch = load_file(study.runs / entry.folder / "export" / "model.safetensors")
        whole = load_file(done.export / "model.safetensors")
        assert branch.keys() == whole.keys()
        assert all(torch.equal(branch[name], whole[name]) for name in whole)
        assert entry.result["val/loss"] == done.val["val/loss"]
        assert reached(study.runs / entry.folder).tokens == int(budget.removesuffix("steps")) / 2 * 16
    assert {e.config["budget"]: e.spent.tokens for e in entries if "trunk" in e.options} == {"4steps": 64, "6steps": 32}
    assert sorted(read_points(study.directory).tokens) == [8 * 16, 12 * 16]  # of whole runs, without trunks
    again = Trainer(TrainConfig.from_table(leaves["12steps"].config | {"run_dir": str(tmp_path / "again")}))
    assert (again.step, again.seconds) == (6, 0.0)
    spent = sum(entry.spent.tokens for entry in entries)
    assert spent == sum(entry.planned.tokens for entry in entries) == 16 * (6 + 4 + 6)  # not 8 + 12


def test_a_budget_may_be_written_in_any_way(tmp_path):
    runs = [run | {"budget": budget} for run, budget in zip(RUNS, ("0.012ksteps", "8.5steps"), strict=True)]
    (first,) = annealed(tmp_path, runs).trials()
    assert first.options == {"budget": "8.5steps", "optimizer.lr": 0.01, "trunk": "4steps"}


def test_a_branch_is_wanted_once_its_part_of_the_trunk_is_done(tmp_path):
    study = annealed(tmp_path)
    first = study.trials()
    assert [trial.options["trunk"] for trial in first] == ["4steps"]

    def train(config):
        if config.schedule.kind == "wsd":
            assert config.branch_from.parent.parent.name in {trial.folder for trial in first}
        elif config.budget == "6steps":
            raise RuntimeError("no more")
        return tiny_study.pretend(lambda c: 1.0)(config)

    entries = run_study(study, train=train)
    assert [(e.config["budget"], e.state) for e in entries] == [
        ("4steps", "done"),
        ("8steps", "done"),
        ("6steps", "failed"),
    ]
    assert Ledger(study.directory).entries()[0].planned == Cost(4 * 16 * study.trials()[0].planned.flops / 64, 64)


@pytest.mark.parametrize(
    ("changes", "runs", "message"),
    [
        ({"schedule": {"kind": "cosine"}}, RUNS, 'under schedule = {kind = "wsd", warmup_steps = N}'),
        ({"schedule": SCHEDULE | {"warmup_steps": 4}}, RUNS, "be more than the 4 of warm-up"),
        ({}, [*RUNS, {"budget": "2ktok", "optimizer.lr": 0.01}], "have budgets of steps, got 2ktok"),
        ({}, [], "at least one run"),
    ],
)
def test_what_shares_no_trunk_is_refused(tmp_path, changes, runs, message):
    with pytest.raises(ValueError, match=message):
        annealed(tmp_path, runs, **changes)


def test_a_run_has_one_beginning(tmp_path):
    table = tiny_study.base(tmp_path, init_from="a", branch_from="b", run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="init_from and branch_from are two beginnings"):
        TrainConfig.from_table(table)
    missing = TrainConfig.from_table(tiny_study.base(tmp_path, branch_from="b", run_dir=str(tmp_path / "run")))
    with pytest.raises(FileNotFoundError, match="b"):
        Trainer(missing)
    assert not (tmp_path / "run" / "config.toml").exists()
