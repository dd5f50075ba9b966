"""The ladder of alignment, rung by rung and seed by seed: from where to where, in seconds of a core.

    python -m benchmarks.end_to_end.bench_align_ladder [RUNG ...] [--seeds 0 1 2] [--run-dir DIR] [--out FILE]

What is done in DIR is not repeated. FILE keeps its rows of other rungs and seeds, each with the commit it is of.
"""

import argparse
import pathlib
import sys
from typing import Any

import torch

from benchmarks import results
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
            write(options.out, rows)
    return 0


def write(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a results file, in place of those of the same rungs and seeds."""
    places, commit = [(row["rung"], row["seed"]) for row in rows], results.describe_commit()
    kept = results.read(out).get("align_ladder", {"rows": []})["rows"]
    found = [row for row in kept if (row["rung"], row["seed"]) not in places] + [r | {"commit": commit} for r in rows]
    found.sort(key=lambda row: (list(RUNGS).index(row["rung"]), row["seed"]))
    rungs, seeds = (" ".join(str(x) for x in dict.fromkeys(row[key] for row in found)) for key in ("rung", "seed"))
    command = f"python -m benchmarks.end_to_end.bench_align_ladder {rungs} --seeds {seeds}"
    results.write(out, "align_ladder", results.cpu_header(command), found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
