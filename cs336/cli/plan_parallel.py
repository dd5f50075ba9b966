"""`cs336 plan parallel`: how to split a training run over GPUs."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from cs336.cli.common import MaybePath, Path

if TYPE_CHECKING:
    from cs336.models import TransformerConfig
    from cs336.parallel import Plan
    from cs336.training import TrainConfig

TOKENS, RUN = "tokens/train", "runs/planned"  # of a run that names none
BATCH = ("batch_size", "micro_batch_size", "gradient_checkpointing")


def parallel(
    model: Path,
    gpus: int,
    batch_size: int | None = None,
    gpu: str = "H200",
    context_length: int | None = None,
    network: str | None = None,
    efficiency: float | None = None,
    memory_gib: float | None = None,
    weight_bytes: int = 4,
    optimizer_bytes: float = 8,
    write: MaybePath = None,
    top: int = 10,
) -> None:
    """Rank every way to split a training run over GPUs by the time of a step that is predicted, and explain the first.

    Args:
        model: a TOML file with [model] or its fields, an export, a checkpoint or a run directory.
        gpus: how many there are.
        batch_size: sequences of a step, of all GPUs; if left out that of the run's TOML file, or one a GPU.
        gpu: A100, H100, H200 or B200.
        context_length: tokens of a sequence; the model's if left out.
        network: RANKS:GB/s[:us] for each tier, nearest first, in place of the GPU's: "8:360 1024:40".
        efficiency: the MFU of one GPU, as `cs336 bench train` measures it.
        memory_gib: of a GPU.
        weight_bytes: of a weight and its gradient: 4 under autocast, 2 for a bfloat16 model.
        optimizer_bytes: a weight.
        write: a file for the first layout that `cs336 train` runs; the printed command adds data and run_dir.
        top: layouts to show.
    """
    from cs336.inference.load import read_config
    from cs336.parallel import hardware, plan
    from cs336.parallel.planner import table
    from cs336.utils.config import dumps

    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1], got {efficiency}")
    if memory_gib is not None and not memory_gib > 0:
        raise ValueError(f"memory_gib must be positive, got {memory_gib}")
    device = hardware.find(
        gpu,
        tiers=None if network is None else hardware.network(network),
        efficiency=efficiency,
        memory=None if memory_gib is None else int(memory_gib * hardware.GIB),
    )
    if write is not None and write.exists():
        raise ValueError(f"{write} exists: remove it, or write elsewhere")
    config = read_config(model)
    if batch_size is None:
        batch_size, whose = _batch_size(model, gpus)
        print(f"{batch_size:,} sequences a step, {whose}; --batch-size says others")
    plans = plan(
        config,
        gpus,
        gpu=device,
        batch_size=batch_size,
        context_length=context_length,
        weight_bytes=weight_bytes,
        optimizer_bytes=optimizer_bytes,
    )
    fits = sum(p.fits for p in plans)
    print(f"{len(plans):,} layouts of {gpus:,} {device.name}, {fits:,} fit; predicted, not measured\n")
    print(table(plans, top))
    print(f"\n{plans[0].explain()}")
    ready, refused = _first_trained(config, context_length, batch_size, plans)
    if refused:
        print(f"\n`cs336 train` does not run that: {refused}")
    if ready is None:
        return
    if write is not None:
        write.write_text(dumps(_settings(ready) | {"model": ready.model}), encoding="utf-8")
    start = _start(gpus, device.tiers[0].ranks)
    run = _run_table(model) if write is None else None
    if run is not None:
        print(f"\n{start} train --config {model}{_options(ready, run, context_length)}")
        return
    print(f"\n{start} train --config {write or 'run.toml'} --data.train {TOKENS} --run-dir {RUN}")
    print("with the model and" if write is None else f"{write} has", end=f"\n\n{dumps(_settings(ready))}")


def _batch_size(model: Path, gpus: int) -> tuple[int, str]:
    """Sequences of a step where none are given, and whose number that is."""
    from cs336.utils.config import read_table

    run = model if model.suffix == ".toml" else model / "config.toml"
    given = read_table(run).get("batch_size") if run.is_file() else None
    return (given, f"as {run} has them") if isinstance(given, int) else (gpus, "one a GPU")


def _first_trained(
    model: "TransformerConfig", context_length: int | None, batch_size: int, plans: "list[Plan]"
) -> "tuple[TrainConfig | None, str | None]":
    """The first plan as a run, and why it is not the first of all, if it is not."""
    from cs336.training import DataConfig, TrainConfig
    from cs336.training.division import why_not

    if context_length is not None:
        model = dataclasses.replace(model, context_length=context_length)
    refused: dict[object, str] = {}
    for layout in (p.layout for p in plans):
        parallel = layout.config
        if parallel in refused:
            continue
        config = TrainConfig(
            run_dir=Path(RUN),
            data=DataConfig(Path(TOKENS)),
            model=model,
            batch_size=batch_size,
            micro_batch_size=layout.micro_batch,
            gradient_checkpointing=layout.recompute,  # type: ignore[arg-type]
            parallel=parallel,
        )
        if reason := why_not(config, parallel.axes(layout.gpus)):
            refused[parallel] = reason
            continue
        return config, next(iter(refused.values()), None)
    return None, next(iter(refused.values()), None)


def _settings(config: "TrainConfig") -> dict[str, Any]:
    """What a plan says of a run: its batch and its split, as in a TOML file."""
    from cs336.parallel import ParallelConfig
    from cs336.utils.config import to_table

    table = to_table(config)
    split = {axis: table["parallel"][axis] for axis in _axes()}
    split = {axis: size for axis, size in split.items() if axis == "data" or size != getattr(ParallelConfig, axis)}
    return {key: table[key] for key in BATCH} | {"parallel": split}


def _axes() -> tuple[str, ...]:
    from cs336.parallel.layout import AXES

    return (*AXES, "zero")


def _run_table(path: Path) -> dict[str, Any] | None:
    """The TOML file of a run, with a model among other settings; None where `path` is none."""
    from cs336.utils.config import read_table

    table = read_table(path) if path.suffix == ".toml" else {}
    return table if "model" in table else None


def _options(config: "TrainConfig", run: dict[str, Any], context_length: int | None) -> str:
    """What a plan says of a run that is not in the run's file, and what that lacks to be started, as options."""
    planned = _settings(config)
    split = {axis: getattr(config.parallel, axis) for axis in _axes()}
    options = {key: planned[key] for key in BATCH if planned[key] != run.get(key)}
    if context_length not in (None, run["model"].get("context_length")):
        options["model.context_length"] = context_length
    there = run.get("parallel", {})
    said = {axis: size for axis, size in split.items() if axis in planned["parallel"] or axis in there}
    options |= {f"parallel.{axis}": size for axis, size in said.items() if size != there.get(axis)}
    if "train" not in run.get("data", {}):
        options["data.train"] = TOKENS
    if "run_dir" not in run:
        options["run_dir"] = RUN
    return "".join(f" --{key.replace('_', '-')} {value}" for key, value in options.items())


def _start(gpus: int, ranks: int) -> str:
    """What starts a program on all GPUs, with `ranks` of them in a host."""
    here = gpus if gpus <= ranks else math.gcd(gpus, ranks)
    hosts = f"--nnodes={gpus // here}" if gpus > here else "--standalone"
    return "cs336" if gpus == 1 else f"torchrun {hosts} --nproc_per_node={here} -m cs336"
