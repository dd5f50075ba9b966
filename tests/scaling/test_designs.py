"""Designs ask for models that can be built, at the FLOPs that were asked for, and a study trains them."""

import json
import math

import numpy as np
import pytest

from cs336.cli import main
from cs336.data import ShardWriter
from cs336.experiments import Ledger, Study
from cs336.models import Transformer
from cs336.scaling import EPOCH, Counting, read_points, step_law
from cs336.scaling.designs import Family, accounts, anneal, best, isoflop, ladder, study
from cs336.scaling.forecast import read
from cs336.utils import config as configs

FAMILY = Family(1024)


def test_models_have_whole_heads_and_round_widths():
    for heads in (1, 2, 5, 13):
        model = FAMILY.shape(heads)
        assert (model.d_model, model.num_heads, model.head_size) == (16 * heads, heads, 16)
        assert model.ff_size % 16 == 0
        assert abs(model.ff_size - 8 * model.d_model / 3) <= 8
        assert model.num_layers == max(2, round(model.d_model / 24))
        counted = sum(p.numel() for p in Transformer(model, device="meta").parameters())
        assert counted == model.num_parameters()


def test_the_width_alone_grows_where_layers_are_said():
    family = Family(1024, num_layers=3)
    assert {family.shape(heads).num_layers for heads in (1, 4, 20)} == {3}
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        Family(1024, num_layers=0)


def test_the_nearest_model_is_nearest_by_its_logarithm():
    sizes = [FAMILY.shape(heads).num_parameters() for heads in range(1, 40)]
    for wanted in (1e3, sizes[3], math.sqrt(sizes[5] * sizes[6]) * 1.001, 3e4, 7.3e4, 2e5, 9e5, 1e7):
        found = FAMILY.nearest(wanted).num_parameters()
        assert abs(math.log(found / wanted)) == min(abs(math.log(size / wanted)) for size in sizes)


def test_isoflop_runs_cost_their_budget_within_half_a_step():
    budgets = (1e11, 1e12)
    runs = isoflop(FAMILY, budgets, sizes=5, span=4)
    assert {run.wanted for run in runs} == set(budgets)
    for run in runs:
        step = run.batch_size * run.model.context_length * run.model.flops_per_token()
        assert run.flops == run.steps * step
        assert abs(run.flops - run.wanted) <= step / 2
        assert run.residual == pytest.approx(run.flops / run.wanted - 1)
    large = [run.parameters for run in runs if run.wanted == 1e12]
    middle = math.sqrt(1e12 / 120)
    assert len(set(large)) == len(large) >= 4
    assert min(large) < middle / 2
    assert max(large) > 2 * middle
    assert accounts(runs).saved == 0


def test_a_valley_has_three_sizes_though_models_are_coarse():
    narrow = isoflop(FAMILY, (1e12,), sizes=4, span=1 + 1e-9)
    assert len({run.model for run in narrow}) >= 3


def test_a_ladder_has_every_size_at_every_ratio():
    runs = ladder(FAMILY, (5e4, 2e5), (5, 20))
    assert len(runs) == 4
    for run, ratio in zip(runs, (5, 20, 5, 20), strict=True):
        assert run.tokens / run.parameters == pytest.approx(ratio, rel=0.01)


def test_rate_and_batch_follow_the_step_law():
    family = Family(1024, lr_factor=0.1, batch_factor=2)
    (run,) = ladder(family, (2e5,), (20,))
    lr, batch = step_law(run.model.num_parameters(embeddings=False), 20 * run.parameters)
    assert run.lr == pytest.approx(0.1 * lr, rel=0.01)
    assert run.batch_size == 8 * round(2 * batch / 128 / 8)
    assert ladder(Family(1024, highest_lr=1e-3), (2e5,), (20,))[0].lr == 1e-3


def test_trunks_save_what_the_branches_share():
    runs = anneal(FAMILY, (5e4,), (10, 20, 40), decay_part=0.2)
    steps = [run.steps for run in runs]
    assert [run.begins for run in runs] == [math.floor(0.8 * count) for count in steps]
    assert len({(run.batch_size, run.lr, run.schedule) for run in runs}) == 1
    found = accounts(runs)
    per_step = runs[0].flops // steps[0]
    assert found.separately == per_step * sum(steps)
    assert found.flops == per_step * (runs[-1].begins + sum(run.steps - run.begins for run in runs))
    assert found.saved == pytest.approx(1 - (0.8 * 40 + 0.2 * 70) / 70, abs=0.01)


