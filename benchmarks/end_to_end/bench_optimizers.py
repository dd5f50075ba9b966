"""Optimizers at equal time: the validation loss of each after as long as AdamW takes for so many steps.

    python -m benchmarks.end_to_end.bench_optimizers --data TOKENS [--steps 350] [--seeds 0 1 2] [--out FILE]

Each optimizer's learning rate is swept first, with the first seed; the best one runs with the others. What an optimizer
costs is in its number of steps: steps of it and of AdamW are timed in turn, in seconds of one CPU core, and the dearer
one makes fewer. TOKENS/train and TOKENS/val are made by `cs336 tokenizer encode --shards`; the model is quickstart's
smallest.
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

RATES = (1.5e-3, 3e-3, 6e-3)
OPTIMIZERS: dict[str, OptimizerConfig] = {"adamw": AdamWConfig(), "muon": MuonConfig(), "soap": SOAPConfig()}
CONTEXT, BATCH, TIMED = 256, 2, 20  # tokens, sequences a step, steps of each that are timed
VALIDATED = 400  # windows

Row = dict[str, Any]


def model(vocab_size: int) -> TransformerConfig:
    return TransformerConfig(vocab_size, CONTEXT, 3, 96, 3, tie_embeddings=True, init_std=0.061)


def configured(data: pathlib.Path, optimizer: OptimizerConfig, seed: int) -> tuple[Learner, TokenLoader]:
    train = TokenDataset(data / "train", CONTEXT)
    assert train.meta is not None
    config = TrainConfig(
        pathlib.Path("unused"),
        DataConfig(data / "train", data / "val"),
        model(-(-train.meta.vocab_size // 64) * 64),
        optimizer=optimizer,
        batch_size=BATCH,
        seed=seed,
        device="cpu",
    )
    return Learner(config), TokenLoader(train, BATCH, seed=seed)


def relative_cost(data: pathlib.Path, optimizer: OptimizerConfig) -> float:
    """Processor time of its step over that of AdamW's: medians of steps made in turn, means for SOAP's rare bases."""
    if optimizer.kind == "adamw":
        return 1.0
    pair = [configured(data, config, 0) for config in (AdamWConfig(), optimizer)]
    seconds: list[list[float]] = [[], []]
    for _ in range(2 + TIMED):
        for times, (learner, loader) in zip(seconds, pair, strict=True):
            batch, start = next(loader), time.process_time()
            learner.update(batch, lr=1e-4)
            times.append(time.process_time() - start)
    middle = statistics.mean if optimizer.kind == "soap" else statistics.median
    adamw, other = (middle(times[2:]) for times in seconds)
    return other / adamw


def learn(data: pathlib.Path, optimizer: OptimizerConfig, seed: int, steps: int) -> Row:
    """One run."""
    learner, loader = configured(data, optimizer, seed)
    config, schedule = learner.config, CosineConfig()
    for step in range(steps):
        learner.update(next(loader), schedule.lr(step + 1, steps, optimizer.lr))
    val = TokenDataset(data / "val", CONTEXT, vocab_size=config.model.vocab_size)
    with learner.evaluating():
        loss = mean_loss(learner.terms, val, min(VALIDATED, len(val)), 8, learner.device)
    row = {
        "op": "optimizers",
        "optimizer": optimizer.kind,
        "lr": optimizer.lr,
        "seed": seed,
        "parameters": config.model.num_parameters(),
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "val_loss": round(loss, 4),
    }
    print(
        f"{optimizer.kind:6} lr {optimizer.lr:<7g} seed {seed}  {steps:6,} steps  validation loss {loss:.4f}",
        flush=True,
    )
    return row


def compare(data: pathlib.Path, names: list[str], seeds: list[int], steps: int) -> list[Row]:
    """The sweep with the first seed, then the best learning rate with the others."""
    rows: list[Row] = []
    for name in names:
        cost = relative_cost(data, OPTIMIZERS[name])
        fit = max(2, int(steps / cost))
        print(f"{name}: a step costs {cost:.3f} of AdamW's", flush=True)
        swept = [learn(data, dataclasses.replace(OPTIMIZERS[name], lr=lr), seeds[0], fit) for lr in RATES]
        best = min(swept, key=lambda row: row["val_loss"])["lr"]
        others = [learn(data, dataclasses.replace(OPTIMIZERS[name], lr=best), seed, fit) for seed in seeds[1:]]
        rows += [row | {"cost": round(cost, 3)} for row in swept + others]
        losses = [row["val_loss"] for row in swept + others if row["lr"] == best]
        print(f"{name}: lr {best:g}, {statistics.mean(losses):.4f} over {len(losses)} seeds", flush=True)
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_optimizers", description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="a directory with train and val shards")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=350, help="of AdamW (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = compare(options.data, options.optimizers, options.seeds, options.steps)
    if options.out:
        command = f"python -m benchmarks.end_to_end.bench_optimizers --data TOKENS --steps {options.steps}"
        results.write(options.out, "optimizers", results.cpu_header(command), rows)
    return 0


def bench_optimizers(benchmark):
    from cs336.data import ShardWriter

    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder)
        for side in ("train", "val"):
            with ShardWriter(data / side, vocab_size=64, tokenizer="t", eot_id=0) as writer:
                writer.write(torch.randint(64, (3000,)).numpy())
        options = ["--data", folder, "--steps", "3", "--seeds", "0", "--optimizers", *OPTIMIZERS]
        assert benchmark.pedantic(main, (options,)) == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
