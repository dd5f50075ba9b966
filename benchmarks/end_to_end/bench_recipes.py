"""Recipes in equal time: our best one and a GPT-2 as it was published, each at the best of its swept learning rates.

    python -m benchmarks.end_to_end.bench_recipes --data TOKENS [--seconds 480] [--beside] [--out FILE]

A run is `cs336 train --config recipes/books/NAME.toml` under a budget of seconds, in a process of its own. First all
recipes at all rates, beside each other, for --sweep seconds each; then each recipe at its best rate for --seconds, as
many at once as there are GPUs or, with --beside, all at once. Runs are dealt out to the GPUs in turn, and those of one
share it. Time is all time: compilation and validations too. OUT.partial.json is written after each run, and --out at
the end. --seconds 0 ends after the sweep. --rates best=3e-3 gpt2=6e-4 are used instead of the sweep's; several of a
recipe are swept. TOKENS/train and TOKENS/val are made by `cs336 tokenizer encode --shards`, here of GPT-2's vocabulary.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import harness, results
from cs336.training import TrainConfig, Trainer
from cs336.training.metrics import Display
from cs336.utils import config as configs
from cs336.utils.gpus import visible_gpu

Row = dict[str, Any]
Pool = Callable[[int], Executor]  # of so many processes
Keep = Callable[[list[Row]], None]  # called with all rows that there are, after each

RATES = {"best": (1e-3, 2e-3, 4e-3), "gpt2": (3e-4, 6e-4, 1.2e-3)}
"""Swept, by the recipe's name."""


def recipe(name: str, data: pathlib.Path, **settings: Any) -> TrainConfig:
    """recipes/books/NAME.toml on the data's shards, with other settings than its own where some are given."""
    table = configs.read_table(results.ROOT / f"recipes/books/{name}.toml")
    given = {"run_dir": "unused", "data": {"train": str(data / "train"), "val": str(data / "val")}}
    return TrainConfig.from_table({**table, **given, **settings})


def separate(processes: int) -> Executor:
    """Each run begins in a new one, so that nothing of one is another's."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def learn(name: str, config: TrainConfig, share: int, gpu: int | None = None) -> Row:
    """One run, which has 1 / share of the GPU, the one of that number if one is given: in a process that has not looked
    for GPUs yet."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(gpu)
    trainer = Trainer(config, display=Display(silent=True))
    found, model, peak = trainer.train(), config.model, trainer.learner.peak_flops
    speed = found.tokens / found.seconds
    return {
        "op": "recipes",
        "recipe": name,
        "lr": config.optimizer.lr,
        "share_of_gpu": f"1/{share}",
        "parameters": model.num_parameters(),
        "batch_size": config.batch_size,
        "budget": config.budget,
        "seconds": round(found.seconds, 2),
        "steps": found.step,
        "tokens": found.tokens,
        "tokens_per_second": round(speed, 1),
        "mfu": round(100 * speed * model.flops_per_token() / peak, 2) if peak else None,
        "val_loss": round(found.val["val/loss"], 4),
        "curve": curve(config.run_dir),
    } | ({"val_bpb": round(found.val["val/bpb"], 4)} if "val/bpb" in found.val else {})


