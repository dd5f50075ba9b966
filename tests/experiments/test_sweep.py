"""`cs336 sweep`: which configuration is best, which keys matter, and the page that says so."""

import json
import math
import re

import pytest
from experiments.tiny_study import base, pretend, study

from cs336.cli import main
from cs336.cli.program import TREE
from cs336.experiments import run_study
from cs336.experiments.space import Range
from cs336.experiments.study import Here, Local
from cs336.experiments.summary import Group, groups, save, sensitivities
from cs336.report import write_study_report
from cs336.report.coordinates import Coordinate
from cs336.training import TrainConfig
from cs336.utils import config as configs


def group(score, **options):
    return Group({key.replace("_", "."): value for key, value in options.items()}, 0, (), (score,))


def test_what_matters():
    """A parabola in log lr with its lowest place at 1e-3, a shift of 0.2 for gelu, and nothing of width."""
    lrs = [10 ** (-5 + 0.25 * i) for i in range(17)]
    found = [
        group((math.log10(lr) + 3) ** 2 + 0.2 * (kind == "gelu"), a_lr=lr, b_kind=kind, width=width)
        for lr in lrs
        for kind in ("swiglu", "gelu")
        for width in (1, 2)
    ]
    axes = {"a.lr": Range(1e-5, 1e-1, log=True), "b.kind": ("swiglu", "gelu"), "width": (1, 2)}
    lr, kind, width = sensitivities(axes, found)
    assert (lr.key, kind.key, width.key) == ("a.lr", "b.kind", "width")
    variance = lambda values: sum((v - sum(values) / len(values)) ** 2 for v in values) / len(values)  # noqa: E731
    of_lr, of_kind = variance([(math.log10(v) + 3) ** 2 for v in lrs]), 0.1**2
    assert lr.share == pytest.approx(of_lr / (of_lr + of_kind))
    assert kind.share == pytest.approx(of_kind / (of_lr + of_kind))
    assert width.share == pytest.approx(0, abs=1e-12)
    assert lr.best == pytest.approx(1e-3)
    assert lr.spread == pytest.approx(4)
    assert (kind.best, kind.spread) == ("swiglu", pytest.approx(0.2))
    assert sensitivities(axes, found[:2]) == []
    assert sensitivities(axes, [group(1.0, a_lr=1e-3, b_kind="gelu", width=1)] * 5) == []


def test_the_best_is_the_mean_over_seeds(tmp_path):
    losses = {(1e-3, 0): 1.0, (1e-3, 1): 9.0, (2e-3, 0): 4.0, (2e-3, 1): 4.1}
    of = study(tmp_path, vary={"optimizer.lr": [1e-3, 2e-3, 3e-3]}, seeds=2)

    def loss(config):
        if config.optimizer.lr == 3e-3:
            raise FloatingPointError("diverged")
        return losses[config.optimizer.lr, config.seed]

    entries = run_study(of, train=pretend(loss))
    best, second, failed = groups(entries, "val/loss")
    assert (best.options, best.mean) == ({"optimizer.lr": 2e-3}, pytest.approx(4.05))
    assert (second.mean, failed.mean) == (5.0, math.inf)
    kept = TrainConfig.from_toml(save(of, entries))
    assert (kept.optimizer.lr, kept.seed) == (2e-3, 0)
    assert kept.run_dir == of.directory / "best"
    page = write_study_report(of.directory).read_text()
    assert "lr 0.002, with a val/loss of 4.0500" in page
    assert "FloatingPointError: diverged" in page
    assert page.count('class="line faint"') + page.count('class="line second"') == 2


