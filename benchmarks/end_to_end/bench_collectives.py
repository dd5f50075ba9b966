"""torch.distributed's collectives, 1 MB to 1 GB: bus bandwidth, by nccl-tests' definition.

    cs336 bench collectives [all_reduce ...] [--processes N] [--from-mb 1] [--to-mb 1024] [--plot FILE] [--out FILE]

The bandwidth is S * factor / time, where S is what the table in cs336/parallel/collectives.py calls S (of gather, the
whole output) and the factor makes the numbers of different N comparable with the links' own. p2p: every rank sends to
the next. The time is that of the slowest rank. NCCL where there is a GPU for each process, gloo otherwise.
"""

import argparse
import datetime
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness, results
from cs336.cli.common import check_output
from cs336.parallel import collectives as c
from cs336.tokenizer.compare import plot_format

MB = 2**20
BLOCKS = 5
BLOCK_SECONDS = {"cuda": 0.01, "cpu": 0.05}


def whole(n: int) -> float:
    return 1.0


def once(n: int) -> float:
    return (n - 1) / n


def twice(n: int) -> float:
    return 2 * (n - 1) / n


def on_root(x: Tensor) -> Tensor | None:
    return x if dist.get_rank() == 0 else None


# name -> (the factor, the call on S bytes and on the N-th part of a tensor as large)
COLLECTIVES: dict[str, tuple[Callable[[int], float], Callable[[Tensor, Tensor], Any]]] = {
    "all_reduce": (twice, lambda x, part: c.all_reduce(x)),
    "reduce_scatter": (once, lambda x, part: c.reduce_scatter(part, x)),
    "all_gather": (once, lambda x, part: c.all_gather(x, part)),
    "all_to_all": (once, lambda x, part: c.all_to_all(torch.empty_like(x), x)),
    "broadcast": (whole, lambda x, part: c.broadcast(x, 0)),
    "reduce": (whole, lambda x, part: c.reduce(x, 0)),
    "gather": (once, lambda x, part: c.gather(on_root(x), part, 0)),
    "scatter": (once, lambda x, part: c.scatter(part, on_root(x), 0)),
    "p2p": (whole, lambda x, part: c.shift((x,))()),
}


def start(timeout_s: float = 300) -> torch.device:
    """Join the processes that torchrun started: this one's device."""
    rank, on_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() <= rank:
        raise RuntimeError(f"process {rank} has no GPU: torch sees {torch.cuda.device_count()}, start as many")
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    where = {"device_id": device} if on_gpus else {}
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timeout, **where)
    return device


def slowest(seconds: float, device: torch.device) -> float:
    """Of all ranks."""
    t = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return t.item()


def block(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of a call, of the slowest rank."""
    harness.synchronize(device)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    harness.synchronize(device)
    return slowest((time.perf_counter() - begin) / count, device)


def measure(name: str, size: int, device: torch.device) -> dict[str, Any]:
    """One row, for S = size bytes."""
    N = dist.get_world_size()
    factor, call = COLLECTIVES[name]
    x = torch.randn(N * max(1, size // (4 * N)), device=device)
    part = torch.randn(len(x) // N, device=device)
    once_s = min(block(lambda: call(x, part), 1, device) for _ in range(2))
    count = max(1, min(100, int(BLOCK_SECONDS[device.type] / once_s)))
    samples = [block(lambda: call(x, part), count, device) for _ in range(BLOCKS)]
    timing = harness.summary(samples, 1, "perf_counter")
    row = {"op": "collective", "variant": name, "processes": N, "backend": dist.get_backend(), "bytes": x.nbytes}
    row |= {"seconds": timing.seconds, "spread": round(timing.spread, 4)}
    return row | {"bus_gbps": round(x.nbytes * factor(N) / timing.seconds / 1e9, 2)}


def sizes(low_mb: float, high_mb: float) -> list[int]:
    """Powers of four times low_mb, and high_mb."""
    found, size = [], low_mb
    while size < high_mb:
        found.append(int(size * MB))
        size *= 4
    return [*found, int(high_mb * MB)]


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Bus bandwidth over size, a line a collective. Raises ImportError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'cs336[plot]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        axes.plot([row["bytes"] / MB for row in mine], [row["bus_gbps"] for row in mine], ".-", label=name)
    title = f"{rows[0]['processes']} processes, {rows[0]['backend']}"
    axes.set(xscale="log", xlabel="MiB", ylabel="bus bandwidth (GB/s)", title=title)
    axes.legend()
    figure.savefig(path)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("cs336 bench collectives", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="COLLECTIVE", help=f"of {', '.join(COLLECTIVES)}; all if none")
    parser.add_argument("--from-mb", type=float, default=1, help="smallest size, in 2**20 bytes (%(default)s)")
    parser.add_argument("--to-mb", type=float, default=1024, help="largest size (%(default)s)")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="a picture: png, svg, pdf")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in COLLECTIVES]:
        parser.error(f"no collective {', '.join(unknown)}: expected some of {', '.join(COLLECTIVES)}")
    if not 0 < options.from_mb <= options.to_mb:
        parser.error(f"sizes must rise from above 0, got {options.from_mb} to {options.to_mb}")
    try:
        for path in (options.out, options.plot):
            check_output(path)
        if options.plot:
            plot_format(options.plot)
    except ValueError as error:
        parser.error(str(error))
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'cs336[plot]'")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    device = start()
    rows = []
    for name in options.names or COLLECTIVES:
        for size in sizes(options.from_mb, options.to_mb):
            rows.append(row := measure(name, size, device))
            if dist.get_rank() == 0:
                shown = f"{row['bytes'] / MB:9.2f} MiB  {1e6 * row['seconds']:11.1f} us  {row['bus_gbps']:8.2f} GB/s"
                print(f"{name:15} {shown} on the bus", flush=True)
    if dist.get_rank() == 0:
        if options.out:
            header = results.header(device, f"cs336 bench collectives --processes {dist.get_world_size()}")
            results.write(options.out, "collectives", header, rows)
        if options.plot:
            draw(rows, options.plot)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