def test_the_best_run_is_the_best_of_its_budget():
    run = best(FAMILY, 1e13, EPOCH)
    assert run.flops == pytest.approx(1e13, rel=0.01)
    for heads in range(1, 30):
        model = FAMILY.shape(heads)
        tokens = 1e13 / model.flops_per_token()
        assert EPOCH.loss(run.parameters, run.tokens) <= EPOCH.loss(model.num_parameters(), tokens) * 1.0005


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: isoflop(FAMILY, ()), "budgets must be at least one number"),
        (lambda: isoflop(FAMILY, (1e12, 1e12)), "budgets must differ"),
        (lambda: isoflop(FAMILY, (math.nan,)), "budgets must be positive and finite"),
        (lambda: isoflop(FAMILY, (1e12,), sizes=2), "at least 3 sizes"),
        (lambda: isoflop(FAMILY, (1e6,)), "less than a step"),
        (lambda: ladder(FAMILY, (1e5,), (1e-6,)), "less than a step"),
        (lambda: anneal(FAMILY, (1e5,), (10,), decay_part=1.0), "decay_part must be between 0 and 1"),
        (lambda: best(FAMILY, 10.0, EPOCH), "less than a step of a model"),
        (lambda: best(FAMILY, 1e300, EPOCH), "num_layers must be at most"),
        (lambda: isoflop(FAMILY, (1e300,)), "num_layers must be at most"),
        (lambda: Family(1024, head_dim=0), "head_dim must be at least 1"),
        (lambda: Family(1024, lr_factor=0), "lr_factor must be positive"),
        (lambda: study([], {}), "at least one run"),
    ],
)
def test_what_is_no_design_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture
def tokens(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 20_000), ("val", 2_000)):
        with ShardWriter(tmp_path / "tokens" / name, vocab_size=60, tokenizer="t", eot_id=0) as writer:
            writer.write(np.cumsum(rng.integers(0, 3, count)) % 60, documents=1, text_bytes=2 * count)
    return tmp_path / "tokens"


