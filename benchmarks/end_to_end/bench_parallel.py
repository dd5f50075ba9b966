"""Training split over N processes, beside DDP + ZeroRedundancyOptimizer and FSDP2, with one command.

    cs336 bench parallel [step] [zero] [equal] [ring] [gpt] [plan] [large] [engine] [--processes N]
                         [--size full|tiny] [--out FILE]

    step    AdamW alone, where gradients are summed already: of 537M bfloat16 parameters, in flat buckets and without

    zero    a step of AdamW on 537M bfloat16 parameters (8 matrices of 8192 x 8192), 4096 rows a process: ours, the
            peers, and what computes alone: one process's forward and backward, and AdamW on 1/N of the parameters;
            and what torch.profiler says of messages that nothing hides
    equal   losses and gradients of a small model divided by data, tensor, pipeline, context and expert, against
            the whole model on one process, and weights after steps whose optimizer is divided
    ring    attention of 128 Ki and of 1 Mi tokens divided by a ring and by all-to-all, over 1/N of the time on one

and of parallel_runs.py whole models: gpt, plan, large, engine. A block of steps counts as long as on its slowest
rank; the median block counts.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import results
from benchmarks.end_to_end import parallel_runs
from benchmarks.end_to_end.bench_collectives import slowest, start
from benchmarks.end_to_end.equivalence import differences, steps_apart
from benchmarks.end_to_end.parallel_runs import forget, row, timed
from benchmarks.end_to_end.parallel_trace import traced
from cs336 import ops
from cs336.cli.common import check_output
from cs336.optim import AdamW
from cs336.parallel import DDP, ShardedAdamW, ShardedOptimizer, all_to_all_attention, nccl, own_tokens, ring_attention

Step = Callable[[], Any]
Row = dict[str, Any]
STACK = {"full": (8, 8192, 4096), "tiny": (2, 32, 16)}  # layers, features, rows a process
RING = {  # tokens, heads, features of a head; blocks
    "full": (((1 << 17, 16, 128), 5), ((1 << 20, 2, 128), 1)),
    "tiny": (((32, 2, 8), 1),),
}
STEPS, BLOCKS = {"full": 10, "tiny": 1}, {"full": 5, "tiny": 2}


# ---- AdamW ----


def step(size: str, device: torch.device) -> Iterator[Row]:
    """A step of AdamW on gradients that are there; of a divided one with the gather, without the sums before it."""
    layers, features, _ = STACK[size]
    native = nccl.missing(device) is None
    found: dict[str, float] = {}

    def weights() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(features, features, device=device).bfloat16()) for _ in range(layers)]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    def sharded(bucket_mb: float | None) -> Step:
        optimizer = ShardedAdamW(weights(), lr=1e-4, bucket_mb=bucket_mb, native=native)
        optimizer.step()

        def step() -> None:
            optimizer._totals.fill_(1)  # every parameter has a gradient, summed
            optimizer._reduced = True
            optimizer.step()

        return step

    fused = device.type == "cuda"
    contenders: dict[str, Callable[[], Step]] = {
        "cs336 AdamW": lambda: AdamW(weights(), lr=1e-4).step,
        "torch AdamW(fused=True), bfloat16 moments": lambda: torch.optim.AdamW(weights(), lr=1e-4, fused=fused).step,
        "cs336 ShardedAdamW": lambda: sharded(25.0),
        "cs336 ShardedAdamW, one bucket": lambda: sharded(None),
    }
    for name, make in contenders.items():
        call = make()
        found[name], peak = timed(call, device, STEPS[size], BLOCKS[size])
        extra = {"of_adamw": round(found[name] / found["cs336 AdamW"], 4), "native": native}
        yield row("step", name, STACK[size][:2], found[name], peak) | extra
        del call
        forget()


# ---- ZeRO-1 ----


def stack(size: str, device: torch.device) -> nn.Sequential:
    layers, features, _ = STACK[size]
    torch.manual_seed(0)
    place = {"device": device, "dtype": torch.bfloat16}
    made = [nn.Linear(features, features, bias=False, **place) for _ in range(layers)]
    return nn.Sequential(*(module for linear in made for module in (linear, nn.ReLU())))


def contenders(size: str, device: torch.device) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name, and what makes the step; one at a time is in memory."""
    features, rows = STACK[size][1:]
    x = torch.randn(rows, features, device=device, dtype=torch.bfloat16)
    fused = {"fused": True} if device.type == "cuda" else {}

    def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, finish: Step = lambda: None) -> Step:
        def step() -> None:
            model(x).mean().backward()
            finish()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return step

    def alone() -> Step:
        model = stack(size, device)
        linears = list(model.parameters())
        mine = linears[:: dist.get_world_size()]
        return step_of(model, torch.optim.AdamW(mine, lr=1e-4, **fused))

    def ours() -> Step:
        model = DDP(stack(size, device))
        optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=1e-4)
        return step_of(model, optimizer, model.finish_gradient_synchronization)

    def ours_flat(native: bool) -> Step:
        model = stack(size, device)
        optimizer = ShardedAdamW(model.parameters(), lr=1e-4, native=native)
        optimizer.overlap(model)
        return step_of(model, optimizer)

    def ours_with_torch() -> Step:
        model = DDP(stack(size, device))
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, **fused)
        return step_of(model, optimizer, model.finish_gradient_synchronization)

    def redundancy() -> Step:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = nn.parallel.DistributedDataParallel(stack(size, device), gradient_as_bucket_view=True)
        cls = torch.optim.AdamW
        return step_of(model, ZeroRedundancyOptimizer(model.parameters(), cls, lr=1e-4, **fused))

    def fsdp2() -> Step:
        from torch.distributed.fsdp import fully_shard

        model = stack(size, device)
        for module in model:
            if isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(model)
        return step_of(model, torch.optim.AdamW(model.parameters(), lr=1e-4, **fused))

    yield "compute alone", alone
    yield "cs336 DDP + ShardedOptimizer", ours
    yield "cs336 DDP + ShardedOptimizer(torch.AdamW)", ours_with_torch
    yield "cs336 ShardedAdamW", lambda: ours_flat(native=False)
    if reason := nccl.missing(device):
        if dist.get_rank() == 0:
            print(f"cs336 ShardedAdamW(native=True) is left out: {reason}", flush=True)
    else:
        yield "cs336 ShardedAdamW(native=True)", lambda: ours_flat(native=True)
    yield "DDP + ZeroRedundancyOptimizer", redundancy
    yield "FSDP2", fsdp2


