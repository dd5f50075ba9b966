"""`cs336 train` under torchrun, in every layout, against itself in one process."""

import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import trained_layouts
from rich.console import Console
from safetensors.torch import load_file, save_file
from training import tiny_run

from cs336.models import BlockConfig, TransformerConfig
from cs336.nn import AttentionConfig, HyenaConfig, MoEConfig
from cs336.parallel import ParallelConfig
from cs336.training import AdamWConfig, GuardConfig, MuonConfig, NextToken, SOAPConfig, Trainer
from cs336.training.division import why_not
from cs336.training.metrics import Display

MODEL = TransformerConfig(tiny_run.VOCAB, 8, 2, 16, 4, 2, qk_norm=True, tie_embeddings=True)
MOE = TransformerConfig(tiny_run.VOCAB, 8, 2, 16, layers=(BlockConfig(AttentionConfig(2), MoEConfig(4, 2)),))
PLAIN = TransformerConfig(tiny_run.VOCAB, 8, 3, 16, 2)  # stages of one layer and of two, and a head of its own
HYENA = TransformerConfig(tiny_run.VOCAB, 8, 2, 16, layers=(BlockConfig(HyenaConfig(8)),))
NATIVE = ParallelConfig(zero=1, native_step=True)
STEPS = 4
SMOOTHED = NextToken(label_smoothing=0.1, z_loss=1e-2)
ALONE = {
    "dense": {"model": MODEL, "gradient_checkpointing": "full"},
    "moe": {"model": MOE, "micro_batch_size": 1},
    "plain": {"model": PLAIN, "gradient_checkpointing": "selective"},
    "muon": {"model": PLAIN, "optimizer": MuonConfig(max_grad_norm=0.3), "objective": SMOOTHED},
    "low": {"model": MODEL, "precision": "bf16_weights"},
    "capped": {"model": replace(MODEL, logit_softcap=5.0), "objective": SMOOTHED},  # whose head and loss are one
    "low but norms": {"model": replace(MODEL, float32_norms=True), "precision": "bf16_weights"},
    "autocast": {"model": PLAIN, "precision": "bf16"},
    "autocast moe": {"model": MOE, "precision": "bf16", "gradient_checkpointing": "full"},
    "autocast hyena": {"model": HYENA, "precision": "bf16"},
}
RUNS = {  # processes -> name -> (the same in one process, layout, what else is not as there)
    2: {
        "tensor": ("dense", {"tensor": 2}),
        "tensor bf16": ("low", {"tensor": 2}),
        "tensor capped": ("capped", {"tensor": 2, "zero": 1}),
        "ring": ("dense", {"context": 2}),
        "all_to_all": ("plain", {"context": 2, "attention": "all_to_all"}),
        "expert": ("moe", {"expert": 2}),
        "1f1b": ("dense", {"pipeline": 2}),
        "ZeRO-3 autocast": ("autocast", {"zero": 3}),
        "ZeRO-2 autocast moe": ("autocast moe", {"zero": 2}),
        "ZeRO-3 autocast hyena": ("autocast hyena", {"zero": 3}),
        "ZeRO-3 compiled": ("dense", {"zero": 3}, {"compile": True}),
        "native step": ("dense", {"zero": 1, "native_step": True}),
        "native step compiled": ("dense", {"zero": 1, "native_step": True}, {"compile": True}),
        "native step bf16": ("low", {"zero": 1, "native_step": True}),
        "tensor but norms": ("low but norms", {"tensor": 2}),
        "1f1b but norms": ("low but norms", {"pipeline": 2}),
        "ZeRO-3 but norms": ("low but norms", {"zero": 3}),
        "gpipe": ("muon", {"pipeline": 2, "schedule": "gpipe"}),
    },
    4: {
        "data x tensor": ("dense", {"data": 2, "tensor": 2, "zero": 1}),
        "data x pipeline": ("plain", {"data": 2, "pipeline": 2, "zero": 1}),
        "ZeRO-3 x tensor": ("dense", {"zero": 3, "tensor": 2}),
        "context x tensor": ("plain", {"context": 2, "tensor": 2}),
        "data x expert": ("moe", {"data": 2, "expert": 2}),
    },
}
COMPILED = {"autocast": (0, 1, 2, 3), "low": (0, 3)}  # the same in one process -> stages of ZeRO
MOVES = {  # a run that goes from layout to layout, each until a step
    2: [
        (2, {"tensor": 2}),
        (3, {"zero": 1, "native_step": True}),
        (4, {"pipeline": 2}),
        (5, {"zero": 1}),
        (6, {"zero": 1, "native_step": True}),
        (7, {"zero": 1, "native_step": True}),
    ],
    4: [
        (8, {"zero": 1, "native_step": True}),
        (9, {"zero": 3, "tensor": 2}),
        (10, {"data": 2, "pipeline": 2, "zero": 1}),
    ],
}
MOVED = {"budget": "12steps", "model": MODEL}


