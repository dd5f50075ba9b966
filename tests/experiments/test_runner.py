"""Studies that are trained: here, and by processes that are killed."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from experiments.tiny_study import MODEL, pretend, study
from rich.console import Console

from cs336.experiments import Cost, Ledger, run_study, train_run
from cs336.experiments.runner import worker_environment
from cs336.experiments.study import Local
from cs336.experiments.watch import Watch, progress
from cs336.training.checkpoint import list_checkpoints
from cs336.utils.stages import Interrupted

ROOT = pathlib.Path(__file__).parents[2]
LRS = {"optimizer.lr": [1e-3, 2e-3, 3e-3]}


def loss(config):
    return 1000 * config.optimizer.lr + config.seed / 10


def quiet():
    return Console(file=io.StringIO())


def test_a_study_is_trained_once(tmp_path):
    calls = []
    train = pretend(lambda config: calls.append(config.run_dir.name) or loss(config))
    of = study(tmp_path, vary=LRS, seeds=2)
    console = quiet()
    entries = run_study(of, train=train, console=console)
    assert [entry.score("val/loss") for entry in entries] == [1.0, 1.1, 2.0, 2.1, 3.0, 3.1]
    assert run_study(of, train=train, console=quiet()) == entries
    assert len(calls) == len(set(calls)) == 6
    planned = of.trials()[0].planned
    assert entries[0].spent == Cost(planned.flops, planned.tokens, 2.0)
    said = console.file.getvalue()
    assert said.count("\n") == 6
    assert "lr 0.003, seed 1: val/loss 3.1000, 2 s" in said
    assert "6/6" in said


def test_a_failed_run_is_kept_with_its_error_and_the_others_go_on(tmp_path):
    def train(config):
        if config.optimizer.lr == 2e-3:
            raise FloatingPointError("no number")
        return {"val/loss": 1}

    of = study(tmp_path, vary=LRS)
    entries = run_study(of, train=train, console=quiet())
    assert [e.state for e in entries] == ["done", "failed", "done"]
    assert entries[1].error == "FloatingPointError: no number"
    assert run_study(of, train=pretend(loss), console=quiet())[1].state == "failed"
    assert run_study(of, train=pretend(loss), console=quiet(), retry=True)[1].score("val/loss") == 2


def test_a_study_that_is_stopped_goes_on(tmp_path):
    def train(config):
        if config.optimizer.lr == 2e-3:
            raise Interrupted
        return {"val/loss": 1}

    of = study(tmp_path, vary=LRS)
    with pytest.raises(Interrupted):
        run_study(of, train=train, console=quiet())
    assert [e.state for e in Ledger(of.directory).entries()] == ["done", "waiting", "waiting"]
    assert {e.state for e in run_study(of, train=pretend(loss), console=quiet())} == {"done"}


def test_a_budget_ends_a_study(tmp_path):
    each = study(tmp_path).trials()[0].planned.tokens
    entries = run_study(study(tmp_path, vary=LRS, budget=f"{2 * each:g}tok"), train=pretend(loss), console=quiet())
    assert [e.state for e in entries] == ["done", "done", "waiting"]
    assert {e.state for e in run_study(study(tmp_path, vary=LRS), train=pretend(loss), console=quiet())} == {"done"}


def steps(run_dir):
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_rungs_continue_their_runs(tmp_path):
    """For real: the best of four at 2 steps goes on to 4 and to 8, in its own directory."""
    vary = {"optimizer.lr": [1e-5, 1e-4, 1e-3, 1e-2]}
    halving = {"kind": "halving", "rungs": 3, "eta": 2}
    constant = {"kind": "constant", "warmup_steps": 0}
    of = study(tmp_path, vary=vary, search=halving, changes={"budget": "8steps", "schedule": constant})
    entries = run_study(of, console=quiet())
    assert [e.rung for e in entries] == [0, 0, 0, 0, 1, 1, 2]
    assert [e.result["step"] for e in entries] == [2] * 4 + [4] * 2 + [8]
    assert [e.spent.tokens for e in entries] == [32] * 4 + [32] * 2 + [64]
    assert {e.state for e in entries} == {"done"}
    best = min(entries[4:6], key=lambda e: e.score("val/loss"))
    assert entries[6].folder == best.folder
    rows = steps(of.runs / best.folder)
    assert [step for step in rows if step in (1, 2, 3, 4, 5, 6, 7, 8)] == sorted(rows)
    assert len(list(of.runs.iterdir())) == 4


def test_what_a_run_says(tmp_path):
    (entry,) = run_study(study(tmp_path), console=quiet(), train=train_run)
    assert entry.result["step"] == 4
    assert {"val/loss", "train/loss", "train/tok_per_sec", "parameters"} <= set(entry.result)
    assert entry.result["val/bpb"] > 0
    trial = study(tmp_path).trials()[0]
    assert (entry.spent.flops, entry.spent.tokens) == (trial.planned.flops, trial.planned.tokens)


STUDY = """
import pathlib, sys
from experiments.tiny_study import study
from cs336.experiments import run_study
run_study(study(pathlib.Path(sys.argv[1]), **eval(sys.argv[2])))
"""


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_of_a_study_and_of_a_worker(tmp_path):
    """The study is killed, then a worker, and what is left is trained: nothing twice, all from checkpoints."""
    model = MODEL | {"d_model": 64, "context_length": 32, "num_layers": 2}  # whose steps leave time to kill them
    changes = {"budget": "100steps", "checkpoint_interval": 10, "model": model}
    keys = {"vary": {"optimizer.lr": [1e-3, 2e-3]}, "changes": changes}
    of = study(tmp_path, **keys, where={"kind": "local"})
    ledger, folder = Ledger(of.directory), of.runs / of.trials()[0].folder
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path), repr(keys | {"where": {"kind": "local"}})]
    first = subprocess.Popen([sys.executable, "-c", STUDY, *arguments], env=environment)
    until(lambda: list_checkpoints(folder / "checkpoints"))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: ledger.entries()[0].state == "waiting")  # its worker has saved itself and left
    kept = list_checkpoints(folder / "checkpoints")[-1]
    at = int(kept.name.removeprefix("step_"))
    assert 0 < at < 100

    second = threading.Thread(target=run_study, args=(of,), kwargs={"console": quiet()})
    second.start()
    until(lambda: list_checkpoints(folder / "checkpoints")[-1] != kept)
    os.kill(int(ledger.entries()[0].owner.rpartition(":")[2]), signal.SIGKILL)
    second.join(timeout=120)
    failed, done = ledger.entries()
    assert (failed.state, failed.attempts, done.state) == ("failed", 2, "done")
    assert failed.error == "its process was ended by signal SIGKILL, as when memory runs out"
    assert failed.spent.tokens > 64 * at
    third = run_study(study(tmp_path, **keys), retry=True, console=quiet())
    assert [entry.state for entry in third] == ["done", "done"]
    assert steps(folder) == [*range(1, 101), 100]  # the last for its validation
    assert third[0].spent.tokens == 100 * 64
    assert third[0].result["step"] == 100


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="a worker ended by status 1 without a run"):
        run_study(study(tmp_path, where={"kind": "local"}), console=quiet())
    assert [e.state for e in Ledger(tmp_path / "study").entries()] == ["waiting"]


def test_each_worker_has_its_gpu_and_its_part_of_the_cores(monkeypatch):
    monkeypatch.setattr("cs336.experiments.runner.thread_count", lambda wanted: 16)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [worker_environment(Local(workers=3, gpus=(4, 6)), slot) for slot in range(3)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["4", "6", "4"]
    assert {e["OMP_NUM_THREADS"] for e in found} == {"5"}
    assert Local(gpus=(1, 2)).num_workers == 2
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(Local(threads=2), 0)


def test_gpus_are_counted_among_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f,7")
    found = [worker_environment(Local(gpus=(1, 2)), slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert found == ["GPU-5f", "7"]
    with pytest.raises(ValueError, match="GPU 3 is not there, 3 are"):
        worker_environment(Local(gpus=(3,)), 0)


def test_time_left(tmp_path):
    of = study(tmp_path, vary={"optimizer.lr": [1e-3, 2e-3, 3e-3, 4e-3]})
    ledger, planned = Ledger(of.directory), of.trials()[0].planned
    ledger.want(of.trials())
    assert progress(ledger.entries(), {}, 1).seconds_left is None
    claim = ledger.claim()
    going = {claim.entry.id: Cost(planned.flops / 4, planned.tokens / 4, 5)}
    found = progress(ledger.entries(), going, 1)
    assert found.done == {claim.entry.id: 0.25}
    assert found.seconds_left == pytest.approx(3 * 20 + 15)
    assert progress(ledger.entries(), going, 2).seconds_left == pytest.approx(75 / 2)
    ledger.finish(claim, {"val/loss": 1.5}, Cost(planned.flops, planned.tokens, 20))
    ledger.fail(ledger.claim(), "ValueError: [bold]no[/bold]", Cost(0, 0, 0))
    found = progress(ledger.entries(), {}, 1)
    assert found.counts == {"waiting": 2, "running": 0, "done": 1, "failed": 1}
    assert found.seconds_left == pytest.approx(40)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(Watch(of, ledger, console).table(ledger.entries()))
    said = console.file.getvalue()
    assert "1.5000" in said
    assert "[bold]no[/bold]" in said
    assert "2 waiting, 1 done, 1 failed; about 40 s left" in said


@pytest.mark.slow
def test_a_study_on_ray(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    vary = {"optimizer.lr": [1e-3, 2e-3], "data.train": [str(tmp_path / "train"), str(tmp_path / "none")]}
    of = study(tmp_path, vary=vary, where={"kind": "ray", "address": "local", "workers": 2})
    entries = run_study(of, console=quiet())
    assert [entry.state for entry in entries] == ["done", "failed", "done", "failed"]
    assert all("none" in entry.error for entry in entries[1::2])
    here = study(tmp_path, vary=vary, directory=str(tmp_path / "here"))
    assert [e.score("val/loss") for e in run_study(here, console=quiet())] == [e.score("val/loss") for e in entries]
