"""A run that was killed, whenever it was, and continued reads as one that never was. Real processes, real SIGKILL."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import tiny_run

from cs336.training import Trainer, checkpoint

CHANGES = {"micro_batch_size": 2, "log_interval": 3, "sample_interval": 2}


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cs336.training", "torch._dynamo"])  # what every optimizer imports

    def start(root, moment=None, **changes):
        process = context.Process(target=tiny_run.train_and_be_killed, args=(root, CHANGES | changes, moment))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def unbroken(processes, tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    process = processes(root)
    process.join()
    assert process.exitcode == 0
    return root / "run"


def assert_same_run(run_dir, unbroken):
    assert tiny_run.rows(run_dir) == tiny_run.rows(unbroken)  # losses as exact decimals of the same floats
    assert (run_dir / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
    for name in ("export/model.safetensors", f"checkpoints/step_00000012/{checkpoint.OPTIMIZER}"):
        assert (run_dir / name).read_bytes() == (unbroken / name).read_bytes()


def test_killed_at_every_kind_of_moment(processes, unbroken, tmp_path):
    """One run, killed again and again, then left to end."""
    killed = [
        (("after a step", 3), 0),  # no checkpoint yet: from the start
        (("between the files of a checkpoint", 4), 0),
        (("after the rename", 4), 4),
        (("in a row", 6), 4),
        (("before the rename", 8), 4),
        (("after a step", 8), 4),
        (("after a step", 11), 8),
        (("while an old one is removed", 4), 12),
    ]
    for moment, newest in killed:
        process = processes(tmp_path, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        found = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
        assert [int(p.name.removeprefix("step_")) for p in found][-1:] == ([newest] if newest else []), moment
    process = processes(tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_run_that_left_rows_and_no_checkpoint_says_that_it_begins_anew(processes, tmp_path, capsys):
    process = processes(tmp_path, ("after a step", 3), log_interval=1)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    tiny = tiny_run.config(tmp_path, **CHANGES)
    assert Trainer(tiny).train().finished
    assert f"{tmp_path}/run: 2 steps of a run that ended before its first checkpoint" in capsys.readouterr().out
    assert Trainer(tiny).train().finished
    assert "before its first" not in capsys.readouterr().out


def test_a_branch_that_left_no_checkpoint_tells_of_its_own_steps(processes, tmp_path, capsys):
    trunk = tiny_run.train(tiny_run.config(tmp_path, "trunk", budget="4steps")).checkpoint
    process = processes(tmp_path, ("after a step", 7), log_interval=1, checkpoint_interval=0, branch_from=trunk)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert tiny_run.rows(tmp_path / "run")[-1]["step"] == 6
    branch = tiny_run.config(tmp_path, **CHANGES, branch_from=trunk)
    assert Trainer(branch).train().finished
    out = capsys.readouterr().out
    assert f"{tmp_path}/run: 2 steps of a run that ended before its first checkpoint" in out
    assert "continuing after step 4" in out


def test_a_finished_model_whose_checkpoints_are_gone_is_not_written_over(processes, tmp_path):
    tiny = tiny_run.config(tmp_path, budget="4steps")
    export = tiny_run.train(tiny).export
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for changes in ({}, {"seed": 1}, {"budget": "5steps"}):
        with pytest.raises(ValueError, match=r"run holds a finished model, .*export, and no checkpoint"):
            tiny_run.train(tiny_run.changed(tiny, **changes))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "run/config.toml").unlink()
    with pytest.raises(ValueError, match=r"run holds a finished model, .*export, and no checkpoint"):
        tiny_run.train(tiny)
    shutil.rmtree(export)
    assert tiny_run.train(tiny).finished


def test_killed_at_random_from_outside(processes, unbroken, tmp_path):
    tiny_run.write_data(tmp_path)  # here: a child might be killed before it has
    delays, longest, kills = random.Random(int(os.environ.get("SEED", "0"))), 0.8, 0
    while kills < 5:
        process = processes(tmp_path)
        process.join(delays.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            continue
        assert process.exitcode == 0  # it ended before: begun anew, and killed sooner
        assert_same_run(tmp_path / "run", unbroken)
        shutil.rmtree(tmp_path / "run")
        longest /= 2
    process = processes(tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step(processes, unbroken, tmp_path, number):
    process = processes(tmp_path, budget="100000steps", checkpoint_interval=0, eval_interval=0, sample_interval=0)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 0
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert checkpoint.load_checkpoint(saved) - last["step"] in (0, 1, 2)
    assert not (tmp_path / "run/export").exists()


def test_another_process_at_the_same_run_is_refused(tmp_path):
    from cs336.utils.locks import locked

    tiny = tiny_run.config(tmp_path)
    tiny.run_dir.mkdir()
    with locked(tiny.run_dir), pytest.raises(RuntimeError, match="another process is at work"):
        tiny_run.train(tiny)
    tiny_run.train(tiny)
