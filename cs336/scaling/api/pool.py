"""The worker processes of a server: as many as there is work for, each with its GPU or its part of the cores.

What an earlier server left is found by process number and start time, and told to stop; its runs go on under their
reservations.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from cs336.scaling.api.process import process_mark
from cs336.scaling.api.store import Store
from cs336.scaling.api.worker import taken_of
from cs336.utils.gpus import visible_gpu
from cs336.utils.threads import thread_count

POLL = 0.1  # seconds between two looks
GRACE = 60.0  # seconds that a worker may take to save its run
RESTART = 5.0  # seconds until a slot is used again whose worker could not start
Mark = tuple[int, str]

log = logging.getLogger(__name__)


class Pool:
    """Keeps workers going, in a thread, between start and stop."""

    def __init__(self, store: Store, backend: Any, workers: int, gpus: tuple[int, ...] = (), grace: float = GRACE):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.store, self.workers, self.grace = store, workers, grace
        self.gpus = [visible_gpu(index) for index in gpus]
        self._facts = json.dumps(dataclasses.asdict(backend))
        self._processes: dict[int, subprocess.Popen] = {}  # by slot
        self._not_before = [0.0] * workers
        self._orphans: dict[Mark, float] = {}  # when to end them for good
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="pool")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let workers save their runs, which wait for the next server."""
        self._stopping.set()
        self._thread.join()
        for process in self._processes.values():  # not by a signal, which a trainer would take for its run's alone
            assert process.stdin is not None
            process.stdin.close()
        end = time.monotonic() + self.grace
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.store.recover(taken_of(self.store))

    def _keep(self) -> None:
        while not self._stopping.wait(POLL):
            try:
                self._step()
            except OSError as error:  # a disk that is full, a file that is held: not for ever
                log.error("%s", error)

    def _step(self) -> None:
        for slot, process in list(self._processes.items()):
            if process.poll() is not None:
                self._ended(slot, process)
        running = self.store.running()
        self._end_orphans({(e.pid, e.mark) for e in running if e.pid is not None and e.mark is not None})
        self.store.recover(taken_of(self.store))
        busy = {entry.pid for entry in running}
        idle = sum(process.pid not in busy for process in self._processes.values())
        waiting = self.store.num_waiting()
        for slot in range(self.workers):
            if slot not in self._processes and waiting > idle and time.monotonic() >= self._not_before[slot]:
                self._processes[slot] = self._start(slot)
                idle += 1

    def _end_orphans(self, owners: set[Mark]) -> None:
        """Owners of runs that are not our workers: told to stop, then ended."""
        ours = {process.pid for process in self._processes.values()}
        left = {mark for mark in owners if mark[0] not in ours and process_mark(mark[0]) == mark[1]}
        for pid, mark in left - set(self._orphans):
            log.warning("process %d is a worker of a server that is gone: it is told to stop", pid)
            self._orphans[pid, mark] = time.monotonic() + self.grace
            _signal(pid, signal.SIGTERM)
        self._orphans = {orphan: end for orphan, end in self._orphans.items() if orphan in left}
        for (pid, _), end in self._orphans.items():
            if time.monotonic() > end:
                _signal(pid, signal.SIGKILL)

    def _start(self, slot: int) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, thread_count(None) // self.workers))}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        self._log(slot).parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "cs336.scaling.api.worker", str(self.store.directory), self._facts]
        with open(self._log(slot), "ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def _log(self, slot: int) -> pathlib.Path:
        return self.store.directory / "workers" / f"{slot}.log"

    def _ended(self, slot: int, process: subprocess.Popen) -> None:
        del self._processes[slot]
        assert process.stdin is not None
        process.stdin.close()
        if process.returncode:
            log.warning("a worker ended with status %d: %s", process.returncode, self._log(slot))
            self._not_before[slot] = time.monotonic() + (RESTART if process.returncode > 0 else 0.0)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