def curve(run_dir: pathlib.Path) -> list[tuple[float, float]]:
    """Seconds and loss of each validation."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(round(row["seconds"], 1), round(row["val/loss"], 4)) for row in rows if "val/loss" in row]


def race(entries: Sequence[tuple[str, TrainConfig]], beside: bool, gpus: int, pool: Pool) -> Iterator[Row]:
    """Every entry, all beside each other or as many at once as there are GPUs; a row each when it is there.

    gpus: none on a CPU, which counts as one device.
    """
    devices = max(gpus, 1)
    at_once = len(entries) if beside else min(devices, len(entries))
    for first in range(0, len(entries), at_once):
        group = entries[first : first + at_once]
        with pool(len(group)) as executor:
            runs = []
            for i, (name, config) in enumerate(group):
                share = len(range(i % devices, len(group), devices))
                runs.append(executor.submit(learn, name, config, share, i % devices if gpus > 1 else None))
            for run in runs:
                print(line(run.result()), flush=True)
                yield run.result()


def compare(
    recipes: Mapping[str, TrainConfig],
    rates: Mapping[str, Sequence[float]],
    directory: pathlib.Path,
    *,
    sweep: float,
    seconds: float,
    beside: bool,
    gpus: int,
    pool: Pool,
    keep: Keep,
) -> list[Row]:
    """The sweep's rows, then those of the best rates, or of the only ones there are. A run is in the directory of its
    recipe, rate and stage: one that ended is not made again."""
    rows: list[Row] = []

    def entry(name: str, lr: float, stage: str, budget: float) -> tuple[str, TrainConfig]:
        config = recipes[name]
        optimizer = dataclasses.replace(config.optimizer, lr=lr)
        place = directory / f"{stage}-{name}-{lr:g}"
        return name, dataclasses.replace(config, optimizer=optimizer, budget=f"{budget:g}s", run_dir=place)

    def make(stage: str, budget: float, rates: Mapping[str, Sequence[float]], beside: bool) -> None:
        entries = [entry(name, lr, stage, budget) for name in recipes for lr in rates[name]]
        for row in race(entries, beside, gpus, pool):
            rows.append(row | {"stage": stage})
            keep(rows)

    if any(len(rates[name]) > 1 for name in recipes):
        make("sweep", sweep, rates, True)
        rates = {name: [min(of(rows, name), key=lambda row: row["val_loss"])["lr"]] for name in recipes}
    if seconds:
        make("run", seconds, rates, beside)
    return rows


def of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["recipe"] == name]


def line(row: Row) -> str:
    mfu = f" {row['mfu']:.1f} % MFU" if row["mfu"] else ""
    return (
        f"{row['recipe']:6} lr {row['lr']:<8g} {row['share_of_gpu']} of the device, {row['seconds']:7.1f} s "
        f"{row['steps']:6,} steps {row['tokens']:12,} tokens {row['tokens_per_second']:10,.0f} tokens/s{mfu}  "
        f"validation loss {row['val_loss']:.4f}"
    )


def rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in RATES:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(RATES)} before =, got {text!r}")
    return name, float(value)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_recipes", description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="a directory with train and val shards")
    parser.add_argument("--seconds", type=float, default=480, help="of each last run; 0: the sweep alone (%(default)s)")
    parser.add_argument("--sweep", type=float, default=120, help="seconds of each run of the sweep (%(default)s)")
    parser.add_argument("--beside", action="store_true", help="the last runs at once, however few GPUs there are")
    parser.add_argument(
        "--rates", type=rate, nargs="+", metavar="NAME=LR", help="only these; one of each needs no sweep"
    )
    parser.add_argument("--batch", type=int, help="sequences a step; the recipes' own")
    parser.add_argument("--no-compile", action="store_true", help="for runs that are shorter than it takes")
    parser.add_argument("--directory", type=pathlib.Path, help="of the runs; a temporary one")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    options = parser.parse_args(argv)
    rates = {n: [lr for name, lr in options.rates if name == n] for n, _ in options.rates} if options.rates else RATES
    if not options.seconds and all(len(of_name) == 1 for of_name in rates.values()):
        parser.error("one rate of each leaves the sweep out and --seconds 0 the last runs: nothing is left to do")
    settings = {"batch_size": options.batch} if options.batch else {}
    settings |= {"compile": False} if options.no_compile else {}
    header = results.header(harness.default_device(), command(options), options.commit, roofs=False)
    if (gpus := torch.cuda.device_count()) > 1:
        header["gpus"] = gpus

    def keep(rows: list[Row]) -> None:
        if options.out:  # beside a whole table that may be there, until this one is whole
            results.write(partial(options.out), "recipes", header, rows)

    with tempfile.TemporaryDirectory() as temporary:
        directory = options.directory or pathlib.Path(temporary)
        try:
            recipes = {name: recipe(name, options.data, **settings) for name in rates}
            how = {"sweep": options.sweep, "seconds": options.seconds, "beside": options.beside, "gpus": gpus}
            rows = compare(recipes, rates, directory, **how, pool=separate, keep=keep)
        except (ValueError, OSError) as error:
            raise SystemExit(f"bench_recipes: {error}") from None
    if options.out:
        results.write(options.out, "recipes", header, rows)
        partial(options.out).unlink()
    return 0


def partial(out: pathlib.Path) -> pathlib.Path:
    return out.with_suffix(".partial.json")


def command(options: argparse.Namespace) -> str:
    """What a reader would type."""
    words = ["--data TOKENS", f"--seconds {options.seconds:g}", f"--sweep {options.sweep:g}"]
    if options.rates:
        words += ["--rates", *(f"{name}={lr:g}" for name, lr in options.rates)]
    words += [f"--batch {options.batch}"] * bool(options.batch)
    words += ["--beside"] * options.beside + ["--no-compile"] * options.no_compile
    return " ".join(["python -m benchmarks.end_to_end.bench_recipes", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
