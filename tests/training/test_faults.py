"""What users met, each with its right value."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
import torch

from cs336.data import ShardWriter, write_shard
from cs336.models import Transformer, from_pretrained
from cs336.models.memory import training_memory
from cs336.training import AdamWConfig, CosineConfig, DataConfig, NonFiniteError, TrainConfig, Trainer, checkpoint
from cs336.training.learner import Learner
from cs336.training.run_dir import RunDir
from cs336.utils import files

HERE = pathlib.Path(__file__).parent


class Lines:
    """A display that keeps what is said."""

    def __init__(self):
        self.lines, self.rows, self.left, self.lost = [], [], [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def say(self, text):
        self.lines.append(text)

    def row(self, row, total_steps, seconds_left):
        self.rows.append(row["step"])
        self.left.append(seconds_left)

    def __contains__(self, text):
        return any(text in line for line in self.lines)


def train(config, **kwargs):
    display = Lines()
    return Trainer(config, display=display, **kwargs).train(), display


def stop_at(monkeypatch, step):
    """A run that is interrupted without saving."""
    update = Trainer._update

    def interrupted(self):
        if self.step == step:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(Trainer, "_update", interrupted)


# ---- checkpoints ----


def spoil(path):
    """64 bytes of 0xff in the middle: every header, name and shape stays as it was."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, monkeypatch, name):
    tiny_run.train(tiny_run.config(tmp_path, "whole"))
    tiny = tiny_run.config(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            tiny_run.train(tiny)
    spoil(tiny.run_dir / "checkpoints/step_00000008" / name)
    display = Lines()
    Trainer(tiny, display=display, sample=tiny_run.sample).train()
    assert "step_00000008" in display
    assert "taking the one before it" in display
    assert "continuing after step 4" in display
    assert tiny_run.rows(tiny.run_dir) == tiny_run.rows(tmp_path / "whole")


def test_a_damaged_checkpoint_takes_no_whole_one_s_place(tmp_path, monkeypatch):
    tiny = tiny_run.config(tmp_path)
    stop_at(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        tiny_run.train(tiny)
    spoil(tiny.run_dir / "checkpoints/step_00000008" / checkpoint.MODEL)
    with pytest.raises(KeyboardInterrupt):
        tiny_run.train(dataclasses.replace(tiny, checkpoint_interval=9))
    kept = checkpoint.list_checkpoints(tiny.run_dir / "checkpoints")
    assert [path.name for path in kept] == ["step_00000004", "step_00000009"]


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="8steps")
    tiny_run.train(tiny)
    for path in checkpoint.list_checkpoints(tiny.run_dir / "checkpoints"):
        spoil(path / checkpoint.MODEL)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        tiny_run.train(tiny)


def test_a_run_from_before_checksums_goes_on(tmp_path, monkeypatch):
    """Written by the trainer of format 1: its configuration and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    tiny_run.write_data(pathlib.Path("."))
    old = HERE / "fixtures/run_before"
    shutil.copytree(old, "run")
    config = TrainConfig.from_toml("run/config.toml")
    _, display = train(config)
    assert "continuing after step 4" in display
    found = [[row["train/loss"], row["train/grad_norm"]] for row in tiny_run.rows("run", of="train/loss")]
    expected = json.loads((old / "losses.json").read_text())
    np.testing.assert_allclose(found, expected[4:], rtol=1e-5)


def test_a_finished_run_that_is_asked_for_again_keeps_its_peak_memory(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="4steps")
    tiny_run.train(tiny)
    path = tiny.run_dir / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_bytes": 1 << 50}))
    tiny_run.train(tiny)
    assert json.loads(path.read_text())["peak_memory_bytes"] == 1 << 50


def test_a_run_of_another_format_is_refused(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="4steps")
    tiny_run.train(tiny)
    path = tiny.run_dir / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="holds a run of format 2, expected 1"):
        tiny_run.train(dataclasses.replace(tiny, budget="8steps"))


# ---- identity ----


def rewrite(path, change, tokenizer="t", **kwargs):
    tokens = np.concatenate([np.fromfile(p, "<u2")[512:] for p in sorted(path.glob("*.bin"))])
    with ShardWriter(path, vocab_size=tiny_run.VOCAB, tokenizer=tokenizer, eot_id=0, **kwargs) as writer:
        writer.write(change(tokens), documents=1, text_bytes=2 * len(tokens))


@pytest.mark.parametrize(
    ("side", "change", "tokenizer"),
    [("train", lambda t: t[::-1], "t"), ("train", lambda t: t, "another"), ("val", lambda t: t[::-1], "t")],
)
def test_other_data_are_refused(tmp_path, side, change, tokenizer):
    tiny = tiny_run.config(tmp_path, budget="4steps")
    tiny_run.train(tiny)
    rewrite(tmp_path / side, change, tokenizer)
    with pytest.raises(ValueError, match=f"holds a run with other {side} data"):
        Trainer(tiny_run.changed(tiny, budget="8steps"))


def test_the_same_data_go_on_wherever_they_lie(tmp_path, monkeypatch):
    tiny = tiny_run.config(tmp_path, budget="4steps")
    monkeypatch.chdir(tmp_path)
    relative = DataConfig(pathlib.Path("train"), pathlib.Path("val"))
    tiny_run.train(tiny_run.changed(tiny, data=relative))
    (tmp_path / "moved").mkdir()
    for side in ("train", "val"):
        rewrite(tmp_path / side, lambda t: t, shard_tokens=64)  # in other files
        (tmp_path / side).rename(tmp_path / "moved" / side)
    moved = DataConfig(tmp_path / "moved/train", tmp_path / "moved/val")
    result = tiny_run.train(tiny_run.changed(tiny, data=moved, budget="8steps"))
    assert result.step == 8


def test_a_shard_beyond_the_vocabulary_is_named(tmp_path):
    tiny = tiny_run.config(tmp_path)
    write_shard(tmp_path / "train/00000.bin", np.full(1000, tiny_run.VOCAB, np.uint16))
    with pytest.raises(ValueError, match=r"train/00000\.bin holds the token 32 .*the vocabulary has 32"):
        tiny_run.train(tiny)
    assert json.loads((tiny.run_dir / "failure.json").read_text())["error"] == "ValueError"


# ---- budgets ----


def test_a_larger_budget_that_leads_up_again_says_so(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="8steps", schedule=CosineConfig(warmup_steps=1))
    _, display = train(tiny)
    assert "stretches the schedule" not in display
    _, display = train(tiny_run.changed(tiny, budget="40steps"))
    assert "the learning rate goes up again, from 0.0001 to 0.000" in display
    budgets = json.loads((tiny.run_dir / "run.json").read_text())["budgets"]
    assert [(b["budget"], b["from_step"]) for b in budgets] == [("8steps", 0), ("40steps", 8)]
    assert budgets[1]["lr"] == pytest.approx(1e-4)
    assert budgets[1]["highest_lr"] == max(r["lr"] for r in tiny_run.rows(tiny.run_dir, of="lr") if r["step"] > 8)


def test_a_smaller_budget_does_not_overwrite_what_ran(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="8steps")
    tiny_run.train(tiny)
    before = {p: p.read_bytes() for p in tiny.run_dir.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="has done 8 steps, and a budget of 6steps makes 6: give a larger budget"):
        Trainer(tiny_run.changed(tiny, budget="6steps"))
    with pytest.raises(ValueError, match=r"longer than the budget of 0\.0001s"):
        Trainer(tiny_run.changed(tiny, budget="0.0001s"))
    assert {p: p.read_bytes() for p in tiny.run_dir.rglob("*") if p.is_file()} == before


# ---- a step that is not finite ----


def spoil_step(monkeypatch, step, times):
    """Make the first layer's MLP overflow in one step, the first `times` that it is made."""
    left = [times]
    build = Learner.__init__

    def init(self, config):
        build(self, config)
        self.steps = 0

        def hook(module, inputs, output):
            if left[0] and self.model.training and self.at == step:
                left[0] -= 1
                return output * torch.inf
            return output

        self.model.layers[0].mlp.register_forward_hook(hook)

    update, examine = Trainer._update, Trainer._examine

    def at(original):
        def wrapped(self, *args):
            self.learner.at = self.step + 1
            try:
                return original(self, *args)
            finally:
                self.learner.at = 0

        return wrapped

    monkeypatch.setattr(Learner, "__init__", init)
    monkeypatch.setattr(Learner, "at", 0, raising=False)
    monkeypatch.setattr(Trainer, "_update", at(update))
    monkeypatch.setattr(Trainer, "_examine", at(examine))


def test_the_cause_is_in_the_failure_record(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 7, times=9)
    tiny = tiny_run.config(tmp_path)
    display = Lines()
    with pytest.raises(NonFiniteError):
        Trainer(tiny, display=display).train()
    record = json.loads((tiny.run_dir / "failure.json").read_text(), parse_constant=pytest.fail)
    assert record["error"] == "NonFiniteError"
    assert record["step"] == 7
    assert record["cause"].startswith("the first that is not finite is the output of layers.0.mlp (SwiGLU)")
    assert record["checkpoint"].endswith("step_00000004")
    assert "step 7: loss nan" in display
    assert display.rows == [1, 2, 3, 4, 5, 6, 5, 6]  # the repeated steps are shown as they go


def test_rows_are_valid_json_when_a_run_diverges(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 7, times=9)
    tiny = tiny_run.config(tmp_path)
    with pytest.raises(NonFiniteError):
        Trainer(tiny, display=Lines()).train()
    lines = (tiny.run_dir / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line, parse_constant=pytest.fail) for line in lines][-1]
    assert (last["step"], last["train/loss"]) == (7, "NaN")
    from cs336.report.run import read_run

    assert math.isnan(read_run(tiny.run_dir).column("train/loss")[1][-1])


