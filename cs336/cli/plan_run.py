"""`cs336 plan run`: what to train, from data, hardware and time or money."""

from cs336.cli.common import MaybePath, Path

RUN_DIR = Path("runs/planned")


def run(
    tokens: float | None = None,
    data: MaybePath = None,
    val: MaybePath = None,
    time: str | None = None,
    dollars: float | None = None,
    dollars_per_gpu_hour: float | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    efficiency: float | None = None,
    inference_tokens: float = 0.0,
    vocab_size: int | None = None,
    context_length: int = 2048,
    law: MaybePath = None,
    write: MaybePath = None,
    run_dir: Path = RUN_DIR,
    top: int = 8,
) -> None:
    """Choose a model, its tokens, batch, learning rate and layout, and predict loss, hours and memory.

    Say --tokens or --data, and --time or --dollars. Sizes of model are ranked by the loss that a scaling law predicts.

    Args:
        tokens: unique tokens there are: 1.56e11.
        data: a directory of token shards, which says its tokens and vocabulary.
        val: token shards for validation, for --write.
        time: of all GPUs: 14d, 36h, 90m.
        dollars: in its place, with --dollars-per-gpu-hour.
        gpu: A100, H100, H200 or B200; this machine is measured if left out.
        gpus: how many; with --gpu 1, here all there are.
        efficiency: the MFU of one GPU, as `cs336 bench train` measures it.
        inference_tokens: tokens that the model will serve on the same GPUs, out of the same time.
        vocab_size: of the tokenizer, 32,768 if neither this nor --data says it.
        context_length: tokens of a sequence.
        law: what `cs336 scaling fit --out` wrote, in place of the published law of arXiv:2404.10102.
        write: a configuration for `cs336 train --config`.
        run_dir: where that run writes.
        top: alternatives to show.
    """
    import dataclasses
    import math
    import warnings

    from cs336.parallel import hardware
    from cs336.scaling import EPOCH_FIT
    from cs336.scaling.hardware import Hardware, measure
    from cs336.scaling.run_plan import caution, explain, plan_run, table
    from cs336.scaling.saved import load_fit
    from cs336.utils.shards import read_meta

    if (tokens is None) == (data is None):
        raise ValueError("say how much data there is: --tokens 1.56e11, or --data with a directory of token shards")
    if write is not None and write.exists():
        raise ValueError(f"{write} exists: remove it, or write elsewhere")
    if top < 1:
        raise ValueError(f"top must be 1 or more, got {top}")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1], got {efficiency}")
    fit = EPOCH_FIT if law is None else load_fit(law)
    if not fit.resampled:
        raise ValueError(f"{law} has no resampled laws, which intervals come from: fit it with --bootstrap 400")
    meta = None if data is None else read_meta(data)
    # Before anything is measured, which takes seconds; their number may be known only then.
    _seconds(time, dollars, dollars_per_gpu_hour, 1)
    found = measure() if gpu is None else Hardware(hardware.find(gpu), 1, 2)
    device = found.gpu if efficiency is None else dataclasses.replace(found.gpu, efficiency=efficiency)
    count = found.count if gpus is None else gpus
    if gpu is None and gpus is not None and gpus > found.count:
        raise ValueError(f"{found.count} of {device.name} are here, not {gpus}: name the GPU with --gpu")
    if count < 1:
        raise ValueError(f"gpus must be 1 or more, got {count}")
    plans = plan_run(
        meta.tokens if meta else tokens or 0.0,
        _seconds(time, dollars, dollars_per_gpu_hour, count),
        gpus=count,
        gpu=device,
        inference_tokens=inference_tokens,
        vocab_size=vocab_size or (meta.vocab_size if meta else 32_768),
        context_length=context_length,
        compute_bytes=found.compute_bytes,
        fit=fit,
    )
    print(
        f"{count} x {device.name} at {100 * device.efficiency:.0f} % of {device.flops:.3g} FLOP/s; predicted, not run\n"
    )
    print(explain(plans[0]))
    print(f"\n{table(plans[:top])}")
    if law is None and (doubt := caution(plans[0])):
        warnings.warn(doubt, stacklevel=1)
    if write is not None:
        plans[0].config(run_dir, data or Path("tokens/train"), val).save(write)
        ranks = device.tiers[0].ranks  # of a host
        here = count if count <= ranks else math.gcd(count, ranks)
        hosts = f" --nnodes={count // here}" if count > here else ""
        start = "cs336" if count == 1 else f"torchrun{hosts} --nproc_per_node={here} -m cs336"
        print(f"\n{start} train --config {write}")


def _seconds(time: str | None, dollars: float | None, price: float | None, gpus: int) -> float:
    """What time or money is of all GPUs together."""
    from cs336.training.budget import Budget

    if (time is None) == (dollars is None) or (dollars is None) != (price is None):
        raise ValueError("say --time 14d, or --dollars 20000 --dollars-per-gpu-hour 2.5")
    if time is not None:
        budget = Budget.parse(time)
        if budget.kind != "seconds":
            raise ValueError(f"time must be like 14d, 36h or 90m, got {time!r}")
        return budget.amount
    assert dollars is not None
    assert price is not None
    if not (0 < dollars < float("inf") and 0 < price < float("inf")):
        raise ValueError(f"dollars and their price must be positive and finite, got {dollars} and {price}")
    return 3600 * dollars / price / gpus