def config(root, name, **changes):
    settings = {"budget": f"{STEPS}steps", "eval_interval": 0, "eval_tokens": 64, "sample_interval": 0}
    settings |= {"micro_batch_size": 2, "checkpoint_interval": 0}
    settings |= {"optimizer": AdamWConfig(lr=1e-2, eps=1e-4, max_grad_norm=0.3)}
    return tiny_run.config(root, name, **(settings | changes))


def alone(settings, until=-1):
    trained_layouts.stops["step"] = until
    return trained_layouts.Trainer(settings, display=tiny_run.quiet()).train()


def torchrun(root, processes, program, *arguments, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, f"--max-restarts={restarts}", str(pathlib.Path(__file__).with_name(program)), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)


def write_poisoned(root):
    """An export whose layer 1 has a weight that is not finite."""
    poisoned = root / "poisoned"
    poisoned.mkdir()
    for file in (root / "dense/export").iterdir():
        (poisoned / file.name).write_bytes(file.read_bytes())
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, -1] = torch.inf
    save_file(tensors, poisoned / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    tiny_run.write_data(root)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, settings in ALONE.items():
        alone(config(root, name, **settings))
    alone(config(root, "still", **MOVED))
    alone(config(root, "moved", **MOVED), until=1)
    torch.set_num_threads(before)
    write_poisoned(root)
    return root


def launched(root, processes):
    """What the processes say that train all of these."""
    arguments = []

    def add(name, of, layout, until=None, **changes):
        file = f"{name} {len(arguments)}.toml"
        config(root, of, parallel=ParallelConfig(**layout), **changes).save(root / file)
        arguments.append(file if until is None else f"{file}:{until}")

    for name, (of, layout, *more) in RUNS[processes].items():
        add(name, name, layout, **ALONE[of], **(more[0] if more else {}))
    for step, layout in MOVES[processes]:
        add("moved", "moved", layout, step, **MOVED)
    if processes == 2:
        for of, stages in COMPILED.items():
            for zero in stages:
                add(f"compiled {of} {zero}", f"compiled {of} {zero}", {"zero": zero}, **ALONE[of], compile=True)
        add("bad", "bad", {"tensor": 2}, init_from=root / "poisoned", **ALONE["dense"])
    done = torchrun(root, processes, "trained_layouts.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(root):
    return launched(root, 2)


@pytest.fixture(scope="module")
def four(root, two):
    return launched(root, 4)


def logits(sample):
    return [float(number) for number in sample["text"].split()]


def check_same(root, name, of):
    """Losses, clipped norms, validation, samples and weights, but for the order of sums."""
    found, wanted = (tiny_run.rows(root / run) for run in (name, of))
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    close = 2e-2 if of in ("low", "low but norms") else 1e-5
    for row, want in zip(found, wanted, strict=True):
        assert row == pytest.approx(want, rel=close, abs=close), (row, want)
    drawn, want = (json.loads((root / run / "samples.jsonl").read_text()) for run in (name, of))
    assert (drawn["step"], drawn["prompt"]) == (want["step"], "False")
    assert logits(drawn) == pytest.approx(logits(want), rel=10 * close, abs=10 * close)
    ours, theirs = (load_file(root / run / "export/model.safetensors") for run in (name, of))
    assert ours.keys() == theirs.keys()
    for key, want in theirs.items():
        torch.testing.assert_close(ours[key], want, rtol=close, atol=close, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", RUNS[2])
def test_two_ranks_train_as_one_process(root, two, name):
    check_same(root, name, RUNS[2][name][0])


@pytest.mark.parametrize("of", COMPILED)
def test_compiled_layers_are_the_same_in_every_stage_of_zero(root, two, of):
    """They round otherwise than those that are not compiled, and gathered weights are read as those that are cast."""
    first, *others = (f"compiled {of} {zero}" for zero in COMPILED[of])
    for name in others:
        check_same(root, name, first)


@pytest.mark.parametrize("name", RUNS[4])
def test_four_ranks_train_as_one_process(root, four, name):
    check_same(root, name, RUNS[4][name][0])


def test_the_layout_is_announced(two, four):
    assert "parameters on 2 x cpu, tensor 2, (float32)" in two
    assert "parameters on 4 x cpu, data 2, tensor 2, ZeRO-1, (float32)" in four


def test_a_run_that_a_signal_stops_is_no_failure_to_torchrun(two):
    """It would start the processes again."""
    assert re.findall(r"^moved \d+\.toml:\d+: (\d+)$", two, re.MULTILINE) == ["0"] * 2 * len(MOVES[2])


def test_each_rank_writes_what_it_alone_has(root, four):
    def tensors(name, kind):
        files = sorted((root / name / "checkpoints").iterdir())[-1].glob(f"{kind}*.safetensors")
        return {file.name: {n: t.shape for n, t in load_file(file).items()} for file in files}

    of_tensor = tensors("tensor", "model")
    assert list(of_tensor) == [f"model-0000{r}-of-00002.safetensors" for r in (0, 1)]
    first, second = (of_tensor[name] for name in sorted(of_tensor))
    assert first["embedding.weight"] == (tiny_run.VOCAB // 2 * 16,)
    assert "norm.weight" in first
    assert not [name for name in second if "norm" in name]
    first, second = (tensors("1f1b", "model")[f"model-0000{r}-of-00002.safetensors"] for r in (0, 1))
    assert "embedding.weight" not in second
    assert {name.split(".")[1] for name in second if name.startswith("layers")} == {"1"}
    assert len(tensors("data x tensor", "model")) == 2  # of one of the ranks that hold alike
    assert len(tensors("data x tensor", "optimizer")) == 4


def test_a_run_goes_from_layout_to_layout(root, four):
    """From one process through nine layouts, and back."""
    assert alone(config(root, "moved", **MOVED)).step == 12
    check_same(root, "moved", "still")


def test_what_is_not_finite_is_named_in_the_whole_model(root, two):
    failure = json.loads((root / "bad/failure.json").read_text())
    assert failure["error"] == "NonFiniteError"
    assert "the parameter layers.1.mlp.down_proj.weight on rank 0" in failure["message"]


def test_torchrun_goes_on_as_if_no_rank_had_died(root):
    """Rank 1, which has half of every matrix, is killed in step 6; torchrun starts both again."""
    survived = config(root, "survived", **(MOVED | {"checkpoint_interval": 4}))
    survived.save(root / "survived.toml")
    options = ["--config", "survived.toml", "--parallel.tensor", "2", "--sample-interval", "0"]
    done = torchrun(root, 2, "faulty_training.py", *options, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert "continuing after step 4" in done.stdout
    losses = [tiny_run.rows(root / run, of="train/loss") for run in ("survived", "still")]
    for row, want in zip(*losses, strict=True):
        assert row == pytest.approx(want, rel=1e-5)


def layout(**sizes):
    return {"data": 1, "pipeline": 1, "context": 1, "expert": 1, "tensor": 1} | sizes


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"tensor": 4}, {}, "num_kv_heads 2 / 4 = 0.5"),
        ({"tensor": 2}, {"model": replace(MODEL, vocab_size=33)}, "vocab_size 33 / 2 = 16.5: pad it to 34"),
        ({"tensor": 2}, {"model": replace(MODEL, d_ff=51)}, "d_ff 51 / 2 = 25.5"),
        ({"tensor": 2}, {"model": replace(MODEL, context_length=7)}, "7 tokens / 2 = 3.5"),
        ({"tensor": 2, "context": 2}, {"model": replace(MODEL, context_length=12)}, None),
        ({"tensor": 2, "context": 4}, {"model": replace(MODEL, context_length=24)}, None),
        ({"tensor": 2}, {"model": MOE}, "mixture of experts"),
        ({"tensor": 2}, {"optimizer": MuonConfig()}, "splits every matrix, and muon needs whole ones"),
        ({"tensor": 2}, {"compile": True}, "leave it out"),
        ({"context": 3}, {}, "context_length 8 / 6 = 1.33333"),
        ({"context": 3}, {"parallel": ParallelConfig(attention="all_to_all")}, "num_heads 4 / 3 = 1.33333"),
        ({"expert": 2}, {}, "has no mixtures of experts"),
        ({"expert": 3}, {"model": MOE}, "4 / 3 = 1.33333"),
        ({"expert": 2}, {"model": MOE, "parallel": ParallelConfig(zero=1)}, "goes with zero = 0"),
        ({"expert": 2}, {"model": MOE, "optimizer": SOAPConfig()}, "soap"),
        ({"pipeline": 3}, {}, "2 layers cannot be 3 stages"),
        ({"pipeline": 2}, {"parallel": ParallelConfig(zero=2)}, "goes with zero = 0 or 1"),
        ({"pipeline": 2}, {"model": MOE}, "stays on their stage"),
        ({"pipeline": 2}, {"objective": NextToken(z_loss=1e-4)}, None),
        ({"pipeline": 2, "context": 2}, {}, "do not go together"),
        ({"data": 2}, {"optimizer": MuonConfig(), "parallel": ParallelConfig(zero=2)}, "use zero = 1"),
        ({"data": 2}, {"parallel": ParallelConfig(native_step=True)}, "which is zero = 1, and zero is 0"),
        ({"data": 2, "tensor": 2}, {"parallel": replace(NATIVE, tensor=2)}, "data parallel alone, and tensor is 2"),
        ({"data": 2}, {"optimizer": MuonConfig(), "parallel": NATIVE}, "steps AdamW, and optimizer.kind is muon"),
        ({"data": 2}, {"optimizer": AdamWConfig(state_dtype="bfloat16"), "parallel": NATIVE}, "moments in float32"),
        ({"data": 2}, {"guard": GuardConfig(non_finite="skip"), "parallel": NATIVE}, "has no gradients left"),
        ({}, {"optimizer": MuonConfig(), "parallel": NATIVE}, None),
        ({}, {"optimizer": MuonConfig(), "parallel": ParallelConfig(zero=2)}, None),
    ],
)
def test_what_is_refused(tmp_path, sizes, changes, message):
    reason = why_not(config(tmp_path, "refused", **({"model": MODEL} | changes)), layout(**sizes))
    assert reason is None if message is None else message in reason


def test_one_process_says_that_it_has_no_native_step(tmp_path, capsys):
    settings = config(tmp_path, "one", parallel=NATIVE, budget="1steps")
    Trainer(settings, display=Display(Console(soft_wrap=True))).train()
    assert "parallel.native_step changes nothing here" in capsys.readouterr().out


def test_processes_and_rows_must_divide():
    config = ParallelConfig(tensor=2, expert=2)
    assert config.axes(8) == layout(data=2, expert=2, tensor=2)
    assert config.share(8, 12, 3) == 3
    with pytest.raises(ValueError, match="data 1 x expert 2 x tensor 2 = 4 processes, and torchrun started 6"):
        config.axes(6)
    with pytest.raises(ValueError, match=r"batch_size 6 over data 2 x expert 2 is 1.50 sequences a process"):
        config.share(8, 6, None)
    with pytest.raises(ValueError, match="pipeline must be at least 1, got 0"):
        ParallelConfig(pipeline=0)
