"""The ladder of alignment, rung by rung and seed by seed: from where to where, in seconds of a core.

    python -m benchmarks.end_to_end.bench_align_ladder [RUNG ...] [--seeds 0 1 2] [--run-dir DIR] [--out FILE]

What is done in DIR is not repeated.
"""

import argparse
import pathlib
import platform
import sys

import torch

from benchmarks import results
from benchmarks.end_to_end.bench_tokenizer import cpu_model
from cs336.align_ladder import RUNGS, AlignLadder, align_ladder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.end_to_end.bench_align_ladder", description=__doc__)
    parser.add_argument("rungs", nargs="*", default=list(RUNGS), help=", ".join(RUNGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=float, default=1.0, help="of each rung's steps (%(default)s)")
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs/bench-align-ladder"))
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="results file to put the rows into")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        place = options.run_dir / f"seed-{seed}"
        rows += align_ladder(AlignLadder(tuple(options.rungs), place, options.share, seed=seed))
        if options.out:
            seeds = " ".join(map(str, options.seeds))
            command = f"python -m benchmarks.end_to_end.bench_align_ladder {' '.join(options.rungs)} --seeds {seeds}"
            results.write(options.out, "align_ladder", header(command), rows)
    return 0


def header(command: str) -> dict[str, object]:
    return {
        "command": command,
        "cpu": cpu_model(),
        "cores": 1,
        "python": platform.python_version(),
        "peers": {"torch": torch.__version__},
        "commit": results.describe_commit(),
        "date": results.today(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