def test_what_does_not_happen_again_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    tiny_run.train(tiny_run.config(tmp_path, "whole"))
    spoil_step(monkeypatch, 7, times=1)
    tiny = tiny_run.config(tmp_path)
    display = Lines()
    result = Trainer(tiny, display=display, sample=tiny_run.sample).train()
    assert result.finished
    assert "step 7 is finite now that it is repeated" in display
    assert tiny_run.rows(tiny.run_dir) == tiny_run.rows(tmp_path / "whole")
    assert (tiny.run_dir / "samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    assert not (tiny.run_dir / "failure.json").exists()


def test_a_repeated_run_can_be_stopped(tmp_path, monkeypatch):
    spoil_step(monkeypatch, 7, times=9)
    tiny = tiny_run.config(tmp_path)
    display = Lines()

    def row(self, row, *_):
        self.rows.append(row["step"])
        self.lost = self.rows.count(5) == 2

    monkeypatch.setattr(Lines, "row", row)
    result = Trainer(tiny, display=display).train()
    assert (result.finished, result.step) == (False, 6)
    assert result.checkpoint.exists()
    assert display.rows == [1, 2, 3, 4, 5, 6, 5, 6]


def test_a_failure_is_forgotten_when_the_run_goes_on(tmp_path, monkeypatch):
    tiny = tiny_run.config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            tiny_run.train(tiny)
    assert "No space" in json.loads((tiny.run_dir / "failure.json").read_text())["message"]
    tiny_run.train(tiny)
    assert not (tiny.run_dir / "failure.json").exists()


# ---- stopping ----

CHILD = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import tiny_run
from cs336.training import Trainer
from cs336.training.metrics import Display
root = pathlib.Path(sys.argv[2])
config = tiny_run.config(root, budget="100000steps", eval_interval=0, checkpoint_interval=0)
result = Trainer(config, display=Display()).train()
print("this would fail in a broken pipe", flush=True)
sys.exit(130 if not result.finished else 0)
"""


def test_output_that_nobody_reads_stops_the_run_and_saves_it(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(HERE), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for _ in range(2):  # head -2
        child.stdout.readline()
    child.stdout.close()
    error = child.stderr.read()
    assert child.wait(60) == 130, error
    assert "stopped after step" in error
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run/checkpoints")
    assert str(saved) in error
    assert "Traceback" not in error


# ---- time ----


def test_the_time_left_includes_what_is_scheduled(tmp_path):
    trainer = Trainer(tiny_run.config(tmp_path, budget="100steps", eval_interval=10, checkpoint_interval=50))
    decisions = trainer.decisions
    validate, save = decisions.pauses
    assert decisions.seconds_left(0, 0.0, 1.0) == pytest.approx(100 + 10 * validate.steps(100))
    decisions.took(validate, 3.0)
    decisions.took(save, 5.0)
    assert decisions.seconds_left(0, 0.0, 1.0) == 100 + 10 * 3 + 2 * 5
    assert decisions.seconds_left(10, 0.0, 1.0) == 90 + 9 * 3 + 2 * 5
    assert decisions.seconds_left(95, 0.0, 1.0) == 5 + 3 + 5
    assert decisions.seconds_left(100, 0.0, 1.0) == 0


@pytest.mark.parametrize("steps", [10, 100, 1000, 100_000])
def test_no_default_spends_over_a_tenth_on_validation(tmp_path, steps):
    with ShardWriter(tmp_path / "big", vocab_size=tiny_run.VOCAB, tokenizer="t", eot_id=0) as writer:
        writer.write(np.zeros(400_000, np.int64))
    data = DataConfig(tmp_path / "big", tmp_path / "big")
    tiny = tiny_run.config(tmp_path, budget=f"{steps}steps", data=data, eval_interval=None, batch_size=32)
    decisions = Trainer(tiny).decisions
    validate = decisions.pauses[0]
    times = sum(decisions.due(validate, step) for step in range(1, steps + 1))
    spent = times * validate.steps(steps)
    assert times >= 1
    assert spent <= 0.1 * steps + 1  # one whole batch at the end, however short the run is
    if steps > 100:
        assert times == 20
        assert spent > 0.02 * steps or validate.steps(steps) == 16


def test_the_memory_of_a_step_is_predicted_before_the_run(tmp_path):
    tiny = tiny_run.config(tmp_path, budget="2steps", micro_batch_size=2)
    _, display = train(tiny)
    facts = json.loads((tiny.run_dir / "run.json").read_text())
    assert facts["predicted_memory_bytes"] == training_memory(tiny_run.MODEL, 2).total
    assert f"a step takes about {facts['predicted_memory_bytes'] / 2**20:,.0f} MiB" in display.lines[0]
    assert facts["peak_memory_bytes"] > facts["predicted_memory_bytes"]  # on a CPU, of the whole process


# ---- exports ----


def test_exported_weights_are_durable_before_their_name_and_as_the_umask_says(tmp_path, monkeypatch):
    synced = []
    sync = files.sync

    def watched(path):
        if os.path.isfile(path):
            synced.append(os.stat(path).st_ino)
        sync(path)

    monkeypatch.setattr(files, "sync", watched)
    before = os.umask(0o027)
    try:
        result = tiny_run.train(tiny_run.config(tmp_path, budget="2steps"))
    finally:
        os.umask(before)
    for path in (*result.export.iterdir(), *result.checkpoint.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    assert (result.export / "model.safetensors").stat().st_ino in synced


def test_the_tokenizer_beside_the_shards_is_exported(tmp_path):
    from cs336.data import tokenize_corpus
    from cs336.tokenizer import Tokenizer

    documents = [f"{i} little words" for i in range(300)]
    tokenizer = Tokenizer.train(documents, 270, special_tokens=["<|endoftext|>"])
    tokenize_corpus(documents, tokenizer, tmp_path / "tokens", val_fraction=0.2)
    model = tiny_run.changed(tiny_run.MODEL, vocab_size=320)
    data = DataConfig(tmp_path / "tokens/train", tmp_path / "tokens/val")
    result, display = train(tiny_run.config(tmp_path, data=data, model=model, budget="2steps"))
    assert "no tokenizer" not in display
    assert Tokenizer.load(result.export / "tokenizer.json").fingerprint == tokenizer.fingerprint

    (tmp_path / "tokens/train/tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(FileNotFoundError, match=r"tokens/train/tokenizer.json, which made these shards, is gone: put"):
        Trainer(tiny_run.config(tmp_path, "other", data=data, model=model, budget="2steps"))
    assert not (tmp_path / "other").exists()


def test_an_export_without_a_tokenizer_is_said_at_the_start(tmp_path):
    _, display = train(tiny_run.config(tmp_path, budget="2steps"))
    assert "the export will have none" in display


# ---- beginning from weights ----


@pytest.mark.parametrize("source", ["export", "checkpoints/step_00000004", "."])
def test_a_run_begins_from_weights(tmp_path, source):
    first = tiny_run.config(tmp_path, "first", budget="4steps", optimizer=AdamWConfig(lr=0.05))
    tiny_run.train(first)
    trainer = Trainer(tiny_run.config(tmp_path, seed=1, init_from=first.run_dir / source), display=Lines())
    ids = torch.arange(8)[None]
    assert torch.equal(trainer.learner.model(ids), from_pretrained(first.run_dir / "export")(ids))
    assert trainer.train().step == 12
    again = Trainer(trainer.config, display=Lines())
    assert again.step == 12  # goes on from its own checkpoint


def test_a_run_from_weights_goes_on_from_another_directory(tmp_path, monkeypatch):
    tiny_run.train(tiny_run.config(tmp_path, "first", budget="4steps"))
    monkeypatch.chdir(tmp_path)
    tiny_run.train(tiny_run.config(tmp_path, budget="4steps", init_from=pathlib.Path("first")))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = tiny_run.config(tmp_path, init_from=pathlib.Path("../first"))
    assert tiny_run.train(again).step == 12


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    first = tiny_run.config(tmp_path, "first", budget="4steps")
    tiny_run.train(first)
    other = tiny_run.changed(tiny_run.MODEL, d_model=32)
    with pytest.raises(ValueError, match=r"is another model than \[model\] \(d_model: 16 -> 32\)"):
        Trainer(tiny_run.config(tmp_path, model=other, init_from=first.run_dir / "export"))
    with pytest.raises(FileNotFoundError, match="nowhere holds no model"):
        Trainer(tiny_run.config(tmp_path, init_from=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_the_model_of_init_from_may_be_left_out(tmp_path):
    first = tiny_run.config(tmp_path, "first", budget="4steps")
    tiny_run.train(first)
    text = tiny_run.config(tmp_path).to_toml()
    without = text[: text.index("[model]")] + text[text.index("[optimizer]") :]
    for source in ("export", "checkpoints/step_00000004"):
        (tmp_path / "c.toml").write_text(f'init_from = "{first.run_dir / source}"\n' + without)
        model = TrainConfig.from_toml(tmp_path / "c.toml").model
        assert model.num_parameters() == tiny_run.MODEL.num_parameters()
        assert Transformer(model).state_dict().keys() == Transformer(tiny_run.MODEL).state_dict().keys()
