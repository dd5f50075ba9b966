"""A worker process of a study: python -m cs336.experiments.worker DIRECTORY [BUDGET]."""

import pathlib
import sys

from cs336.experiments.ledger import Ledger
from cs336.experiments.runner import end_with_parent, work
from cs336.experiments.train import train_run
from cs336.training.signals import stop_requests
from cs336.utils.stages import Interrupted


def main(directory: str, budget: str | None = None) -> None:
    """Train runs until one fails, after which a device may be of no more use, or there are none left."""
    ledger, runs = Ledger(directory, budget), pathlib.Path(directory) / "runs"
    with stop_requests() as stopped:
        end_with_parent()
        try:
            while work(ledger, runs, train_run, stopped) == "done":
                pass
        except Interrupted:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
