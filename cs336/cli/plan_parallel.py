"""`cs336 plan parallel`: how to split a training run over GPUs."""

import dataclasses
import math
from typing import TYPE_CHECKING

from cs336.cli.common import MaybePath, Path

if TYPE_CHECKING:
    from cs336.models import TransformerConfig
    from cs336.parallel import Plan
    from cs336.training import TrainConfig


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
        write.write_text(_text(ready, with_model=True), encoding="utf-8")
    print(f"\n{_command(gpus, device.tiers[0].ranks, write or Path('run.toml'))}")
    print("with" if write is None else f"{write} has", end=f"\n\n{_text(ready, with_model=False)}")


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
            run_dir=Path("runs/planned"),
            data=DataConfig(Path("tokens/train")),
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


def _text(config: "TrainConfig", *, with_model: bool) -> str:
    """What a plan says of a run, as TOML."""
    from cs336.parallel import ParallelConfig
    from cs336.parallel.layout import AXES
    from cs336.utils.config import dumps, to_table

    table = to_table(config)
    keys = ("batch_size", "micro_batch_size", "gradient_checkpointing", *(("model",) if with_model else ()))
    axes = {axis: size for axis, size in table["parallel"].items() if axis in (*AXES, "zero")}
    split = {axis: size for axis, size in axes.items() if axis == "data" or size != getattr(ParallelConfig, axis)}
    return dumps({key: table[key] for key in keys} | {"parallel": split})


def _command(gpus: int, ranks: int, path: Path) -> str:
    """What starts the run, with `ranks` GPUs in a host."""
    here = gpus if gpus <= ranks else math.gcd(gpus, ranks)
    hosts = f"--nnodes={gpus // here}" if gpus > here else "--standalone"
    start = "cs336" if gpus == 1 else f"torchrun {hosts} --nproc_per_node={here} -m cs336"
    return f"{start} train --config {path} --data.train tokens/train --run-dir runs/planned"
