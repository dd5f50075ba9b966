"""`cs336 plan parallel`: how to split a training run over GPUs."""

from cs336.cli.common import Path


def parallel(
    model: Path,
    gpus: int,
    batch_size: int,
    gpu: str = "H200",
    context_length: int | None = None,
    network: str | None = None,
    efficiency: float | None = None,
    memory_gib: float | None = None,
    weight_bytes: int = 4,
    optimizer_bytes: float = 8,
    top: int = 10,
) -> None:
    """Rank every way to split a training run over GPUs by the time of a step that is predicted, and explain the first.

    Args:
        model: a TOML file with [model] or its fields, an export, a checkpoint or a run directory.
        gpus: how many there are.
        batch_size: sequences of a step, of all GPUs.
        gpu: A100, H100, H200 or B200.
        context_length: tokens of a sequence; the model's if left out.
        network: RANKS:GB/s[:us] for each tier, nearest first, in place of the GPU's: "8:360 1024:40".
        efficiency: the MFU of one GPU, as `cs336 bench train` measures it.
        memory_gib: of a GPU.
        weight_bytes: of a weight and its gradient: 4 under autocast, 2 for a bfloat16 model.
        optimizer_bytes: a weight.
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
    plans = plan(
        read_config(model),
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
