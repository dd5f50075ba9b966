"""What holds a GPU's memory when a training step takes most of it, by the line of code that allocated it.

    python -m profiling.memory 124M --batch 32 [--rows 15] [--compile] [--snapshot FILE]

The table is of the peak; beside it stands what was predicted. FILE opens in https://docs.pytorch.org/memory_viz, which
draws every block over time.
"""

import argparse
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from profiling.steps import Steps, add_options

MIB = 2**20
STEPS = 3  # the optimizer's state is there from the first one on
EVENTS = 2_000_000  # of the allocator that are kept
OURS = ("/cs336/", "/benchmarks/", "/profiling/")
Event = Mapping[str, Any]


def at_peak(events: Iterable[Event]) -> list[Event]:
    """The blocks that are alive when most memory is, of a trace of the allocator's events."""
    events = list(events)
    alive: dict[int, Event] = {}
    total, most, when = 0, -1, 0
    for i, event in enumerate(events):
        if event["action"] == "alloc":
            alive[event["addr"]] = event
            total += event["size"]
        elif event["action"] == "free_completed" and event["addr"] in alive:
            total -= alive.pop(event["addr"])["size"]
        if total > most:
            most, when = total, i
    alive = {}
    for event in events[: when + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    return list(alive.values())


def place(event: Event) -> str:
    """The innermost line of ours that led to an allocation; compiled code has no line."""
    frames = event.get("frames", [])
    for frame in frames:
        name = frame["filename"]
        for folder in OURS:
            if folder in name and "/site-packages/torch/" not in name:
                return f"{folder.strip('/')}/{name.rpartition(folder)[2]}:{frame['line']} {frame['name']}"
    if any("torchinductor" in frame["filename"] for frame in frames):
        return "compiled code"
    return "the backward pass and torch itself"


def lines(events: Iterable[Event], most: int) -> list[str]:
    blocks = at_peak(events)
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for block in blocks:
        sizes[place(block)] += block["size"]
        counts[place(block)] += 1
    total = sum(sizes.values())
    table = [f"{'MiB':>10} {'share':>6} {'blocks':>6}  allocated at"]
    for name, size in sizes.most_common(most):
        table.append(f"{size / MIB:10,.1f} {size / total:6.1%} {counts[name]:6}  {name}")
    if rest := sizes.most_common()[most:]:
        size = sum(s for _, s in rest)
        table.append(f"{size / MIB:10,.1f} {size / total:6.1%} {sum(counts[n] for n, _ in rest):6}  {len(rest)} others")
    return [*table, f"{total / MIB:10,.1f} at the peak, in {len(blocks)} blocks"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m profiling.memory", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rows", type=int, default=15, help="of the table (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="as a run does; its own code then has no lines")
    parser.add_argument("--snapshot", type=pathlib.Path, metavar="FILE", help="write torch's own snapshot too")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("torch counts the memory of GPUs, and sees none here")
    torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")
    steps = Steps.of(options, compile=options.compile)
    steps.make(STEPS)
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    if options.snapshot is not None:
        torch.cuda.memory._dump_snapshot(str(options.snapshot))
    print("\n".join(lines(events, options.rows)))
    print(f"predicted: {steps.learner.predicted_memory()}")


if __name__ == "__main__":
    main()
