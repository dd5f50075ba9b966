"""`cs336 env`, `cs336 bench`."""

import os
import pathlib
import subprocess
import sys

from cs336.cli import serving
from cs336.cli.common import OwnOptions, Run

ROOT = pathlib.Path(__file__).parents[2]


def env() -> None:
    """What is installed, what is compiled, and what is missing."""
    from cs336.env import print_env

    print_env()


@OwnOptions
def bench(arguments: list[str]) -> Run:
    """Time what there is: kernels and training beside their peers, and a model's answers.

    `cs336 bench ops`, `cs336 bench train`, `cs336 bench collectives`, `cs336 bench parallel`;
    `cs336 bench offline|latency MODEL`, `cs336 bench serve URL`.
    """
    if arguments and arguments[0] in {"offline", "latency", "serve"}:
        return serving.bench(arguments)
    if not (ROOT / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(
            "the benchmarks are in the repository, not in an installed package: run this in a clone"
        )

    def run() -> int:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "benchmarks.run", *arguments]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode

    return run