def test_from_a_design_to_a_graded_forecast(tokens, tmp_path, capsys):
    """The whole chain of verbs; its losses mean nothing."""
    (tmp_path / "base.toml").write_text('device = "cpu"\ncheckpoint_interval = 0\neval_tokens = 320\n')
    shape = ["--context-length", "16", "--head-dim", "4", "--d-ff-multiple", "4", "--data", str(tokens)]
    shape += ["--base", str(tmp_path / "base.toml"), "--lr-factor", "0.3"]
    small, large = tmp_path / "small.toml", tmp_path / "large.toml"

    def here(path, name):
        table = configs.read_table(path) | {"directory": str(tmp_path / name), "where": {"kind": "here"}}
        path.write_text(configs.dumps(table))

    make = ["scaling", "design", "ladder", "--sizes", "700", "4500", "--ratios", "0.3", "1", *shape]
    assert main([*make, "--write", str(small)]) == 0
    here(small, "small")
    assert main(["sweep", str(small)]) == 0
    points = read_points(tmp_path / "small")
    planned = [trial.planned for trial in Study.load(small).trials()]
    assert sorted(points.tokens) == sorted(cost.tokens for cost in planned)
    assert sorted(points.flops) == sorted(cost.flops for cost in planned)
    assert set(points.parameters) == {708, 4300}
    inner = read_points(tmp_path / "small", Counting(embeddings=False, flops="6nd"))
    assert set(inner.parameters) == {708 - 64 * 4, 4300 - 64 * 12}  # the one table of tied embeddings
    assert inner.flops.tolist() == (6 * inner.parameters * inner.tokens).tolist()
    law = tmp_path / "law.json"
    fitted = {"E": 2.0, "A": 50.0, "B": 90.0, "alpha": 0.4, "beta": 0.4, "residuals": [0.01, -0.01]}
    law.write_text(json.dumps(fitted | {"resampled": [[2.0, 50.0, 90.0, 0.4, 0.4]]}))
    big = ["scaling", "design", "best", "--budgets", "1e8", "--law", str(law), *shape, "--write", str(large)]
    assert main([*big, "--seeds", "2"]) == 0
    here(large, "large")
    log = ["--log", str(tmp_path / "log.jsonl")]
    assert main(["scaling", "forecast", str(law), "--name", "large", "--study", str(large), *log]) == 0
    assert main(["scaling", "grade", "large", "--study", str(tmp_path), *log]) == 2
    assert "holds no study" in capsys.readouterr().err
    assert main(["sweep", str(large)]) == 0
    assert main(["scaling", "grade", "large", "--study", str(tmp_path / "large"), *log]) == 0
    entry, other = Ledger(tmp_path / "large").entries()
    (made,) = read(tmp_path / "log.jsonl")
    assert made.measured == pytest.approx((entry.result["val/loss"] + other.result["val/loss"]) / 2)
    assert entry.result["val/loss"] != other.result["val/loss"]
    assert (made.parameters, made.tokens, made.flops) == (entry.result["parameters"], entry.spent.tokens, None)
    compute = {
        "law": "compute",
        "E": 2.0,
        "A": 90.0,
        "gamma": 0.2,
        "resampled": [[2.0, 90.0, 0.2]],
        "residuals": [0.01],
    }
    law.write_text(json.dumps(compute | {"counting": {"embeddings": False, "flops": "6nd"}}))
    assert main(["scaling", "forecast", str(law), "--name", "counted", "--study", str(large), *log]) == 0
    counted = read(tmp_path / "log.jsonl")[1]
    assert counted.parameters < made.parameters
    assert counted.flops == 6 * counted.parameters * counted.tokens
    assert main(["scaling", "grade", "counted", "--study", str(tmp_path / "small"), *log]) == 2
    assert "small has 4 runs: a forecast is of one" in capsys.readouterr().err
    rates = configs.read_table(large) | {"directory": str(tmp_path / "rates")}
    (run,) = rates["search"]["runs"]
    rates["search"]["runs"] = [run, run | {"optimizer.lr": 1e-5}]
    rates["seeds"] = 1
    (tmp_path / "rates.toml").write_text(configs.dumps(rates))
    asked = ["--name", "rates", "--study", str(tmp_path / "rates.toml"), *log]
    assert main(["scaling", "forecast", str(law), *asked]) == 2
    assert "rates.toml has 2 runs: a forecast is of one" in capsys.readouterr().err


def test_the_verb_writes_a_study_of_trunks(tokens, tmp_path, capsys):
    make = ["scaling", "design", "wsd", "--sizes", "5e4", "--ratios", "10", "20", "--data", str(tokens)]
    assert main([*make, "--write", str(tmp_path / "trunks.toml"), "--directory", str(tmp_path / "trunks")]) == 0
    assert "fewer than" in capsys.readouterr().out
    loaded = Study.load(tmp_path / "trunks.toml")
    assert loaded.search.kind == "anneal"
    assert loaded.base["model"]["vocab_size"] == 64
    (trunk,) = loaded.trials()
    runs = anneal(Family(64), (5e4,), (10, 20))
    assert trunk.options["trunk"] == f"{runs[0].begins}steps"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["isoflop"], "say --vocab-size, or --data"),
        (["isoflop", "--vocab-size", "64"], "isoflop takes --budgets, and no --sizes or --ratios"),
        (["wsd", "--vocab-size", "64", "--sizes", "1e5"], "wsd takes --sizes and --ratios, and no --budgets"),
        (["best", "--vocab-size", "64", "--budgets", "1e12", "--write", "x.toml"], "a study needs --data"),
        (["ladder", "--data", "nowhere", "--sizes", "1e5", "--ratios", "10"], "for it does not exist"),
    ],
)
def test_the_verb_refuses(arguments, message, capsys):
    assert main(["scaling", "design", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_forecast_and_grade_want_one_answer(tmp_path, capsys):
    log = ["--log", str(tmp_path / "log.jsonl")]
    for arguments, message in (
        (["forecast", "epoch", "--name", "a", "--parameters", "1e9"], "say --parameters and --tokens, or --study"),
        (["forecast", "epoch", "--name", "a"], "say --parameters and --tokens, or --study"),
        (["grade", "a"], "say the loss, or --study"),
        (["grade", "a", "2.0", "--study", "x"], "say the loss, or --study"),
    ):
        assert main(["scaling", *arguments, *log]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()
