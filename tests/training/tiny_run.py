"""A run small enough to repeat many times, and ways to kill it. Also the target of child processes."""

import dataclasses
import json
import os
import pathlib
import signal
import types

import numpy as np
import torch
from rich.console import Console

from cs336.data import ShardWriter
from cs336.models import TransformerConfig
from cs336.training import DataConfig, TrainConfig, Trainer, checkpoint, metrics, trainer
from cs336.training.metrics import Display

VOCAB = 32
MODEL = TransformerConfig(vocab_size=VOCAB, context_length=8, num_layers=1, d_model=16, num_heads=2)


def write_data(root):
    rng = np.random.default_rng(0)
    for name, count in (("train", 1000), ("val", 200)):
        with ShardWriter(root / name, vocab_size=VOCAB, tokenizer="t", eot_id=0) as writer:
            writer.write(np.cumsum(rng.integers(0, 3, count)) % VOCAB, documents=1, text_bytes=2 * count)
    return DataConfig(root / "train", root / "val")


def config(root, name="run", **changes):
    data = DataConfig(root / "train", root / "val") if (root / "train").exists() else write_data(root)
    settings = {"batch_size": 4, "budget": "12steps", "log_interval": 1, "checkpoint_interval": 4, "eval_interval": 5}
    settings |= {"device": "cpu", "compile": False, "data": data, "model": MODEL}
    return TrainConfig(run_dir=root / name, **(settings | changes))


def quiet():
    return Display(Console(file=open(os.devnull, "w")))


def sample(model):
    draw = torch.rand(()).item()  # from the global generator, which a checkpoint holds
    return [{"prompt": "p", "text": f"{draw} {model.training} {torch.is_grad_enabled()}"}]


def train(config, **kwargs):
    return Trainer(config, display=quiet(), sample=sample, **kwargs).train()


def rows(run_dir, *, of=None):
    """metrics.jsonl without what depends on the clock."""
    timed = {"seconds", "train/tok_per_sec", "train/mfu"}
    found = [json.loads(line) for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in timed} for r in found if of is None or of in r]


def on_a_clock(monkeypatch, seconds):
    """From here on a trainer's time passes in its steps alone: seconds(trainer) each."""
    now, update = [1.0], Trainer._update

    def timed(self):
        update(self)
        now[0] += seconds(self)

    monkeypatch.setattr(Trainer, "_update", timed)
    for module in (trainer, metrics):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))


def train_and_be_killed(root, changes, moment):
    """Child process: train until `moment`, then end by SIGKILL. Without a moment, until the end."""
    torch.set_num_threads(1)
    tiny = config(pathlib.Path(root), **changes)
    if moment is not None:
        kind, at = moment
        MOMENTS[kind](at)
    train(tiny)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner, name, when, then=die):
    """Replace owner.name by one that calls `then` after its work once `when(*args)` is true."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            then()
        return result

    setattr(owner, name, wrapped)


def torn_row(at):
    original = metrics.JsonLines.write

    def write(self, row):
        if row["step"] == at:
            self._file.write(json.dumps(row).encode()[:20])
            self._file.flush()
            die()
        original(self, row)

    metrics.JsonLines.write = write


def in_step(at):
    return lambda path: pathlib.Path(path).parent.name == f".step_{at:08d}.tmp"


MOMENTS = {
    "after a step": lambda at: after(Trainer, "_update", lambda self: self.step == at),
    "in a row": torn_row,
    "between the files of a checkpoint": lambda at: after(
        checkpoint, "save_file", lambda tensors, path: in_step(at)(path)
    ),
    "before the rename": lambda at: after(
        checkpoint, "sync", lambda path: pathlib.Path(path).name == f".step_{at:08d}.tmp"
    ),
    "after the rename": lambda at: after(
        checkpoint, "_put_in_place", lambda tmp, path: path.name.endswith(f"{at:08d}")
    ),
    "while an old one is removed": lambda at: after(
        pathlib.Path, "rename", lambda path, to: path.name == f"step_{at:08d}" and to.name == f".step_{at:08d}.tmp"
    ),
}


def changed(config, **changes):
    return dataclasses.replace(config, **changes)
