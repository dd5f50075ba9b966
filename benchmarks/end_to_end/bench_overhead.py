"""What `cs336 train` takes beside its steps: data, logging, validations, checkpoints; and how long the GPU waits.

    python -m benchmarks.end_to_end.bench_overhead [124M] [--steps 240] [--out FILE]

A run of so many steps, of noise, which validates and saves twice on its way. Then steps of the same learner on one
batch that lies on the device: what they take is what the run's own steps should. What validations and checkpoints took,
the first of each and the next ones, is also told as parts of a run of 8 minutes at its defaults, which validates 20
times, saves 10 times, and waits for the last checkpoint to be written: one more that is waited for says how long. A
trace of steps with their data says how long the GPU had nothing to do.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, results
from benchmarks.end_to_end.bench_train import BATCH, MODELS, zipf_tokens
from cs336.training import DataConfig, TrainConfig, Trainer, checkpoint
from cs336.training.decisions import CHECKPOINTS
from cs336.training.evaluators import EVALS
from cs336.training.metrics import Display
from cs336.training.staging import Staging
from profiling.idle import gpu_idle

UNTIMED = 20  # first steps: they compile, and are captured
BARE, TRACED = 4, 5  # blocks of UNTIMED steps each; steps
MINUTES = 8

Row = dict[str, Any]


def measure(name: str, steps: int, folder: pathlib.Path, *, compile: bool | None = None) -> Row:
    model, batch_size = MODELS[name], BATCH[name]
    tokens = [
        zipf_tokens(folder / f"{n}.bin", model.vocab_size, size) for n, size in (("train", 1 << 22), ("val", 1 << 20))
    ]
    half = -(-steps // 2)  # so that there are two, the one at the end included
    pace = {"budget": f"{steps}steps", "eval_interval": half, "checkpoint_interval": half}
    config = TrainConfig(folder / "run", DataConfig(*tokens), model, batch_size=batch_size, compile=compile, **pace)
    trainer = Trainer(config, display=Display(silent=True))
    found = trainer.train()
    spent = own_steps(config.run_dir, trainer.tokens_per_step)
    learner, batch = trainer.learner, trainer.loader.batch(0)

    def bare() -> float:
        harness.synchronize(learner.device)
        start = time.perf_counter()
        for _ in range(UNTIMED):
            learner.update(batch, lr=0.0)
        harness.synchronize(learner.device)
        return (time.perf_counter() - start) / UNTIMED

    least = statistics.median([bare() for _ in range(1 + BARE)][1:])
    taken = {pause.name: pause.taken for pause in trainer.decisions.pauses}
    (first_validation, validation), (first_save, save) = taken["validate"], taken["checkpoint"]
    staging = Staging()
    kept = checkpoint.snapshot(learner.model, learner.optimizer, found.step, staging=staging)
    start = time.perf_counter()
    checkpoint.begin(folder / "last")
    checkpoint.finish(folder / "last", kept, [checkpoint.write_files(folder / "last", kept)])
    written = time.perf_counter() - start
    staging.free()
    run = 60 * MINUTES
    return {
        "op": "overhead",
        "model": name,
        "shape": [batch_size, model.context_length],
        "step_seconds": least,
        "run_step_seconds": spent,
        "data_and_logging": round(spent / least - 1, 4),
        "validation_seconds": [round(first_validation, 4), round(validation, 4)],
        "checkpoint_seconds": [round(first_save, 4), round(save, 4)],
        "written_seconds": round(written, 4),
        "validations": round((first_validation + (EVALS - 1) * validation) / run, 6),
        "checkpoints": round((first_save + (CHECKPOINTS - 1) * save + written) / run, 6),
        "idle": idle(trainer, folder / "trace.json"),
    }


def own_steps(run_dir: pathlib.Path, tokens_per_step: int) -> float:
    """Seconds a step, of the rows behind the first steps: what each says of the time since the one before."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["train/tok_per_sec"] for row in rows if "train/tok_per_sec" in row and row["step"] > UNTIMED]
    return statistics.mean(tokens_per_step / speed for speed in speeds)


def idle(trainer: Trainer, trace: pathlib.Path) -> float | None:
    """The GPU's part of the time of some steps with their data; None without one."""
    learner = trainer.learner
    if learner.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(TRACED):
            learner.update(next(trainer.loader), lr=0.0)
        torch.cuda.synchronize()
    found.export_chrome_trace(str(trace))
    share = gpu_idle(trace)
    return None if share is None else round(share, 4)


def line(row: Row) -> str:
    waits = "" if row["idle"] is None else f"; the GPU waits {row['idle']:.2%}"
    steps = f"a step {1e3 * row['step_seconds']:.2f} ms, in the run {1e3 * row['run_step_seconds']:.2f}"
    seconds = {name: "{:.2f} s, then {:.2f}".format(*row[f"{name}_seconds"]) for name in ("validation", "checkpoint")}
    pauses = f"the first validation {seconds['validation']}, checkpoint {seconds['checkpoint']}"
    pauses += f", {row['written_seconds']:.2f} until the last is written"
    parts = f"{row['validations']:.2%} and {row['checkpoints']:.2%} of {MINUTES} min"
    return f"{row['model']}: {steps} ({row['data_and_logging']:+.2%}); {pauses}: {parts}{waits}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_overhead", description=__doc__)
    parser.add_argument("model", nargs="?", default="124M", choices=MODELS)
    parser.add_argument("--steps", type=int, default=240, help="of the run (%(default)s)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the row into")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    options = parser.parse_args(argv)
    if options.steps < 2 * UNTIMED:
        parser.error(f"--steps must be {2 * UNTIMED} or more, for the first {UNTIMED} are not timed")
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options.model, options.steps, pathlib.Path(folder), compile=False if options.no_compile else None)
    print(line(row), flush=True)
    if options.out:
        command = f"python -m benchmarks.end_to_end.bench_overhead {options.model} --steps {options.steps}"
        command += " --no-compile" * options.no_compile
        header = results.header(harness.default_device(), command, options.commit, roofs=False)
        results.write(options.out, "overhead", header, [row])
    return 0


def bench_overhead(benchmark):
    assert benchmark.pedantic(main, (["tiny", "--steps", "40"],)) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