def test_of_rungs_the_highest_counts(tmp_path):
    search = {"kind": "halving", "rungs": 2, "eta": 2}
    of = study(tmp_path, vary={"optimizer.lr": [1e-3, 2e-3, 3e-3]}, search=search)
    short = {1e-3: 1.0, 2e-3: 2.0, 3e-3: 3.0}
    long = {1e-3: 5.0, 2e-3: 4.0}
    entries = run_study(of, train=pretend(lambda c: (short if c.budget == "2steps" else long)[c.optimizer.lr]))
    assert [(g.rung, g.mean) for g in groups(entries, "val/loss")] == [(1, 4), (1, 5), (0, 1), (0, 2), (0, 3)]
    assert TrainConfig.from_toml(save(of, entries)).optimizer.lr == 2e-3
    assert TrainConfig.from_toml(save(of, entries)).budget == "4steps"
    page = write_study_report(of.directory).read_text()
    assert "after the first rung" in page


def test_the_verb(tmp_path, capsys):
    table = {"directory": str(tmp_path / "s"), "base": base(tmp_path, budget="2steps"), "where": {"kind": "here"}}
    table["vary"] = {"model.d_model": [16, 32], "model.num_layers": [1, 2]}
    (tmp_path / "study.toml").write_text(configs.dumps(table))
    assert main(["sweep", str(tmp_path / "study.toml")]) == 0
    said = capsys.readouterr().out
    assert "4/4" in said
    best = TrainConfig.from_toml(tmp_path / "s" / "best.toml")
    summary = json.loads((tmp_path / "s" / "study.json").read_text())
    assert summary["groups"][0]["options"] == {
        "model.d_model": best.model.d_model,
        "model.num_layers": best.model.num_layers,
    }
    page = (tmp_path / "s" / "report.html").read_text()
    assert not re.search(r"<script|https?://", page)
    for head in ("Every configuration", "What matters", "The best, as they learned"):
        assert head in page
    assert main(["sweep", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_the_verb_says_where_in_place_of_the_study(tmp_path, monkeypatch):
    """Several runs at once on one GPU, for a study that was written for one after the other."""
    (tmp_path / "study.toml").write_text(
        configs.dumps({"directory": str(tmp_path / "s"), "base": base(tmp_path), "where": {"kind": "here"}})
    )
    (tmp_path / "s").mkdir()
    asked = []
    monkeypatch.setattr("cs336.experiments.run_study", lambda of, retry: asked.append(of.where) or [])
    for options in ([], ["--workers", "8", "--gpus", "0"], ["--gpus", "0", "1"]):
        assert main(["sweep", str(tmp_path / "study.toml"), *options]) == 0
    assert asked == [Here(), Local(workers=8, gpus=(0,)), Local(gpus=(0, 1))]


def test_the_verb_leaves_the_rest_of_where_as_it_is(tmp_path, monkeypatch, capsys):
    """Eight workers on the GPUs that the study names, not all on the first."""
    where = {"kind": "local", "workers": 4, "gpus": [2, 3], "threads": 1}
    (tmp_path / "study.toml").write_text(
        configs.dumps({"directory": str(tmp_path / "s"), "base": base(tmp_path), "where": where})
    )
    (tmp_path / "s").mkdir()
    asked = []
    monkeypatch.setattr("cs336.experiments.run_study", lambda of, retry: asked.append(of.where) or [])
    for options in (["--workers", "8"], ["--gpus", "0"]):
        assert main(["sweep", str(tmp_path / "study.toml"), *options]) == 0
    assert asked == [Local(workers=8, gpus=(2, 3), threads=1), Local(workers=4, gpus=(0,), threads=1)]
    assert main(["sweep", str(tmp_path / "study.toml"), "--workers", "0"]) == 2
    assert "workers and threads must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sweep", "ablate", "batch-size"])
def test_help_of_each_study_verb(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert TREE[verb].__doc__.split("\n")[0] in " ".join(capsys.readouterr().out.split())


def test_coordinates():
    assert Coordinate("x", [1, 10, 100], log=True).places() == [0, 0.5, 1]
    assert Coordinate("x", [1, 10, 100]).places() == [0, 9 / 99, 1]
    assert Coordinate("x", ["b", "a"], names=["a", "b"]).places() == [0.75, 0.25]
    assert Coordinate("x", [3, 3]).places() == [0.5, 0.5]
