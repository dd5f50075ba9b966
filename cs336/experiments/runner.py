"""run_study: trains the runs of a study until there are no more, or its budget is used up.

It may be killed at any moment and started again, and several may be at one study: the ledger says what is left.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console

from cs336.experiments.ledger import Entry, Ledger, State, owner
from cs336.experiments.study import Here, Local, Runs
from cs336.experiments.train import Train, reached, train_run
from cs336.experiments.watch import Watch
from cs336.training import TrainConfig
from cs336.training.signals import stop_requests
from cs336.utils.gpus import visible_gpu
from cs336.utils.stages import Interrupted
from cs336.utils.threads import thread_count

POLL = 0.3  # seconds between two looks at the ledger
GRACE = 120  # seconds that a worker may take to save its run


def run_study(
    study: Runs, *, retry: bool = False, console: Console | None = None, train: Train = train_run
) -> list[Entry]:
    """Train what is left of a study, and return its runs.

    Args:
        retry: runs that have failed once more, from their newest checkpoints.
        train: of runs in this process; others are trained by `train_run`.

    Raises Interrupted where a signal stopped it (the same call continues), RuntimeError if a worker cannot start,
    ValueError once the first run has ended without study.metric.
    """
    ledger = Ledger(study.directory, study.budget)
    trials = study.trials(ledger.entries())
    ledger.want(trials)
    if retry:
        ledger.retry()
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(stop_requests())
        stack.enter_context(Watch(study, ledger, console))
        pool = stack.enter_context(_pool(study, ledger, train, stopped))
        while True:
            ledger.recover(lambda folder: reached(study.runs / folder), spare=pool.owners)
            entries = ledger.entries(wanted=True)
            waiting = sum(entry.state == "waiting" and ledger.affords(entry) for entry in entries)
            if stopped():
                raise Interrupted
            _check_metric(study.metric, entries)
            if waiting or any(entry.state == "running" for entry in entries):
                pool.step(waiting)
            elif len(more := study.trials(entries)) > len(trials):
                trials = more
                ledger.want(trials)
            else:
                return entries


def _check_metric(metric: str, entries: list[Entry]) -> None:
    """A run that diverged has it all the same, as a number that is not finite."""
    results = [entry.result for entry in entries if entry.state == "done"]
    if results and not any(metric in result for result in results):
        known = ", ".join(sorted(set().union(*results)))
        raise ValueError(f"metric {metric}: no run that has ended has it; name one of {known}")


def work(ledger: Ledger, runs: pathlib.Path, train: Train, stopped: Callable[[], bool] = lambda: False) -> State | None:
    """Claim one run, train it, and return what became of it; None if there was none.

    A run that fails is kept with its error.

    Raises Interrupted where a signal stopped it: the run waits to be continued.
    """
    claim = None if stopped() else ledger.claim()
    if claim is None:
        return None
    run_dir = runs / claim.entry.folder
    try:
        result = train(TrainConfig.from_table(claim.entry.config | {"run_dir": str(run_dir)}))
    except (Interrupted, KeyboardInterrupt):
        ledger.stop(claim, reached(run_dir))
        raise
    except Exception as error:  # whatever ends a run is what came of it
        ledger.fail(claim, f"{type(error).__name__}: {error}", reached(run_dir))
        return "failed"
    ledger.finish(claim, result, reached(run_dir))
    return "done"


class Pool(Protocol):
    """Where runs are trained."""

    @property
    def owners(self) -> set[str]:
        """Those whose death it notices."""

    def step(self, waiting: int) -> None:
        """See to it that runs are trained, up to `waiting` more, and come back soon, or after one."""


def _pool(study: Runs, ledger: Ledger, train: Train, stopped: Callable[[], bool]) -> Any:
    match study.where:
        case Here():
            return contextlib.nullcontext(_Here(ledger, study.runs, train, stopped))
        case Local():
            return _Workers(study, study.where, ledger)
        case _:
            from cs336.experiments.ray_pool import RayPool

            return RayPool(study, study.where, ledger)


class _Here:
    def __init__(self, *arguments: Any):
        self._arguments = arguments
        self.owners: set[str] = set()

    def step(self, waiting: int) -> None:
        if not work(*self._arguments):
            time.sleep(POLL)  # another process is at what is left


class _Workers:
    """Processes that train one run after another, each started anew after one that failed."""

    def __init__(self, study: Runs, where: Local, ledger: Ledger):
        self.study, self.where, self.ledger = study, where, ledger
        self.processes: dict[int, subprocess.Popen] = {}  # by slot

    def __enter__(self) -> "_Workers":
        return self

    def step(self, waiting: int) -> None:
        for slot, process in list(self.processes.items()):
            if process.poll() is not None:
                self._ended(slot, process)
        for slot in range(self.where.num_workers):
            if slot not in self.processes and waiting > len(self._idle()):
                self.processes[slot] = self._start(slot)
        time.sleep(POLL)

    @property
    def owners(self) -> set[str]:
        return {owner(process.pid) for process in self.processes.values()}

    def _idle(self) -> list[int]:
        """Slots whose process has not claimed a run, or not yet."""
        busy = {entry.owner for entry in self.ledger.entries() if entry.state == "running"}
        return [slot for slot, process in self.processes.items() if owner(process.pid) not in busy]

    def _start(self, slot: int) -> subprocess.Popen:
        where = self.where
        environment = worker_environment(where, slot)
        self._log(slot).parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "cs336.experiments.worker", str(self.study.directory)]
        with open(self._log(slot), "ab") as log:
            # Its input is a pipe that ends with this process. In its own session Ctrl-C reaches it once, from here.
            return subprocess.Popen(
                [*command, *([self.study.budget] if self.study.budget else [])],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _log(self, slot: int) -> pathlib.Path:
        return self.study.directory / "workers" / f"{slot}.log"

    def _ended(self, slot: int, process: subprocess.Popen) -> None:
        del self.processes[slot]
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode == 0:
            return
        name, how = owner(process.pid), f"status {process.returncode}"
        if process.returncode < 0:
            how = f"signal {signal.Signals(-process.returncode).name}"
            how += ", as when memory runs out" if process.returncode == -signal.SIGKILL else ""
        error = f"its process was ended by {how}"
        if not self.ledger.recover(lambda folder: reached(self.study.runs / folder), of=name, error=error):
            said = self._log(slot).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"a worker ended by {how} without a run ({self._log(slot)}): {' '.join(said)}")

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


def worker_environment(where: Local, slot: int) -> dict[str, str]:
    """Of a worker: its GPU, and its part of the cores."""
    threads = where.threads or max(1, thread_count(None) // where.num_workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if where.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = visible_gpu(where.gpus[slot % len(where.gpus)])
    return environment


def end_with_parent() -> None:
    """Stop as a signal would, once the process at the other end of the input is gone."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock an interpreter that ends cannot take from this thread
            pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
