"""Optimizers at equal time: the validation loss that each reaches in so many seconds of one CPU core.

    python -m benchmarks.end_to_end.bench_optimizers --data TOKENS [--seconds 60] [--seeds 0 1 2] [--out FILE]

Each optimizer's learning rate is swept first, with the first seed; the best one runs with the others. What an optimizer
costs is in its number of steps: a step is timed, and the schedule ends with the time. Seconds are of the processor, so
that what else runs on the machine does not count. TOKENS/train and TOKENS/val are made by `cs336 tokenizer encode
--shards`; the model is quickstart's smallest.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from benchmarks import results
from cs336.data import TokenDataset, TokenLoader
from cs336.models import TransformerConfig
from cs336.optim import AdamWConfig, CosineConfig, MuonConfig, OptimizerConfig, SOAPConfig
from cs336.training import DataConfig, TrainConfig
from cs336.training.evaluators import mean_loss
from cs336.training.learner import Learner

OPTIMIZERS: dict[str, tuple[OptimizerConfig, tuple[float, ...]]] = {
    "adamw": (AdamWConfig(), (3e-3, 6e-3, 1.2e-2)),
    "muon": (MuonConfig(), (3e-3, 6e-3, 1.2e-2)),
    "soap": (SOAPConfig(), (3e-3, 6e-3, 1.2e-2)),
}
CONTEXT, BATCH, TIMED = 256, 2, 12  # tokens, sequences a step, steps that are timed
VALIDATED = 400  # windows

Row = dict[str, Any]


def model(vocab_size: int) -> TransformerConfig:
    return TransformerConfig(vocab_size, CONTEXT, 3, 96, 3, tie_embeddings=True, init_std=0.061)


def learn(data: pathlib.Path, optimizer: OptimizerConfig, seed: int, seconds: float) -> Row:
    """One run: how many steps fit, and where they lead."""
    train = TokenDataset(data / "train", CONTEXT)
    assert train.meta is not None
    vocab_size = -(-train.meta.vocab_size // 64) * 64
    config = TrainConfig(
        pathlib.Path("unused"),
        DataConfig(data / "train"),
        model(vocab_size),
        optimizer=optimizer,
        batch_size=BATCH,
        seed=seed,
        device="cpu",
    )
    step_seconds = time_step(Learner(config), TokenLoader(train, BATCH, seed=seed))
    total = int(seconds / step_seconds)
    learner, loader, schedule = Learner(config), TokenLoader(train, BATCH, seed=seed), CosineConfig()
    start = time.process_time()
    for step in range(total):
        learner.update(next(loader), schedule.lr(step + 1, total, optimizer.lr))
    spent = time.process_time() - start
    with learner.evaluating():
        val = TokenDataset(data / "val", CONTEXT, vocab_size=vocab_size)
        loss = mean_loss(learner.terms, val, min(VALIDATED, len(val)), 8, learner.device)
    return {
        "op": "optimizers",
        "optimizer": optimizer.kind,
        "lr": optimizer.lr,
        "seed": seed,
        "parameters": config.model.num_parameters(),
        "steps": total,
        "tokens": total * BATCH * CONTEXT,
        "seconds": round(spent, 1),
        "val_loss": round(loss, 4),
    }


def time_step(learner: Learner, loader: TokenLoader) -> float:
    """Processor seconds of a step, the median; SOAP's eigenbases are seldom, and count with the mean."""
    times = []
    for _ in range(2 + TIMED):
        batch, start = next(loader), time.process_time()
        learner.update(batch, lr=1e-4)
        times.append(time.process_time() - start)
    timed = times[2:]
    return statistics.mean(timed) if learner.config.optimizer.kind == "soap" else statistics.median(timed)


def compare(data: pathlib.Path, names: list[str], seeds: list[int], seconds: float) -> list[Row]:
    """The sweep with the first seed, then the best learning rate with the others; the lines are printed as they come."""
    rows: list[Row] = []
    for name in names:
        optimizer, rates = OPTIMIZERS[name]
        swept = [run(data, dataclasses.replace(optimizer, lr=lr), seeds[0], seconds) for lr in rates]
        best = min(swept, key=lambda row: row["val_loss"])["lr"]
        others = [run(data, dataclasses.replace(optimizer, lr=best), seed, seconds) for seed in seeds[1:]]
        rows += swept + others
        losses = [row["val_loss"] for row in swept + others if row["lr"] == best]
        print(f"{name}: lr {best:g}, {statistics.mean(losses):.4f} over {len(losses)} seeds", flush=True)
    return rows


def run(data: pathlib.Path, optimizer: OptimizerConfig, seed: int, seconds: float) -> Row:
    row = learn(data, optimizer, seed, seconds)
    print(
        f"{row['optimizer']:6} lr {row['lr']:<7g} seed {seed}  {row['steps']:6,} steps in {row['seconds']:6.1f} s  "
        f"validation loss {row['val_loss']:.4f}",
        flush=True,
    )
    return row


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_optimizers", description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="a directory with train and val shards")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], choices=OPTIMIZERS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a processor, a run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = compare(options.data, options.optimizers, options.seeds, options.seconds)
    if options.out:
        command = f"python -m benchmarks.end_to_end.bench_optimizers --data TOKENS --seconds {options.seconds:g}"
        results.write(options.out, "optimizers", results.header(torch.device("cpu"), command), rows)
    return 0


def bench_optimizers(benchmark):
    from cs336.data import ShardWriter

    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder)
        for side in ("train", "val"):
            with ShardWriter(data / side, vocab_size=64, tokenizer="t", eot_id=0) as writer:
                writer.write(torch.randint(64, (3000,)).numpy())
        options = ["--data", folder, "--seconds", "0.3", "--seeds", "0", "--optimizers", *OPTIMIZERS]
        assert benchmark.pedantic(main, (options,)) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
