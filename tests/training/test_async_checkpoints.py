"""Checkpoints in the background keep the promises of those that are waited for."""

import json
import multiprocessing
import signal
import threading

import pytest
import tiny_run
import torch

from cs336.training import Trainer, checkpoint
from cs336.training.run_dir import RunDir

CHANGES = {"async_checkpoints": True, "micro_batch_size": 2}


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name != "state.json"}


def test_they_are_those_of_the_foreground(tmp_path):
    tiny_run.train(tiny_run.config(tmp_path, "waited", async_checkpoints=False))
    tiny_run.train(tiny_run.config(tmp_path, "background", async_checkpoints=True))
    for step in ("step_00000008", "step_00000012"):
        waited, background = (tmp_path / name / "checkpoints" / step for name in ("waited", "background"))
        assert files(waited) == files(background)
        assert checkpoint.load_checkpoint(background, tiny_model()) == int(step[-2:])
    assert tiny_run.rows(tmp_path / "waited") == tiny_run.rows(tmp_path / "background")


def tiny_model():
    from cs336.models import Transformer

    return Transformer(tiny_run.MODEL)


def test_what_is_written_is_the_step_that_was_saved(tmp_path, monkeypatch):
    """Training goes on while the disk is slow, and does not reach into what is being written."""
    going_on, at_work = threading.Event(), threading.Event()
    save, steps = checkpoint.save_file, []

    def slow(tensors, path):
        if path.parent.name == ".step_00000004.tmp" and path.name == "model.safetensors":
            at_work.set()
            assert going_on.wait(60)
        save(tensors, path)

    update = Trainer._update

    def watched(self):
        if self.step == 4:
            assert at_work.wait(60)
        update(self)
        steps.append(self.step)
        if self.step == 7:
            assert not (tmp_path / "slow/checkpoints/step_00000004").exists()
            going_on.set()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(Trainer, "_update", watched)
    tiny_run.train(tiny_run.config(tmp_path, "slow", keep_checkpoints=3, **CHANGES))
    monkeypatch.undo()
    tiny_run.train(tiny_run.config(tmp_path, "waited", keep_checkpoints=3, async_checkpoints=False, micro_batch_size=2))
    slow_one, waited = (tmp_path / name / "checkpoints/step_00000004" for name in ("slow", "waited"))
    assert steps[:7] == [1, 2, 3, 4, 5, 6, 7]
    assert files(slow_one) == files(waited)


def test_a_disk_that_fails_is_an_error_of_the_run(tmp_path, monkeypatch):
    save = checkpoint.save_file

    def full(tensors, path):
        if path.parent.name == ".step_00000008.tmp":
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step_00000008 was not written .*No space left"):
        tiny_run.train(tiny_run.config(tmp_path, **CHANGES))
    assert "No space left" in json.loads((tmp_path / "run/failure.json").read_text())["message"]
    (whole,) = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.load_checkpoint(whole) == 4
    monkeypatch.undo()
    assert tiny_run.train(tiny_run.config(tmp_path, **CHANGES)).step == 12


def test_an_error_of_the_run_leaves_the_checkpoint_whole(tmp_path, monkeypatch):
    def fail(self):
        if self.step == 4:
            raise RuntimeError("lost the GPU")
        update(self)

    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", fail)
    with pytest.raises(RuntimeError, match="lost the GPU"):
        tiny_run.train(tiny_run.config(tmp_path, **CHANGES))
    (whole,) = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.load_checkpoint(whole, tiny_model()) == 4


@pytest.mark.parametrize(
    ("moment", "newest"),
    [
        (("between the files of a checkpoint", 8), 4),
        (("before the rename", 8), 4),
        (("after the rename", 8), 8),
        (("while an old one is removed", 4), 12),
    ],
)
def test_killed_while_one_is_written(tmp_path, moment, newest):
    """SIGKILL from the writing thread: the former is whole, and the run that goes on is the unbroken one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cs336.training", "torch._dynamo"])
    process = context.Process(target=tiny_run.train_and_be_killed, args=(tmp_path, CHANGES, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    assert found[-1].name == f"step_{newest:08d}"
    for path in found:
        assert checkpoint.load_checkpoint(path, tiny_model()) == int(path.name[-8:])
    tiny_run.train(tiny_run.config(tmp_path, **CHANGES))
    tiny_run.train(tiny_run.config(tmp_path, "unbroken", **CHANGES))
    assert tiny_run.rows(tmp_path / "run") == tiny_run.rows(tmp_path / "unbroken")
    last = "checkpoints/step_00000012"
    assert files(tmp_path / "run" / last) == files(tmp_path / "unbroken" / last)


def test_one_at_a_time_and_rows_before_it(tmp_path):
    run = RunDir(tmp_path / "run", 2)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    with run.held(), run.open_rows(upto=0), run.saving():
        for step in (1, 2, 3):
            run.metrics.write({"step": step})
            assert run.save(model, optimizer, step, {}, background=True).name == f"step_{step:08d}"
        run.wait()
        assert [int(p.name[-8:]) for p in checkpoint.list_checkpoints(run.checkpoints)] == [2, 3]
    assert not list(run.checkpoints.glob(".*"))
