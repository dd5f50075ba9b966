"""The trainer on two processes against itself in one. A batch of 4 is two micro-batches of 2, in one process or in two:
then every sum has the same order, and the runs are equal bit for bit."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch
from gloo_ranks import error_of, on_two_ranks
from safetensors.torch import load_file
from training import tiny_run

from cs336.data import ShardWriter
from cs336.models import TransformerConfig
from cs336.parallel import ParallelConfig, launch
from cs336.training import AdamWConfig, GuardConfig, LionConfig, MuonConfig, SOAPConfig, Trainer

TIED = TransformerConfig(
    vocab_size=tiny_run.VOCAB, context_length=8, num_layers=1, d_model=16, num_heads=2, tie_embeddings=True
)
ZERO1, ZERO2, ZERO3 = ({"parallel": ParallelConfig(zero=zero)} for zero in (1, 2, 3))
UNCLIPPED = {"optimizer": AdamWConfig(max_grad_norm=float("inf"))}  # the order in which a norm is summed is no matter
DEEP = {"model": dataclasses.replace(TIED, num_layers=3), "gradient_checkpointing": True}
RUNS = {  # name -> (what both have, what two ranks have)
    "data": ({}, {"parallel": ParallelConfig(log_ranks=True)}),
    "zero1": ({}, ZERO1),
    "tied": ({"model": TIED}, ZERO1),
    "muon": ({"optimizer": MuonConfig()}, ZERO1),
    "soap": ({"optimizer": SOAPConfig(frequency=2)}, ZERO1),
    "bf16": ({"precision": "bf16_weights"}, ZERO1),
    "zero2": (UNCLIPPED, ZERO2),
    "zero3": (UNCLIPPED, ZERO3),
    "deep": (UNCLIPPED | DEEP, ZERO3),
    "lion zero3": ({"optimizer": LionConfig(max_grad_norm=float("inf"))}, ZERO3),
    "bf16 zero3": (UNCLIPPED | DEEP | {"precision": "bf16_weights"}, ZERO3),
}
LAYOUTS = [(3, None), (5, ZERO3), (7, ZERO1), (9, ZERO2), (10, {}), (12, None)]  # until which step; None: one process


def config(root, name, **changes):
    return tiny_run.config(root, name, **({"micro_batch_size": 2, "sample_interval": 5} | changes))


def sample(model):
    return [{"prompt": "p", "text": f"{model.training} {torch.is_grad_enabled()}"}]


def train(settings):
    """The result's numbers."""
    result = Trainer(settings, display=tiny_run.quiet(), sample=sample).train()
    return {"step": result.step, "tokens": result.tokens, "val": result.val["val/loss"]}


def poisoned(root, rank, **changes):
    """What a run says whose loss is not finite on rank 1 alone, from step 3 on."""
    trainer = Trainer(config(root, f"poisoned{len(changes)}", **changes), display=tiny_run.quiet())
    restore = trainer._restore

    def restored():
        restore()
        poison()

    def poison():
        mlp = trainer.learner.model.layers[0].mlp
        mlp.register_forward_hook(lambda m, i, o: o * float("nan") if trainer.step >= 2 and rank == 1 else o)

    trainer._restore = restored
    poison()
    return error_of(trainer.train)


def mistakes(root, rank):
    write_other_data(root / "other")
    display = tiny_run.quiet()
    tiny = config(root, "wrong")

    def make(**changes):
        return error_of(lambda: Trainer(tiny_run.changed(tiny, **changes), display=display))

    def damaged():
        if rank == 0:
            for file in (root / "data/checkpoints").glob("*/model.safetensors"):
                file.write_bytes(b"torn")
        return error_of(lambda: Trainer(config(root, "data", **RUNS["data"][1]), display=display))

    def no_room():
        trainer = Trainer(tiny, display=display)
        if rank == 0:
            tiny.run_dir.write_text("a file in the way")
        return error_of(trainer.train)

    return {
        "config": make(seed=rank),
        "data": make(data=tiny.data if rank == 0 else tiny_run.DataConfig(root / "other", tiny.data.val)),
        "missing": make(data=tiny.data if rank == 0 else tiny_run.DataConfig(root / "nowhere", tiny.data.val)),
        "batch": make(batch_size=3, micro_batch_size=None),
        "device": make(device="cuda:1") if torch.cuda.is_available() else "",
        "poisoned": poisoned(root, rank),
        "poisoned part": poisoned(root, rank, micro_batch_size=1, **ZERO3),
        "skipped": poisoned(root, rank, guard=GuardConfig(non_finite="skip", most_skipped=2)),
        "no room": no_room(),
        "damaged": damaged(),
    }


def write_other_data(path):
    if launch.rank() == 0:
        with ShardWriter(path, vocab_size=tiny_run.VOCAB, tokenizer="t", eot_id=0) as writer:
            writer.write(torch.arange(1000).numpy() % tiny_run.VOCAB, documents=1, text_bytes=2000)
    torch.distributed.barrier()


def train_until(settings, step, signalled):
    """Until a signal to this process, if it is signalled."""
    trainer = Trainer(settings, display=tiny_run.quiet(), sample=sample)
    update = trainer._update

    def interrupted():
        update()
        if trainer.step == step and signalled:
            signal.raise_signal(signal.SIGTERM)

    trainer._update = interrupted
    return trainer.train().step


def moved(root, ranks):
    """The part of a run that so many processes make: it goes from layout to layout."""
    steps = []
    for step, layout in LAYOUTS:
        whole = tiny_run.config(root, "moved", sample_interval=5, **UNCLIPPED)
        if (layout is None) == (ranks == 1) and (not steps or ranks == 2):
            settings = tiny_run.changed(whole, micro_batch_size=2, **(layout or {}))
            steps.append(train_until(settings, step, launch.rank() == ranks - 1))
    return steps