def zero(size: str, device: torch.device) -> Iterator[Row]:
    for name, make in contenders(size, device):
        step = make()
        seconds, peak = timed(step, device, STEPS[size], BLOCKS[size])
        found = traced(step) if device.type == "cuda" else {}
        yield row("zero", name, STACK[size], seconds, peak) | found
        del step
        forget()


# ---- attention over the tokens of all ranks ----


def ring(size: str, device: torch.device) -> Iterator[Row]:
    """Forward and backward; on one process over all tokens, then each process over its part."""
    for shape, blocks in RING[size]:
        yield from _ring(shape, blocks, device)
        forget()


def _ring(shape: tuple[int, int, int], blocks: int, device: torch.device) -> Iterator[Row]:
    S, H, D = shape
    N = dist.get_world_size()
    whole = [torch.randn(1, H, S, D, device=device, dtype=torch.bfloat16) for _ in range(4)]
    *qkv, do = whole

    def run_of(call: Callable[..., Tensor], tensors: list[Tensor], do: Tensor) -> Step:
        leaves = [x.detach().contiguous().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(call(*leaves), leaves, do)

    seconds, peak = timed(run_of(lambda q, k, v: ops.attention(q, k, v, causal=True), qkv, do), device, 1, blocks)
    yield row("ring", "one process", (S, H, D), seconds, peak)
    for kind, call in (("ring", ring_attention), ("all_to_all", all_to_all_attention)):
        *mine, mine_do = (own_tokens(x, dim=2, kind=kind) for x in whole)
        step = run_of(lambda q, k, v, call=call: call(q, k, v, causal=True), mine, mine_do)
        split, peak = timed(step, device, 1, blocks)
        over = {"of_perfect_split": round(split * N / seconds, 3)}
        yield row("ring", kind, (S, H, D), split, peak) | over


def equal(size: str, device: torch.device) -> Iterator[Row]:
    for name, loss, gradient in differences(device):
        yield {
            "op": "parallel equal",
            "variant": name,
            "processes": dist.get_world_size(),
            "loss_difference": slowest(loss, device),
            "gradient_difference": slowest(gradient, device),
        }
    for name, loss, weight in steps_apart(device):
        yield {
            "op": "parallel equal",
            "variant": name,
            "processes": dist.get_world_size(),
            "loss_difference": slowest(loss, device),
            "weight_difference": slowest(weight, device),
        }


SECTIONS = {"step": step, "zero": zero, "equal": equal, "ring": ring} | parallel_runs.RUNS


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("cs336 bench parallel", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if none is named")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="(%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    try:
        check_output(options.out)
    except ValueError as error:
        parser.error(str(error))
    return options


def shown(row: Row) -> str:
    parts = [f"{row['op'].removeprefix('parallel '):6} {row['variant']:42} {row['processes']} processes"]
    if "seconds" in row:
        parts.append(f"{1e3 * row['seconds']:9.2f} ms")
    if row.get("peak_bytes"):
        parts.append(f"{row['peak_bytes'] / 2**30:6.2f} GiB")
    known = ("op", "variant", "processes", "seconds", "peak_bytes", "shape")
    for name in [name for name in row if name not in known]:
        parts.append(f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}")
    return "  ".join(parts)


def main(argv: list[str]) -> None:
    options = parse(argv)
    device = start()
    for name in options.names or SECTIONS:
        rows = []
        for found in SECTIONS[name](options.size, device):
            rows.append(found)
            if dist.get_rank() == 0:
                print(shown(found), flush=True)
        if options.out and dist.get_rank() == 0:
            header = results.header(device, f"cs336 bench parallel {name} --processes {dist.get_world_size()}")
            results.write(options.out, f"parallel_{name}", header, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
