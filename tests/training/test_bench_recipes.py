"""Recipes in equal time: the sweep's best rates run last, and nothing is trained twice."""

import dataclasses
import os
from concurrent.futures import Executor, Future

import pytest
import tiny_run

from benchmarks import report, results, training_tables
from benchmarks.end_to_end import bench_recipes
from cs336.models import TransformerConfig
from cs336.optim import MuonConfig


class Here(Executor):
    """Runs what it is given in this process, at once."""

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def here(processes):
    return Here()


@pytest.fixture
def recipes(tmp_path):
    gpt2 = tiny_run.config(tmp_path, eval_interval=None, checkpoint_interval=0)
    return {"best": dataclasses.replace(gpt2, optimizer=MuonConfig()), "gpt2": gpt2}


def test_the_recipes_are_of_one_size(tmp_path):
    tiny_run.write_data(tmp_path)
    best, gpt2 = (bench_recipes.recipe(name, tmp_path) for name in bench_recipes.RATES)
    assert gpt2.model.num_parameters() == pytest.approx(124.4e6, rel=0.001)  # GPT-2's, with its vocabulary rounded up
    assert best.model.num_parameters() == pytest.approx(gpt2.model.num_parameters(), rel=0.01)
    assert (best.batch_size, best.model.context_length) == (gpt2.batch_size, gpt2.model.context_length)
    assert isinstance(best.model, TransformerConfig)
    assert (best.optimizer.kind, gpt2.optimizer.kind) == ("muon", "adamw")


