"""A worker process and its supervisor: a document that the worker dies of, or hangs on, is lost alone.

The worker says which record it is at. Where it dies or stays at one too long, the unit is made again; where that
happens at the same record a second time, that record is passed over, and where it happens yet again, reading itself is
what kills, and the unit ends there. What is lost is remembered beside the outputs, so that it is paid for once.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

from cs336.data.build.unit import Work
from cs336.data.build.worker import described, request_of
from cs336.data.recipe import Recipe
from cs336.utils.duration import duration
from cs336.utils.files import write_json

POLL_SECONDS = 0.1
MOST_LOST = 100  # records of one unit; then the rest of it is lost
TRIES = 2  # before a record is blamed: a worker may also be killed by a person or for others' memory
SETUP = -1  # before the first unit
WORKER = "import sys; from cs336.data.build.worker import main; main(int(sys.argv[1]), sys.argv[2])"


class WorkerFailed(RuntimeError):
    """Not of a document: a full disk, a step that cannot be built."""


class Supervisor:
    """Runs units of work in one worker process, which is replaced when it dies. Close it."""

    def __init__(self, recipe: Recipe, lock: str):
        self.recipe, self.lock = recipe, lock
        self._process: subprocess.Popen[bytes] | None = None
        self._beat = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._beat.truncate(8)
        self._number = mmap.mmap(self._beat.fileno(), 8)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (what the worker writes to its standard error)
        self._stopped = threading.Event()

    def run(self, work: Work) -> None:
        """Make a unit's files. Raises WorkerFailed for what is no document's fault."""
        work = self._with_lost(work)
        tries: dict[int, int] = {}
        while (ended := self._try(work)) is not None:
            number, reason, detail = ended
            tries[number] = tries.get(number, 0) + 1
            if tries[number] < TRIES:
                continue
            tries[number] = 0
            again = number in work.lost or len(work.lost) >= MOST_LOST
            work = replace(work, lost=work.lost | {number: (reason, detail)}, end=number if again else work.end)
            self._remember(work)

    def close(self) -> None:
        self._stopped.set()
        self._kill()
        self._number.close()
        self._beat.close()
        self._said.close()

    def stop(self) -> None:
        """From another thread: `run` raises WorkerFailed soon."""
        self._stopped.set()

    # ---- one try ----

    def _try(self, work: Work) -> tuple[int, str, str] | None:
        """None where the unit is made, else (number of the record, reason, detail)."""
        process = self._process or self._start()
        self._set(0)
        if not self._send(process, request_of(work)):
            return self._died(process)
        since, last = time.monotonic(), 0
        while True:
            if self._stopped.is_set():
                raise WorkerFailed("stopped")
            reply = self._reply(process)
            if reply is not None:
                if "error" in reply:
                    self._kill()
                    raise WorkerFailed(reply["error"])
                return None
            if process.poll() is not None:
                return self._died(process)
            at = self._at()
            if at != last:
                since, last = time.monotonic(), at
            elif time.monotonic() - since > self.recipe.limits.record_seconds:
                self._kill()
                return at, "too slow", f"longer than {duration(self.recipe.limits.record_seconds)}"

    def _died(self, process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
        code = process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        number, words = self._at(), self._last_words()
        self._kill()
        return number, "killed its worker", f"{how}{': ' + words if words else ''}"

    def _reply(self, process: subprocess.Popen[bytes]) -> dict | None:
        assert process.stdout is not None
        if select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            with contextlib.suppress(ValueError):  # "": it has died, which poll tells
                return json.loads(process.stdout.readline() or b"x")
            time.sleep(POLL_SECONDS / 10)
        return None

    # ---- the process ----

    def _start(self) -> subprocess.Popen[bytes]:
        """A process that has built the recipe's steps. One that a signal ends before that is started again."""
        for _ in range(1 + TRIES):
            process = self._process = self._spawn()
            self._send(process, described(self.recipe))
            reply = None
            while reply is None and process.poll() is None and not self._stopped.is_set():
                reply = self._reply(process)
            if reply is not None and "error" not in reply:
                return process
            code = process.poll()
            words = reply["error"] if reply else self._last_words() or f"a worker ended with exit status {code}"
            self._kill()
            if code is None or code >= 0:
                break
        raise WorkerFailed(words)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._set(SETUP)
        self._said.seek(0)
        self._said.truncate()
        return subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, str(self._beat.fileno()), self.lock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            pass_fds=[self._beat.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the supervisor
        )

    def _send(self, process: subprocess.Popen[bytes], request: dict) -> bool:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def _kill(self) -> None:
        if (process := self._process) is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._process = None

    def _at(self) -> int:
        return struct.unpack_from("<q", self._number)[0]

    def _set(self, number: int) -> None:
        struct.pack_into("<q", self._number, 0, number)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    # ---- what is lost ----

    def _with_lost(self, work: Work) -> Work:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            known = json.loads(work.path("lost").read_text(encoding="utf-8"))
            if known["key"] == work.key:
                lost = {number: (reason, detail) for number, reason, detail in known["lost"]}
                return replace(work, lost=lost, end=known["end"])
        return work

    def _remember(self, work: Work) -> None:
        path = work.path("lost")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": work.key, "lost": request_of(work)["lost"], "end": work.end})