def on_a_rank(rank, root):
    results = {name: train(config(root, name, **(both | ranks))) for name, (both, ranks) in RUNS.items()}
    results["accumulated"] = train(config(root, "accumulated", micro_batch_size=1))
    results["moved"] = moved(root, 2)
    results["agreed"] = [launch.agreed(rank + 5), launch.any_rank(rank == 1), launch.any_rank(False)]
    return results | {"mistakes": mistakes(root, rank)}


class OnARank:
    """Pickles, unlike a closure."""

    def __init__(self, root):
        self.root = root

    def __call__(self, rank):
        return on_a_rank(rank, self.root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    tiny_run.write_data(root)
    return root


@pytest.fixture(scope="module")
def alone(root):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {name: train(config(root, f"{name}_alone", **both)) for name, (both, _) in RUNS.items()}
    assert moved(root, 1) == [3]
    torch.set_num_threads(before)
    return results


@pytest.fixture(scope="module")
def ranks(root, alone, tmp_path_factory):
    return on_two_ranks(OnARank(root), tmp_path_factory.mktemp("gloo"))


def weights(run_dir):
    return load_file(run_dir / "export/model.safetensors")


def losses(run_dir):
    """Rows of training; validation adds its parts in another order."""
    return tiny_run.rows(run_dir, of="train/loss")


def check_same(run_dir, other, *, norms=True):
    rows, wanted = losses(run_dir), losses(other)
    for row, want in zip(rows, wanted, strict=True):
        if not norms:
            assert row.pop("train/grad_norm") == pytest.approx(want.pop("train/grad_norm"), rel=1e-5)
        assert row == want
    ours, theirs = weights(run_dir), weights(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs | ours)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_as_one_process(root, alone, ranks, name):
    check_same(root / name, root / f"{name}_alone", norms=name in ("data", "zero1", "tied", "muon", "soap", "bf16"))
    for found in ranks:
        assert found[name]["step"] == 12
        assert found[name]["tokens"] == alone[name]["tokens"]
        assert found[name]["val"] == pytest.approx(alone[name]["val"], rel=1e-12)


def test_gradients_accumulate_on_each_rank(root, alone, ranks):
    for ours, want in zip(losses(root / "accumulated"), losses(root / "data_alone"), strict=True):
        assert ours["train/loss"] == pytest.approx(want["train/loss"], rel=1e-5)


def test_a_run_goes_from_layout_to_layout(root, ranks):
    """A signal to the last rank stops all; the checkpoint of each layout is read under the next."""
    assert [found["moved"] for found in ranks] == [[5, 7, 9, 10]] * 2
    assert train(tiny_run.config(root, "moved", micro_batch_size=2, sample_interval=5, **UNCLIPPED))["step"] == 12
    check_same(root / "moved", root / "zero3_alone", norms=False)


def test_samples_are_drawn_once(root, ranks):
    rows = tiny_run.rows(root / "data", of="step")
    assert len(rows) == len(tiny_run.rows(root / "data_alone", of="step"))
    written = (root / "data/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [5, 10, 12]
    assert all(json.loads(line)["text"] == "False False" for line in written)


def test_what_each_rank_measured(root, ranks):
    rows = [json.loads(line) for line in (root / "data/ranks.jsonl").read_text().splitlines()]
    whole = losses(root / "data")
    assert [(r["step"], r["rank"]) for r in rows] == [(r["step"], rank) for r in whole for rank in (0, 1)]
    for i, row in enumerate(whole):
        both = [r["train/loss"] for r in rows[2 * i : 2 * i + 2]]
        assert both[0] != both[1]
        assert sum(both) / 2 == pytest.approx(row["train/loss"], rel=1e-6)
    assert all(r["peak_memory_bytes"] > 0 for r in rows)
    assert not (root / "zero1/ranks.jsonl").exists()


def test_all_decide_as_one(ranks):
    assert [found["agreed"] for found in ranks] == [[5, True, False]] * 2


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("config", "first difference: rank 0 has seed: 0; rank 1 has seed: 1. Start every process with the same"),
        ("data", "first difference: rank 0 has data.train: .*; rank 1 has data.train: .*other"),
        ("missing", "rank 1: FileNotFoundError: .*nowhere|^ValueError: .*nowhere|^FileNotFoundError"),
        ("batch", "batch_size 3 over data 2 is 1.50 sequences a process: use a multiple of 2"),
        ("poisoned", r"not finite is the output of layers.0.mlp .* on rank 1"),
        ("poisoned part", r"not finite is the output of layers.0.mlp .* on rank 1"),
        ("skipped", r"not finite is the output of layers.0.mlp .* on rank 1"),
        ("no room", "FileExistsError"),
        ("damaged", "every checkpoint in .* is damaged"),
    ],
)
def test_what_one_rank_finds_ends_all(ranks, mistake, message):
    for found in ranks:
        assert re.search(message, found["mistakes"][mistake]), found["mistakes"][mistake]


def test_torchrun_goes_on_as_if_no_rank_had_died(root, alone):
    """And `torchrun -m cs336 train` is `cs336 train`."""
    config(root, "survived").save(root / "survived.toml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    program = pathlib.Path(__file__).with_name("faulty_training.py")
    options = ["--config", "survived.toml", "--parallel.zero", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launcher, str(program), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert "continuing after step 4" in done.stdout
    assert done.stdout.count("finished 12 steps") == done.stdout.count("report: ") == 1
    assert "2 x cpu, ZeRO-1" in done.stdout
    check_same(root / "survived", root / "data_alone")
    assert (root / "survived/report.html").exists()
    assert not (root / "survived/failure.json").exists()