def test_the_best_rates_of_the_sweep_run_last(tmp_path, recipes, capsys, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.02)
    rates = {"best": [1e-9, 1e-2], "gpt2": [1e-2, 1e-9]}
    kept = []
    settings = {"sweep": 0.5, "seconds": 0.7, "pool": here, "gpus": 0, "keep": lambda rows: kept.append(len(rows))}
    rows = bench_recipes.compare(recipes, rates, tmp_path / "runs", beside=True, **settings)
    assert [(r["stage"], r["recipe"], r["lr"], r["share_of_gpu"], r["budget"]) for r in rows] == [
        ("sweep", "best", 1e-9, "1/4", "0.5s"),
        ("sweep", "best", 1e-2, "1/4", "0.5s"),
        ("sweep", "gpt2", 1e-2, "1/4", "0.5s"),
        ("sweep", "gpt2", 1e-9, "1/4", "0.5s"),
        ("run", "best", 1e-2, "1/2", "0.7s"),
        ("run", "gpt2", 1e-2, "1/2", "0.7s"),
    ]
    assert kept == [1, 2, 3, 4, 5, 6]  # nothing is lost by a cut
    for row in rows:
        assert row["tokens"] == row["steps"] * 4 * 8
        assert row["val_loss"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    again = bench_recipes.compare(recipes, rates, tmp_path / "runs", beside=False, **settings)
    same = ("recipe", "lr", "steps", "val_loss", "stage")
    assert [[row[key] for key in same] for row in again] == [[row[key] for key in same] for row in rows]
    assert again[-1]["share_of_gpu"] == "1/1"
    table = "\n".join(report.BODIES["recipes"](rows))
    assert "| best | " in table
    assert rows[-2]["curve"][-1][1] == rows[-2]["val_loss"]
    assert "0.01 of 1e-09, 0.01" in table


def test_one_rate_needs_no_sweep_and_no_seconds_no_run(tmp_path, recipes, monkeypatch):
    tiny_run.on_a_clock(monkeypatch, lambda trainer: 0.02)
    given = {"best": [1e-2], "gpt2": [1e-2]}
    settings = {"sweep": 0.4, "beside": True, "pool": here, "gpus": 0, "keep": len}
    assert [r["stage"] for r in bench_recipes.compare(recipes, given, tmp_path / "a", seconds=0.4, **settings)] == [
        "run",
        "run",
    ]
    both = {"best": [1e-2, 1e-3], "gpt2": [1e-2]}
    rows = bench_recipes.compare(recipes, both, tmp_path / "b", seconds=0, **settings)
    assert [row["stage"] for row in rows] == ["sweep"] * 3


def test_the_table_says_when_the_better_one_was_as_good():
    def row(name, curve):
        return {"recipe": name, "curve": curve}

    both = [row("best", [(20.0, 5.0), (40.0, 3.5), (80.0, 3.0)]), row("gpt2", [(30.0, 6.0), (79.0, 3.6)])]
    lines = list(training_tables.curves(both))
    assert lines[1].startswith("| validation loss after | 10 s | 20 s | 30 s | 40 s ")
    assert lines[3] == "| best |  | 5.000 | 5.000 | 3.500 | 3.500 | 3.500 | 3.500 | 3.000 |"
    assert lines[-1] == "best had come to gpt2's last loss after 40 s."
    assert not list(training_tables.curves([row("best", [(1.0, 2.0)]), {"recipe": "gpt2"}]))


@pytest.mark.parametrize(
    ("gpus", "beside", "shares", "places"),
    [
        (0, True, [4, 4, 4, 4], [None] * 4),
        (1, True, [4, 4, 4, 4], [None] * 4),
        (1, False, [1, 1, 1, 1], [None] * 4),
        (2, True, [2, 2, 2, 2], [0, 1, 0, 1]),
        (2, False, [1, 1, 1, 1], [0, 1, 0, 1]),
        (3, True, [2, 1, 1, 2], [0, 1, 2, 0]),
        (8, False, [1, 1, 1, 1], [0, 1, 2, 3]),
    ],
)
def test_runs_are_dealt_out_to_the_gpus(recipes, monkeypatch, gpus, beside, shares, places):
    given, pools = [], []
    monkeypatch.setattr(bench_recipes, "learn", lambda name, config, share, gpu: given.append((share, gpu)))
    monkeypatch.setattr(bench_recipes, "line", str)
    entries = [(name, config) for name, config in recipes.items()] * 2
    list(bench_recipes.race(entries, beside, gpus, lambda processes: pools.append(processes) or Here()))
    assert given == list(zip(shares, places, strict=True))
    assert sum(pools) == 4
    assert pools[0] == (4 if beside or gpus == 8 else max(gpus, 1))


def test_a_run_sees_its_gpu_alone(recipes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    config = dataclasses.replace(recipes["gpt2"], budget="1steps")
    assert bench_recipes.learn("gpt2", config, 1, 1)["share_of_gpu"] == "1/1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_runs_in_processes_of_their_own(tmp_path, recipes):
    """As `main` makes them, on two devices."""
    with bench_recipes.separate(2) as pool:
        entries = [(name, dataclasses.replace(config, budget="2steps")) for name, config in recipes.items()]
        entries = [(n, dataclasses.replace(c, device="cpu", run_dir=tmp_path / n)) for n, c in entries]
        rows = [run.result() for run in [pool.submit(bench_recipes.learn, *e, 1, i) for i, e in enumerate(entries)]]
    assert [row["steps"] for row in rows] == [2, 2]


def test_rows_are_put_in_place_when_all_are_there(tmp_path, recipes, monkeypatch):
    monkeypatch.setattr(bench_recipes, "separate", here)
    monkeypatch.setattr(bench_recipes, "recipe", lambda name, data, **settings: recipes[name])
    out = tmp_path / "out.json"
    arguments = ["--data", str(tmp_path), "--seconds", "0.4", "--rates", "best=1e-2", "gpt2=1e-2", "--out", str(out)]
    assert bench_recipes.main(arguments) == 0
    assert [row["recipe"] for row in results.read(out)["recipes"]["rows"]] == ["best", "gpt2"]
    assert not bench_recipes.partial(out).exists()


def test_bad_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_recipes, "separate", here)
    with pytest.raises(SystemExit, match=r"bench_recipes: .*nothing/train does not exist"):
        bench_recipes.main(["--data", str(tmp_path / "nothing"), "--seconds", "1", "--rates", "best=1"])
    for wrong, message in (
        (["worst=1"], "some of best, gpt2 before ="),
        (["best=1", "--seconds", "0"], "nothing is left"),
    ):
        with pytest.raises(SystemExit):
            bench_recipes.main(["--data", str(tmp_path), "--rates", *wrong])
        assert message in capsys.readouterr().err
