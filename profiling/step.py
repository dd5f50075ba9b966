"""A few training steps to look at, after warm ones: for Nsight Systems, or as a trace that torch.profiler writes.

    python -m profiling.step 124M --trace step.json     open in https://ui.perfetto.dev; any device
    profiling/nsys.sh step 124M                         runs this script under Nsight Systems
    profiling/nsys.sh step 124M --optimizer muon
    python -m profiling.step 124M --trace step.json --graph     as `cs336 train` makes it, replayed as one CUDA graph

All have the range step; without a graph forward, backward and optimizer too. A trace is told with the part of its time
in which the GPU had nothing to do.
"""

import argparse
import pathlib

import torch
from torch.profiler import ProfilerActivity, profile

from profiling.idle import gpu_idle
from profiling.steps import Steps, add_options

WARM_UP = 5  # steps: compile, allocate, settle


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m profiling.step", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--steps", type=int, default=5, help="to look at (%(default)s)")
    parser.add_argument("--trace", type=pathlib.Path, metavar="FILE", help="write a Chrome trace; without it, Nsight")
    parser.add_argument("--graph", action="store_true", help="capture the step where `cs336 train` would")
    options = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and options.trace is None:
        raise SystemExit("Nsight Systems would see no GPU here: torch sees none. --trace FILE works on a CPU too")
    steps = Steps.of(options, graph=options.graph)
    steps.make(WARM_UP)
    if options.trace is None:
        torch.cuda.profiler.start()
        steps.make(options.steps)
        torch.cuda.profiler.stop()
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        steps.make(options.steps)
    found.export_chrome_trace(str(options.trace))
    idle = gpu_idle(options.trace)
    waits = "" if idle is None else f", {idle:.1%} of their time the GPU had nothing to do"
    print(f"{options.trace}: {options.steps} steps{waits}; open it in https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
