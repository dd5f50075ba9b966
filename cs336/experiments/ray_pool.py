"""Runs as tasks of a Ray cluster. This process claims them and keeps the ledger; a task trains one. Needs ray."""

import pathlib
import time
from typing import Any

from cs336.experiments.ledger import Entry, Ledger
from cs336.experiments.study import Cost, Ray, Runs
from cs336.experiments.train import Result, reached, train_run
from cs336.training import TrainConfig
from cs336.utils.database import Claim

POLL = 0.3  # seconds between two looks


def train_remotely(table: dict[str, Any], run_dir: str) -> tuple[Result | None, str | None, Cost]:
    """In a task: what `train_run` gives, or the error that ended it, and what the run has taken."""
    path = pathlib.Path(run_dir)
    try:
        result = train_run(TrainConfig.from_table(table | {"run_dir": run_dir}))
    except Exception as error:  # whatever ends a run is what came of it
        return None, f"{type(error).__name__}: {error}", reached(path)
    return result, None, reached(path)


class RayPool:
    """Up to where.workers runs at once. Raises ImportError where ray is not installed."""

    def __init__(self, runs: Runs, where: Ray, ledger: Ledger):
        try:
            import ray
        except ImportError:
            raise ImportError('where.kind = "ray" needs Ray: pip install ray, or use kind = "local"') from None
        self.ray, self.runs, self.where, self.ledger = ray, runs, where, ledger
        self.owners: set[str] = set()  # its claims are this process's, which is alive
        self._tasks: dict[Any, Claim[Entry]] = {}

    def __enter__(self) -> "RayPool":
        self._started = not self.ray.is_initialized()
        if self._started:
            self.ray.init(address=self.where.address, log_to_driver=False)
        # A task that its machine's death ends is not tried again by Ray: the ledger says what becomes of it.
        options = {"num_cpus": self.where.cpus, "num_gpus": self.where.gpus, "max_retries": 0}
        self._train = self.ray.remote(train_remotely).options(**options)
        return self

    def step(self, waiting: int) -> None:
        while len(self._tasks) < self.where.workers and (claim := self.ledger.claim()) is not None:
            run_dir = (self.runs.runs / claim.entry.folder).resolve()
            self._tasks[self._train.remote(claim.entry.config, str(run_dir))] = claim
        if not self._tasks:
            time.sleep(POLL)  # another process is at what is left
            return
        ready, _ = self.ray.wait(list(self._tasks), timeout=POLL)
        for task in ready:
            claim = self._tasks.pop(task)
            try:
                result, error, taken = self.ray.get(task)
            except self.ray.exceptions.RayError as failure:
                result, error, taken = None, str(failure), reached(self.runs.runs / claim.entry.folder)
            if result is None:
                self.ledger.fail(claim, error or "unknown", taken)
            else:
                self.ledger.finish(claim, result, taken)

    def __exit__(self, *_: object) -> None:
        for task, claim in self._tasks.items():
            self.ray.cancel(task)  # as Ctrl-C would: the run saves itself
            self.ray.wait([task], timeout=60)
            self.ledger.stop(claim, reached(self.runs.runs / claim.entry.folder))
        if self._started:
            self.ray.shutdown()
