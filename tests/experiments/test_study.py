"""What a study asks for."""

import math

import pytest
from experiments.tiny_study import base, pretend, study, write_data

from cs336.experiments import Cost, Study, run_study, space
from cs336.experiments.space import Range
from cs336.experiments.study import identity, scaled
from cs336.training import TrainConfig

LR = {"optimizer.lr": [1e-3, 1e-2]}


def test_a_grid_is_every_combination_a_seed(tmp_path):
    trials = study(tmp_path, vary=LR | {"model.num_layers": [1, 2]}, seeds=2).trials()
    found = [(t.table["optimizer"]["lr"], t.table["model"]["num_layers"], t.table["seed"]) for t in trials]
    assert found == [(lr, n, seed) for lr in (1e-3, 1e-2) for n in (1, 2) for seed in (0, 1)]
    assert len({t.id for t in trials}) == 8
    chosen = study(tmp_path, vary=LR, seeds=[7, 3]).trials()
    assert [t.table["seed"] for t in chosen] == [7, 3, 7, 3]


def test_a_run_is_what_its_configuration_says(tmp_path, monkeypatch):
    """Not how its paths are spelled, what computes it, or where it stands in the study."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = study(tmp_path, vary=LR).trials()
    relative = base(tmp_path) | {"data": {"train": "train", "val": "val"}, "micro_batch_size": 1, "log_interval": 3}
    again = study(tmp_path, changes=relative, vary={"optimizer.lr": [1e-2, 5e-3, 1e-3]}).trials()
    assert (again[0].id, again[2].id) == (plain[1].id, plain[0].id)
    assert again[1].id not in {t.id for t in plain}
    for change in ({"budget": "5steps"}, {"batch_size": 4}, {"seed": 1}, {"data": {"train": "val", "val": "val"}}):
        assert not {t.id for t in study(tmp_path, changes=base(tmp_path) | change, vary=LR).trials()} & {
            t.id for t in plain
        }


def test_random_points_keep_the_first_ones(tmp_path):
    vary = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": [1, 2, 4]}
    few, many = (
        study(tmp_path, vary=vary, search={"kind": "random", "trials": n, "seed": 5}).trials() for n in (3, 40)
    )
    assert [t.id for t in few] == [t.id for t in many[:3]]
    rates = [t.table["optimizer"]["lr"] for t in many]
    assert all(1e-4 <= lr <= 1e-1 for lr in rates)
    assert {t.table["batch_size"] for t in many} == {1, 2, 4}
    below = sum(lr < 10**-2.5 for lr in rates)  # the middle of the logarithms
    assert 10 <= below <= 30
    other = study(tmp_path, vary=vary, search={"kind": "random", "trials": 3, "seed": 6}).trials()
    assert not {t.id for t in other} & {t.id for t in few}


def test_ranges():
    assert Range(1, 3).at(0.5) == 2
    assert Range(1, 100, log=True).at(0.5) == pytest.approx(10)
    whole = [Range(1, 3, integer=True).at(p) for p in (0, 0.32, 0.34, 0.65, 0.67, 0.999, 1.0)]
    assert whole == [1, 1, 2, 2, 3, 3, 3]
    for bad in ({"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"low": 0, "high": math.inf}):
        with pytest.raises(ValueError, match="range"):
            Range(**bad)


def test_options_go_into_tables():
    table = {"model": {"d_model": 1, "mixer": {"kind": "attention", "num_heads": 2}}, "layers": [{"a": 1}, {"a": 2}]}
    put = lambda **options: space.apply(table, options)  # noqa: E731
    assert put(model={"d_model": 3})["model"] == {"d_model": 3, "mixer": {"kind": "attention", "num_heads": 2}}
    assert put(**{"model.mixer": {"kind": "hyena"}})["model"]["mixer"] == {"kind": "hyena"}
    assert put(**{"model.mixer": {"num_heads": 4}})["model"]["mixer"] == {"kind": "attention", "num_heads": 4}
    assert put(**{"model.mixer.kind": "hyena"})["model"]["mixer"] == {"kind": "hyena"}
    assert put(**{"model.mixer.kind": "attention"}) == table
    assert put(**{"layers.1.a": 5})["layers"] == [{"a": 1}, {"a": 5}]
    assert put(**{"optimizer.lr": 1})["optimizer"] == {"lr": 1}
    assert table["model"]["d_model"] == 1
    with pytest.raises(ValueError, match=r"layers.2.a: expected a place in a list of 2, got '2'"):
        put(**{"layers.2.a": 5})
    with pytest.raises(ValueError, match="no table above 'b'"):
        put(**{"model.d_model.b": 5})


def test_keys_that_go_together(tmp_path):
    sizes = [{"d_model": 16}, {"d_model": 32, "num_layers": 2}]
    trials = study(tmp_path, vary={"model": sizes}).trials()
    assert [(t.table["model"]["d_model"], t.table["model"]["num_layers"]) for t in trials] == [(16, 1), (32, 2)]


def test_another_optimizer_begins_from_its_own_defaults(tmp_path):
    adamw, sgd = study(
        tmp_path, changes={"optimizer": {"betas": [0.8, 0.9]}}, vary={"optimizer.kind": ["adamw", "sgd"]}
    ).trials()
    assert adamw.table["optimizer"]["betas"] == [0.8, 0.9]
    assert sgd.table["optimizer"]["kind"] == "sgd"
    assert "betas" not in sgd.table["optimizer"]


def test_what_a_run_takes(tmp_path):
    (steps,) = study(tmp_path).trials()
    assert (steps.planned.tokens, steps.planned.seconds) == (4 * 2 * 8, None)
    flops = TrainConfig.from_table(base(tmp_path) | {"run_dir": "x"}).model.flops_per_token()
    assert steps.planned.flops == 64 * flops
    (seconds,) = study(tmp_path, changes={"budget": "2m"}).trials()
    assert seconds.planned == Cost(seconds=120)
    assert [scaled(b, 1 / 3) for b in ("9steps", "1steps", "90s", "3e15flops")] == [
        "3steps", "1steps", "30s", "1e+15flops",
    ]  # fmt: skip


class Ended:
    ended = True

    def __init__(self, id, score):
        self.id, self._score = id, score

    def score(self, metric):
        assert metric == "val/loss"
        return self._score


def test_halving_lets_the_best_go_on(tmp_path):
    lrs = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    found = study(
        tmp_path,
        changes={"budget": "9steps"},
        vary={"optimizer.lr": lrs},
        search={"kind": "halving", "rungs": 3, "eta": 3},
        seeds=2,
    )
    first = found.trials()
    assert {t.table["budget"] for t in first} == {"1steps"}
    assert len(first) == 10
    # Means over seeds: 4e-3 has the best single run, and one that failed.
    scores = dict(zip([t.id for t in first], [5, 5, 4, 4, 3, 3.5, 1, math.inf, 3.2, 3.2], strict=True))
    assert len(found.trials([Ended(id, s) for id, s in list(scores.items())[:-1]])) == 10
    two = found.trials([Ended(*item) for item in scores.items()])
    second = two[10:]
    assert [t.options["optimizer.lr"] for t in second] == [5e-3, 5e-3, 3e-3, 3e-3]  # ceil(5 / 3)
    assert {t.table["budget"] for t in second} == {"3steps"}
    assert {t.planned.tokens for t in second} == {2 * 16}  # what is added
    of = {(t.options["optimizer.lr"], t.seed): t.folder for t in first}
    assert [t.folder for t in second] == [of[t.options["optimizer.lr"], t.seed] for t in second]
    assert {t.rung for t in second} == {1}
    scores |= {t.id: s for t, s in zip(second, (2, 2, 1, 1), strict=True)}
    third = found.trials([Ended(*item) for item in scores.items()])[14:]
    assert [t.options["optimizer.lr"] for t in third] == [3e-3, 3e-3]
    assert {t.table["budget"] for t in third} == {"9steps"}
    everything = [Ended(*i) for i in scores.items()] + [Ended(t.id, 1) for t in third]
    assert len(found.trials(everything)) == 16
    nothing = [Ended(t.id, math.inf) for t in first]
    assert len(found.trials(nothing)) == 10


BAD = [
    ({"vary": {"optimizer.lrr": [1]}}, r"optimizer.lrr 1.*|did you mean optimizer.lr"),
    ({"vary": {"optimizer.lr": []}}, "vary.optimizer.lr must be a list of values"),
    ({"vary": {"optimizer.lr": 3}}, "vary.optimizer.lr must be a list of values"),
    ({"vary": {"optimizer.lr": {"low": 3, "high": 1}}}, "vary.optimizer.lr: a range goes from low up to high"),
    ({"vary": {"optimizer.lr": {"low": 1, "high": 3}}}, "is a range: list its values for a grid"),
    ({"vary": {"model.num_heads": [2, 3]}}, "the run with num_heads 3: .*multiple of num_heads"),
    ({"budget": "10steps"}, "budget must be of flops, tokens or seconds"),
    ({"budget": "10"}, "not understood"),
    ({"seeds": 0}, "seeds must be at least 1"),
    ({"seeds": [1, 1]}, "seeds must be different"),
    ({"seeds": "many"}, "seeds"),
    ({"search": {"kind": "gird"}}, "did you mean 'grid'"),
    ({"search": {"kind": "random"}}, "missing: search.trials"),
    ({"search": {"kind": "halving", "eta": 1}}, "eta 2"),
    ({"where": {"kind": "local", "workers": 0}}, "at least 1"),
    ({"bugdet": "1h"}, "did you mean budget"),
    ({"base": {"budget": "3steps"}}, "missing: data, model"),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[m for _, m in BAD])
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, **keys)


def test_a_metric_that_no_run_has_is_named_after_the_first(tmp_path):
    """What was trained is kept, for a metric that there is; a number that is not finite is one."""
    trained = []

    def loss(config):
        trained.append(config.optimizer.lr)
        return math.nan

    with pytest.raises(ValueError, match=r"metric val/los: no run that has ended has it; name one of val/loss$"):
        run_study(study(tmp_path, vary=LR, metric="val/los"), train=pretend(loss))
    assert trained == [1e-3]
    assert len(run_study(study(tmp_path, vary=LR), train=pretend(loss))) == 2
    assert trained == [1e-3, 1e-2]


def test_a_metric_of_validation_needs_its_data(tmp_path):
    with pytest.raises(ValueError, match=r"metric val/loss needs base.data.val"):
        study(tmp_path, changes={"data": {"train": "x"}})
    assert study(tmp_path, changes={"data": {"train": "x"}}, metric="train/loss").trials()


def test_a_file_may_name_its_base(tmp_path):
    write_data(tmp_path)
    config = TrainConfig.from_table(base(tmp_path) | {"run_dir": "anywhere"})
    config.save(tmp_path / "small.toml")
    (tmp_path / "lr.toml").write_text('base = "small.toml"\n[vary]\n"optimizer.lr" = [1e-3]\n')
    loaded = Study.load(tmp_path / "lr.toml")
    assert str(loaded.directory) == "runs/lr"
    (trial,) = loaded.trials()
    assert trial.table["optimizer"]["lr"] == 1e-3
    assert "run_dir" not in trial.table
    (tmp_path / "bad.toml").write_text('base = "small.toml"\nseed = 3\n')
    with pytest.raises(ValueError, match=r"bad.toml: unknown key seed; did you mean seeds"):
        Study.load(tmp_path / "bad.toml")
    assert identity(config) == identity(TrainConfig.from_table(base(tmp_path) | {"run_dir": "elsewhere"}))
