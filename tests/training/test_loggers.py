import sys
import types

import pytest
import tiny_run

from cs336.training import Trainer
from cs336.training.loggers import open_loggers


def scalars(run_dir):
    """name -> [(step, value)], from the event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_run.train(tiny_run.config(tmp_path, loggers=("tensorboard",)))
    found = scalars(tmp_path / "run")
    for name in ("train/loss", "train/grad_norm", "lr", "val/loss"):
        rows = [(r["step"], r[name]) for r in tiny_run.rows(tmp_path / "run", of=name)]
        assert [step for step, _ in found[name]] == [step for step, _ in rows]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in rows])
    assert not {"step", "tokens", "seconds"} & found.keys()


def test_tensorboard_goes_on_with_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    logger = open_loggers(("tensorboard",), tmp_path / "run", {}, 0)[0]
    for step in range(1, 8):  # a process that was killed after step 7, whose checkpoint is of step 4
        logger.log({"step": step, "train/loss": 100.0 + step})
    logger.close()
    again = open_loggers(("tensorboard",), tmp_path / "run", {}, 4)[0]
    for step in range(5, 9):
        again.log({"step": step, "train/loss": float(step)})
    again.close()
    values = dict(scalars(tmp_path / "run")["train/loss"])
    assert values == {**{s: 100.0 + s for s in range(1, 5)}, **{s: float(s) for s in range(5, 9)}}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_rows(tmp_path, monkeypatch, name):
    calls = []
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **kwargs: calls.append(("init", kwargs))
    module.log = lambda row, step: calls.append(("log", step, row))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    tiny = tiny_run.config(tmp_path, loggers=(name,), budget="4steps")
    tiny_run.train(tiny)
    assert calls[0][0] == "init"
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["resume"] == "allow"
    assert calls[0][1]["config"]["budget"] == "4steps"
    logged = [(step, row["train/loss"]) for kind, step, row in calls[1:-1] if kind == "log" and "train/loss" in row]
    assert logged == [(r["step"], r["train/loss"]) for r in tiny_run.rows(tmp_path / "run", of="train/loss")]
    assert calls[-1] == ("finish",)


def test_a_package_that_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="loggers names wandb, which is not installed: pip install wandb"):
        Trainer(tiny_run.config(tmp_path, loggers=("wandb",)), display=tiny_run.quiet())
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_named(tmp_path):
    from cs336.training import TrainConfig
    from cs336.utils.config import to_table

    table = to_table(tiny_run.config(tmp_path)) | {"loggers": ["tensorbord"]}
    with pytest.raises(ValueError, match=r"loggers\.0 must be 'tensorboard' or .*got 'tensorbord'"):
        TrainConfig.from_table(table)
